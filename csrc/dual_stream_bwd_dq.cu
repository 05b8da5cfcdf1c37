// dual_stream_attn, backward, for Hopper: dQ and every query's statistics, by blocks that stay with the keys of a
// (clip, head) and let its queries pass by, as in the forward.
//
// Of a stream, with P its softmax before the weight w: dP = dO·Vᵀ, D = rowsum(P∘dP), dS = P∘(w·dP - w·D), dQ = scale ·
// Σ dS·K over both. A warpgroup has dQ += dS·K of one tile of keys, S = Q·Kᵀ and dP of the next under way together.
// D must be known before the first dS of its stream:
//
// * of a stream of one tile of keys it is summed there and then;
// * of a longer one it follows from rowsum(dO∘O), the sum of w·D over the streams, if that is exact enough: O being
//   rounded, the stream's weight must be a number, and not small beside the other's;
// * else a pass of its own, over scores and dP alone, makes it.
//
// Registers of a lane: 44 of S and dP each, 24 of dS, 32 of dQ. Shared memory: Q, dO and O twice, 96 KB; 22 KB a tile
// of keys and values: at most 5 tiles.
#include <algorithm>
#include <cmath>

#include "dual_stream_bwd.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kGroups = 2;  // warpgroups
constexpr int kSlots = 2;   // tiles of Q, dO and O

// What a pass makes: D; dQ, D being known; or both, as said above.
enum Pass { kDelta, kGradient, kBoth };

struct Arguments {
  Queries queries;
  TensorMap q, grad, out, dq, k[2], v[2];
  Weight weight[2];
  const float* logsumexp[2];
  float* delta[2];  // (B, H, T, N), where it is asked for
  float* statistics;
  int length[2], key_tiles[2];
  int index[2];    // of the streams, among the statistics
  bool reads_out;  // the D of some stream follows from O
  float scale, scale_log2;
};

struct Tiles {
  char q[kTileBytes], grad[kTileBytes], out[kTileBytes];
};

struct Shared {
  alignas(1024) Tiles tiles[kGroups][kSlots];
  uint64_t filled[kGroups][kSlots];
  uint64_t keys_filled;
  alignas(1024) char keys[];  // kKeyBytes for each tile of K, 8 rows of zeros, and as much for each tile of V
};

// A stream's numbers at a lane's two queries.
struct Row {
  float logsumexp[2];  // in powers of two
  float weight[2], delta[2];
};

// Σ dO∘O over a row.
template <typename Element>
__device__ void multiply_rows(const Tiles& tiles, float (&sum)[2], int warp, int lane) {
  uint32_t a[16], b[16];
  load_tile(tiles.grad, a, warp, lane);
  load_tile(tiles.out, b, warp, lane);
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int i = 0; i < 16; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const Element x = reinterpret_cast<const Element*>(&a[i])[e], y = reinterpret_cast<const Element*>(&b[i])[e];
      sum[i % 2] += static_cast<float>(x) * static_cast<float>(y);
    }
#pragma unroll
  for (int r = 0; r < 2; r++) sum[r] = row_sum(sum[r]);
}

