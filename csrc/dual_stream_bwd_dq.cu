// dual_stream_attn, backward, for Hopper: dQ and every query's statistics, by blocks that stay with the keys of a
// (clip, head) and let its queries pass by, as in the forward.
//
// Of a stream, with P its softmax before the weight w: dP = dO·Vᵀ, D = rowsum(P∘dP), dS = P∘(w·dP - w·D), dQ = scale ·
// Σ dS·K over both. A warpgroup has dQ += dS·K of one tile of keys, S = Q·Kᵀ and dP of the next under way together, and
// makes the next dS, in the other of two operands, while dQ still runs. As in the forward the tiles of keys are counted
// at compile time (C), and the queries' statistics are fetched a tile ahead. D must be known before the first dS of its
// stream:
//
// * of a stream of one tile of keys it is summed there and then;
// * of a longer one it follows from rowsum(dO∘O), the sum of w·D over the streams, if that is exact enough: O being
//   rounded, the stream's weight must be a number, and not small beside the other's;
// * else a pass of its own, over scores and dP alone, makes it.
//
// Registers of a lane: 44 of S and dP each, 24 of dS twice, 32 of dQ. Shared memory: Q, dO and O twice, 96 KB; 22 KB a
// tile of keys and values: at most 4 tiles. Measured: dual_stream_bwd.cu.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

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
  int length[2];
  int index[2];    // of the streams, among the statistics
  bool reads_out;  // the D of some stream follows from O
  float scale, scale_log2;
};

struct Tiles {
  char q[kTileBytes], grad[kTileBytes], out[kTileBytes];
};

template <class C>
struct Shared {
  alignas(1024) Tiles tiles[kGroups][kSlots];
  alignas(1024) char v[C::kAll][kKeyBytes];
  alignas(1024) char k[C::kAll][kKeyBytes];
  char zeros[8 * kRowBytes];  // dS of a tile has 96 columns, the last 8 being zeros: what they meet must be finite
  uint64_t filled[kGroups][kSlots];
  uint64_t keys_filled;
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

template <typename Element, Pass kPass, class C>
__device__ void pass(const Arguments& args, Shared<C>& shared, int w) {
  constexpr bool kDQ = kPass != kDelta;
  const Queries& queries = args.queries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const int begin = static_cast<int>(int64_t{queries.num_tiles} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{queries.num_tiles} * (blockIdx.x + 1) / gridDim.x);
  const uint64_t k_tile = tile_descriptor(shared.k), v_tile = tile_descriptor(shared.v);
  Cursor<kSlots> at;
  Row row;
  float s[kScores], dp[kScores], dq[32];
  float sums[2] = {0, 0};   // of P∘dP, as far as the stream's tiles have passed
  float shared_d[2] = {};   // w·D of the first stream
  uint32_t ds[2][kPacked];  // of even tiles of keys and of odd ones
#pragma unroll
  for (int i = kScores / 2; i < kPacked; i++) ds[0][i] = ds[1][i] = 0;

  const auto load_queries = [&](const Place& place, int slot) {
    Tiles& tiles = shared.tiles[w][slot];
    uint64_t* filled = &shared.filled[w][slot];
    expect(filled, (2 + args.reads_out) * kTileBytes);
    load_box(tiles.q, args.q, place.box(), filled);
    load_box(tiles.grad, args.grad, place.box(), filled);
    if (args.reads_out) load_box(tiles.out, args.out, place.box(), filled);
  };
  const auto start_scores = [&](int key_tile) {
    if constexpr (kDQ) {
#pragma unroll
      for (int i = 0; i < kScores; i++) s[i] = dp[i] = 0;  // makes no code; without it ptxas keeps the former
    } else {
      pin(s);  // here it is the zeros that it would keep
      pin(dp);
    }
    wgmma_fence();
    const Tiles& tiles = shared.tiles[w][at.slot];
    multiply_transposed<Element>(s, tile_descriptor(tiles.q), k_tile + key_tile * (kKeyBytes / 16));
    multiply_transposed<Element>(dp, tile_descriptor(tiles.grad), v_tile + key_tile * (kKeyBytes / 16));
    wgmma_commit();
  };
  const auto start_dq = [&](int key_tile) {
    pin(dq);
    wgmma_fence();
    multiply_maybe_add<Element>(dq, ds[key_tile % 2], k_tile + key_tile * (kKeyBytes / 16), key_tile != 0);
    wgmma_commit();
  };
  // The logsumexp of a lane's two queries, on their way long before they are needed.
  const auto fetch = [&](const Place& place, int stream, float (&logsumexp)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = min(place.row + warp * 16 + lane / 4 + 8 * i, queries.rows - 1);
      logsumexp[i] = args.logsumexp[stream][place.index(queries, query)];
    }
  };
  const auto statistics_of = [&](const Place& place, int stream) {
    return args.statistics + int64_t{place.tile(queries)} * kStatistics + args.index[stream] * kOfStream;
  };
  // Of the stream that begins with a tile of keys.
  const auto read_row = [&](const Place& place, int stream, const float (&logsumexp)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int in_tile = warp * 16 + lane / 4 + 8 * i;
      const int query = min(place.row + in_tile, queries.rows - 1);
      row.logsumexp[i] = place.row + in_tile < queries.rows ? logsumexp[i] * static_cast<float>(M_LOG2E) : INFINITY;
      row.weight[i] = args.weight[stream].at(queries, place, query);
      if (kPass == kGradient) row.delta[i] = statistics_of(place, stream)[kRows + in_tile];
    }
  };
  const auto write_row = [&](const Place& place, int stream, const float (&delta)[2]) {
    if (lane % 4 != 0) return;
    float* to = statistics_of(place, stream);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int in_tile = warp * 16 + lane / 4 + 8 * i, query = place.row + in_tile;
      const bool exists = query < queries.rows;
      to[in_tile] = row.logsumexp[i];
      to[kRows + in_tile] = exists ? delta[i] : 0;
      to[2 * kRows + in_tile] = exists ? row.weight[i] : 0;
      if (exists && args.delta[stream] != nullptr) args.delta[stream][place.index(queries, query)] = delta[i];
    }
  };
  // S and dP of a tile of keys are there; `real`: and queries that they are of.
  const auto digest = [&](auto key_tile, const Place& place, bool real) {
    constexpr int kTile = decltype(key_tile)::value, kStream = C::stream(kTile);
    constexpr bool kStarts = C::starts(kTile), kEnds = C::ends(kTile);
    if constexpr (kEnds) mask(s, args.length[kStream] - C::place(kTile) * kKeys);
#pragma unroll
    for (int i = 0; i < kScores; i++) s[i] = exp2_fast(fmaf(s[i], args.scale_log2, -row.logsumexp[i / 2 % 2]));
    if constexpr (kPass == kDelta || (kPass == kBoth && C::of_stream(kStream) == 1)) {
      if (kStarts) sums[0] = sums[1] = 0;
#pragma unroll
      for (int i = 0; i < kScores; i++) sums[i / 2 % 2] = fmaf(s[i], dp[i], sums[i / 2 % 2]);
      if constexpr (kEnds) {
        float delta[2];
#pragma unroll
        for (int r = 0; r < 2; r++) row.delta[r] = delta[r] = row_sum(sums[r]);
        if (real) write_row(place, kStream, delta);
      }
    } else if constexpr (kPass == kBoth && kStarts) {
      float product[2], delta[2];
      multiply_rows<Element>(shared.tiles[w][at.slot], product, warp, lane);
#pragma unroll
      for (int r = 0; r < 2; r++)
        row.delta[r] = delta[r] = __fdividef(product[r] - (kStream ? shared_d[r] : 0), row.weight[r]);
      if (real) write_row(place, kStream, delta);
    }
    if constexpr (kDQ) {
      const float shift[2] = {-row.weight[0] * row.delta[0], -row.weight[1] * row.delta[1]};
      if (kPass == kBoth && kTile == 0) shared_d[0] = -shift[0], shared_d[1] = -shift[1];
#pragma unroll
      for (int i = 0; i < kScores / 2; i++)
        ds[kTile % 2][i] = pack<Element>(s[2 * i] * fmaf(dp[2 * i], row.weight[i % 2], shift[i % 2]),
                                         s[2 * i + 1] * fmaf(dp[2 * i + 1], row.weight[i % 2], shift[i % 2]));
    }
  };
  // Into the room of the queries that have passed.
  const auto store = [&](const Place& place) {
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
        store_box(args.dq, place.box(), room);
        ptx::cp_async_bulk_commit_group();
      }
    }
  };

  int first = begin;  // tile of queries of a line
  for (uint32_t round = 0; first < end; round ^= 1) {
    const Share share = Share::of<kGroups>(queries, first, end, w);
    int left = share.left;
    Place place = share.place;
    if (first > begin) {
      if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());  // results lie where queries go
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      expect(&shared.keys_filled, sizeof shared.k + sizeof shared.v);
      for (int i = 0; i < C::kAll; i++) {
        const Box box{C::place(i) * kKeys, place.head, 0, place.clip};
        load_box(shared.k[i], args.k[C::stream(i)], box, &shared.keys_filled);
        load_box(shared.v[i], args.v[C::stream(i)], box, &shared.keys_filled);
      }
    }
    first = share.stop;
    if (left <= 0) continue;
    if (leader) {
      load_queries(place, at.slot);
      if (left > 1) load_queries(place.after(queries, kGroups), at.slot ^ 1);
    }
    float of_first[2], of_second[2] = {};  // logsumexps of the streams of the next tile
    fetch(place, 0, of_first);
    if constexpr (C::kSecond > 0) fetch(place, 1, of_second);
    read_row(place, 0, of_first);
    wait(&shared.keys_filled, round);
    wait(&shared.filled[w][at.slot], at.round);
    start_scores(0);
    wgmma_wait<0>();
    pin(s);
    pin(dp);
    digest(std::integral_constant<int, 0>{}, place, true);
    for (bool starts = true;; starts = false) {
      // dS of the first tile of keys is there.
      const Place next_place = place.after(queries, kGroups);
      if (left > 1) {
        if (leader && !starts) {
          ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
          load_queries(next_place, at.slot ^ 1);
        }
        fetch(next_place, 0, of_first);
      }
      // Until dS of tile kNext is there.
      const auto step = [&](auto tile, auto next, const Place& to, bool real) {
        constexpr int kTile = decltype(tile)::value, kNext = decltype(next)::value;
        pin(sums);  // the former scores have been read
        if constexpr (kDQ) pin(ds[kTile % 2]);
        start_scores(kNext);
        if constexpr (kDQ) start_dq(kTile);
        if constexpr (C::starts(kNext))
          if (real) read_row(to, C::stream(kNext), C::stream(kNext) ? of_second : of_first);
        if constexpr (C::starts(kNext) && C::stream(kNext) == 1)
          if (left > 1) fetch(next_place, 1, of_second);
        constexpr bool kTogether = kDQ && kTile % 2 != kNext % 2;
        wgmma_wait<kTogether>();
        pin(s);
        pin(dp);
        if constexpr (!kTogether) {
          pin(dq);
          pin(ds[kTile % 2]);
        }
        digest(next, to, real);
        if constexpr (kTogether) {
          wgmma_wait<0>();
          pin(dq);
          pin(ds[kTile % 2]);
        }
      };
      [&]<int... kTile>(std::integer_sequence<int, kTile...>) {
        (step(std::integral_constant<int, kTile>{}, std::integral_constant<int, kTile + 1>{}, place, true), ...);
      }(std::make_integer_sequence<int, C::kAll - 1>{});
      // The last tile of keys, and the next queries' first scores. Where none follow they are made of what lies there,
      // and are not used.
      at.advance();
      if (--left > 0) wait(&shared.filled[w][at.slot], at.round);
      step(std::integral_constant<int, C::kAll - 1>{}, std::integral_constant<int, 0>{}, next_place, left > 0);
      store(place);
      if (left == 0) break;
      place = next_place;
    }
  }
  if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
}