template <typename Element, Pass kPass>
__device__ void pass(const Arguments& args, Shared& shared, int w) {
  constexpr bool kDQ = kPass != kDelta;
  const Queries& queries = args.queries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const int second = args.key_tiles[0];  // the second stream's first tile of keys
  const int key_tiles = second + args.key_tiles[1];
  char* const k = shared.keys;
  char* const v = k + key_tiles * kKeyBytes + 8 * kRowBytes;
  const int begin = static_cast<int>(int64_t{queries.num_tiles} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{queries.num_tiles} * (blockIdx.x + 1) / gridDim.x);
  Cursor<kSlots> at;
  Row row;
  float s[kScores], dp[kScores], dq[32];
  float sums[2] = {0, 0};  // of P∘dP, as far as the stream's tiles have passed
  float shared_d[2] = {};  // w·D of the first stream
  uint32_t ds[kPacked];
#pragma unroll
  for (int i = kScores / 2; i < kPacked; i++) ds[i] = 0;

  const auto load_queries = [&](int tile, int slot) {
    if (tile >= end) return;
    const Box box = Place(queries, tile).box();
    Tiles& tiles = shared.tiles[w][slot];
    uint64_t* filled = &shared.filled[w][slot];
    expect(filled, (2 + args.reads_out) * kTileBytes);
    load_box(tiles.q, args.q, box, filled);
    load_box(tiles.grad, args.grad, box, filled);
    if (args.reads_out) load_box(tiles.out, args.out, box, filled);
  };
  const auto start_scores = [&](int tile) {
    pin(s);
    pin(dp);
    wgmma_fence();
    multiply_transposed<Element>(s, tile_descriptor(shared.tiles[w][at.slot].q), tile_descriptor(k + tile * kKeyBytes));
    multiply_transposed<Element>(dp, tile_descriptor(shared.tiles[w][at.slot].grad),
                                 tile_descriptor(v + tile * kKeyBytes));
    wgmma_commit();
  };
  const auto start_dq = [&](int tile) {
    pin(dq);
    pin(ds);
    wgmma_fence();
    multiply_maybe_add<Element>(dq, ds, tile_descriptor(k + tile * kKeyBytes), tile != 0);
    wgmma_commit();
  };
  // Of the stream that begins with a tile of keys.
  const auto read_row = [&](int query_tile, int stream) {
    const Place place(queries, query_tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int in_tile = warp * 16 + lane / 4 + 8 * i;
      const int query = min(place.row + in_tile, queries.rows - 1);
      const float x = __ldg(args.logsumexp[stream] + place.index(queries, query));
      row.logsumexp[i] = place.row + in_tile < queries.rows ? x * static_cast<float>(M_LOG2E) : INFINITY;
      if (kDQ) row.weight[i] = args.weight[stream].at(queries, place, query);
      if (kPass == kGradient)
        row.delta[i] = __ldg(args.statistics + int64_t{query_tile} * kStatistics + args.index[stream] * kOfStream +
                             kRows + in_tile);
    }
  };
  const auto write_row = [&](int query_tile, int stream, const float (&delta)[2]) {
    if (lane % 4 != 0) return;
    const Place place(queries, query_tile);
    float* to = args.statistics + int64_t{query_tile} * kStatistics + args.index[stream] * kOfStream;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int in_tile = warp * 16 + lane / 4 + 8 * i, query = place.row + in_tile;
      const bool exists = query < queries.rows;
      to[in_tile] = row.logsumexp[i];
      to[kRows + in_tile] = exists ? delta[i] : 0;
      to[2 * kRows + in_tile] = exists ? args.weight[stream].at(queries, place, query) : 0;
      if (exists && args.delta[stream] != nullptr) args.delta[stream][place.index(queries, query)] = delta[i];
    }
  };
  // S and dP of a tile of keys are there.
  const auto digest = [&](int query_tile, int tile) {
    const int stream = tile >= second;
    const bool first = tile == 0 || tile == second;
    const int left = args.length[stream] - (stream ? tile - second : tile) * kKeys;
    if (left < kKeys) mask(s, left);
#pragma unroll
    for (int i = 0; i < kScores; i++) s[i] = exp2_fast(fmaf(s[i], args.scale_log2, -row.logsumexp[i / 2 % 2]));
    if (kPass == kDelta || (kPass == kBoth && args.key_tiles[stream] == 1)) {
      if (first) sums[0] = sums[1] = 0;
#pragma unroll
      for (int i = 0; i < kScores; i++) sums[i / 2 % 2] = fmaf(s[i], dp[i], sums[i / 2 % 2]);
      if (left <= kKeys) {
        float delta[2];
#pragma unroll
        for (int r = 0; r < 2; r++) row.delta[r] = delta[r] = row_sum(sums[r]);
        write_row(query_tile, stream, delta);
      }
    } else if (kPass == kBoth && first) {
      float product[2], delta[2];
      multiply_rows<Element>(shared.tiles[w][at.slot], product, warp, lane);
#pragma unroll
      for (int r = 0; r < 2; r++) row.delta[r] = delta[r] = (product[r] - (stream ? shared_d[r] : 0)) / row.weight[r];
      write_row(query_tile, stream, delta);
    }
    if constexpr (kDQ) {
      const float shift[2] = {-row.weight[0] * row.delta[0], -row.weight[1] * row.delta[1]};
      if (kPass == kBoth && tile == 0) shared_d[0] = -shift[0], shared_d[1] = -shift[1];
#pragma unroll
      for (int i = 0; i < kScores / 2; i++)
        ds[i] = pack<Element>(s[2 * i] * fmaf(dp[2 * i], row.weight[i % 2], shift[i % 2]),
                              s[2 * i + 1] * fmaf(dp[2 * i + 1], row.weight[i % 2], shift[i % 2]));
    }
  };
  // Into the room of the queries that have passed.
  const auto store = [&](int query_tile) {
    char* const room = shared.tiles[w][at.slot ^ 1].q;
    const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + w) : "memory"); };
    meet();
    if constexpr (kDQ) {
#pragma unroll
      for (int i = 0; i < 32; i++) dq[i] *= args.scale;
      store_tile<Element>(room, dq, warp, lane);
      ptx::fence_proxy_async(ptx::space_shared);
      meet();
      if (leader) {
        store_box(args.dq, Place(queries, query_tile).box(), room);
        ptx::cp_async_bulk_commit_group();
      }
    }
  };

  int tile = begin + w;  // of queries
  const int first_tile = tile;
  if (leader)
    for (int i = 0; i < kSlots; i++) load_queries(tile + i * kGroups, i);
  uint32_t round = 0;
  for (int from = begin; from < end; round ^= 1) {
    const int line = from / queries.tiles_per_line;
    const int stop = min(end, (line + 1) * queries.tiles_per_line);
    if (from > begin) __syncthreads();
    if (threadIdx.x == 0) {
      expect(&shared.keys_filled, 2 * key_tiles * kKeyBytes);
      const int clip = line / queries.heads;
      for (int i = 0; i < key_tiles; i++) {
        const int stream = i >= second;
        const Box box{(stream ? i - second : i) * kKeys, line - clip * queries.heads, 0, clip};
        load_box(k + i * kKeyBytes, args.k[stream], box, &shared.keys_filled);
        load_box(v + i * kKeyBytes, args.v[stream], box, &shared.keys_filled);
      }
    }
    from = stop;
    if (tile >= stop) continue;
    read_row(tile, 0);
    wait(&shared.keys_filled, round);
    wait(&shared.filled[w][at.slot], at.round);
    start_scores(0);
    wgmma_wait<0>();
    pin(s);
    pin(dp);
    digest(tile, 0);
    int key_tile = 0;
    while (true) {
      // dS of key_tile is there. After the last the next tile of queries follows, if there is one: if not, its scores
      // are made of what lies there, and are not used.
      if (key_tile == 0 && leader && tile > first_tile) {
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
        load_queries(tile + kGroups, at.slot ^ 1);
      }
      const int next = key_tile + 1 == key_tiles ? 0 : key_tile + 1;
      const int next_tile = next == 0 ? tile + kGroups : tile;
      const bool more = next_tile < stop;
      if (next == 0) {
        at.advance();
        if (more) wait(&shared.filled[w][at.slot], at.round);
      }
      start_scores(next);
      if constexpr (kDQ) start_dq(key_tile);
      if ((next == 0 || next == second) && more) read_row(next_tile, next != 0);
      wgmma_wait<0>();
      pin(s);
      pin(dp);
      if constexpr (kDQ) {
        pin(dq);
        pin(ds);
      }
      if (next == 0) {
        store(tile);
        tile = next_tile;
        if (!more) break;
      }
      key_tile = next;
      digest(tile, key_tile);
    }
  }
  if (leader) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
}