template <typename Element, Pass kPass, class C>
__global__ void __launch_bounds__(kGroups * 128, 1) backward(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (auto& slots : shared.filled)
      for (uint64_t& barrier : slots) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&shared.keys_filled, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (const TensorMap* map : {&args.q, &args.grad, &args.k[0], &args.v[0]}) prefetch_map(*map);
  }
  if (threadIdx.x < sizeof shared.zeros / 16) reinterpret_cast<uint4*>(shared.zeros)[threadIdx.x] = {};
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  take_over();
  pass<Element, kPass, C>(args, shared, __shfl_sync(~0u, threadIdx.x / 128, 0));
}

// Whether a stream's D follows exactly enough from rowsum(dO∘O).
bool follows(const KeyStream& stream, const KeyStream& other) {
  if (stream.weight_type != WeightType::kNumber) return false;
  return other.length == 0 || (other.weight_type == WeightType::kNumber && count_key_tiles(other.length) == 1 &&
                               std::abs(other.number) <= 2 * std::abs(stream.number));
}

template <typename Element, class C>
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
    if (C::of_stream(i) > 1) {
      args.reads_out = true;
      is_exact = is_exact && follows(keys, other);
    }
  }
  args.statistics = statistics;
  args.scale = shape.scale;
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const int blocks = count_blocks(queries.num_tiles / queries.tiles_per_line, queries.tiles_per_line,
                                  num_processors(device), kGroups, 1);
  const size_t shared_bytes = sizeof(Shared<C>) + 1024;
  const auto run = [&](auto pass) {
    constexpr Pass kPass = decltype(pass)::value;
    const auto kernel = backward<Element, kPass, C>;
    static OncePerDevice once;
    prepare(once, kernel, device);
    launch_early(kWhat, kernel, blocks, kGroups * 128, shared_bytes, stream, args);
  };
  const bool dq = call.dq.data != nullptr;
  if (dq && is_exact) {
    run(std::integral_constant<Pass, kBoth>{});
  } else {
    args.reads_out = false;
    run(std::integral_constant<Pass, kDelta>{});
    if constexpr (C::of_stream(0) > 1 || C::of_stream(1) > 1)  // else it is exact
      if (dq) run(std::integral_constant<Pass, kGradient>{});
  }
}

template <typename Element>
void choose(const DualStreamBackward& call, const Queries& queries, float* statistics, int device,
            cudaStream_t stream) {
  const int tiles[2] = {count_key_tiles(call.streams[0].length), count_key_tiles(call.streams[1].length)};
  choose_key_tiles(std::max(tiles[0], tiles[1]), tiles[1] != 0, [&](auto longer, auto has_two) {
    using Tiles = std::conditional_t<has_two.value, KeyTiles<1, longer.value>, KeyTiles<longer.value, 0>>;
    launch<Element, Tiles>(call, queries, statistics, device, stream);
  });
}

}  // namespace

void dual_stream_attn_queries(const DualStreamBackward& args, const Queries& queries, float* statistics, int device,
                              cudaStream_t stream) {
  if (args.shape.dtype == DType::kBFloat16)
    choose<__nv_bfloat16>(args, queries, statistics, device, stream);
  else
    choose<__half>(args, queries, statistics, device, stream);
}

}  // namespace univid