template <typename Element, Pass kPass>
__global__ void __launch_bounds__(kGroups * 128, 1) backward(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (auto& slots : shared.filled)
      for (uint64_t& barrier : slots) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&shared.keys_filled, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (const TensorMap* map : {&args.q, &args.grad, &args.k[0], &args.v[0]}) prefetch_map(*map);
    let_next_begin();
  }
  // dS of a tile has 96 columns, the last 8 being zeros: what they meet behind the last tile of K must be finite.
  if (threadIdx.x < 8 * kRowBytes / 16)
    reinterpret_cast<uint4*>(shared.keys + (args.key_tiles[0] + args.key_tiles[1]) * kKeyBytes)[threadIdx.x] = {};
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (kPass == kGradient) wait_for_former();
  pass<Element, kPass>(args, shared, __shfl_sync(~0u, threadIdx.x / 128, 0));
}

// Whether a stream's D follows exactly enough from rowsum(dO∘O).
bool follows(const KeyStream& stream, const KeyStream& other) {
  if (stream.weight_type != WeightType::kNumber) return false;
  return other.length == 0 || (other.weight_type == WeightType::kNumber && count_key_tiles(other.length) == 1 &&
                               std::abs(other.number) <= 2 * std::abs(stream.number));
}

template <typename Element>
void launch(const DualStreamBackward& call, const Queries& queries, float* statistics, int device,
            cudaStream_t stream) {
  const DualStreamShape& shape = call.shape;
  Arguments args{};
  args.queries = queries;
  const auto query_map = [&](const TensorView& tensor) {
    return tensor_map(tensor, shape.dtype, shape.batch, queries.groups, queries.rows, shape.heads, kRows);
  };
  args.q = query_map(call.q);
  args.grad = query_map(call.grad);
  args.out = query_map(call.out);
  if (call.dq.data != nullptr) args.dq = query_map(call.dq);
  // The stream whose D follows from the other's comes second.
  const bool swap = call.streams[1].length != 0 && count_key_tiles(call.streams[0].length) > 1;
  const int order[2] = {swap ? 1 : 0, swap ? 0 : 1};
  bool is_exact = true;
  for (int i = 0; i < 2; i++) {
    const int from = order[i];
    const KeyStream &keys = call.streams[from], &other = call.streams[1 - from];
    if (keys.length == 0) continue;
    const auto key_map = [&](const TensorView& tensor) {
      return tensor_map(tensor, shape.dtype, shape.batch, 1, keys.length, shape.heads, kKeys);
    };
    args.k[i] = key_map(keys.k);
    args.v[i] = key_map(keys.v);
    args.index[i] = from;
    args.weight[i] = Weight(keys);
    args.logsumexp[i] = keys.logsumexp;
    args.delta[i] = call.gradients[from].delta;
    args.length[i] = static_cast<int>(keys.length);
    args.key_tiles[i] = count_key_tiles(keys.length);
    if (args.key_tiles[i] > 1) {
      args.reads_out = true;
      is_exact = is_exact && follows(keys, other);
    }
  }
  args.statistics = statistics;
  args.scale = shape.scale;
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const int blocks =
      count_blocks(queries.num_tiles / queries.tiles_per_line, queries.tiles_per_line, processors, kGroups, 1);
  const size_t shared_bytes = sizeof(Shared) + 2 * (args.key_tiles[0] + args.key_tiles[1]) * kKeyBytes + 2048;
  const auto run = [&](auto pass) {
    constexpr Pass kPass = decltype(pass)::value;
    const auto kernel = backward<Element, kPass>;
    static OncePerDevice once;
    prepare(once, kernel, device);
    if (kPass == kGradient)
      launch_early(kernel, blocks, kGroups * 128, shared_bytes, stream, args);
    else
      kernel<<<blocks, kGroups * 128, shared_bytes, stream>>>(args);
    check(cudaGetLastError(), "dual_stream_attn backward");
  };
  const bool dq = call.dq.data != nullptr;
  if (dq && is_exact) {
    run(std::integral_constant<Pass, kBoth>{});
  } else {
    args.reads_out = false;
    run(std::integral_constant<Pass, kDelta>{});
    if (dq) run(std::integral_constant<Pass, kGradient>{});
  }
}

}  // namespace

void dual_stream_attn_queries(const DualStreamBackward& args, const Queries& queries, float* statistics, int device,
                              cudaStream_t stream) {
  if (args.shape.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(args, queries, statistics, device, stream);
  else
    launch<__half>(args, queries, statistics, device, stream);
}

}  // namespace univid
