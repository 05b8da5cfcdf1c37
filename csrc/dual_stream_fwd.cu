// dual_stream_attn, forward, for Hopper: the keys and values of both streams stay in shared memory, the queries pass
// by.
//
// A (clip, head) has few keys and many queries. A block takes a range of its tiles of 64 queries (and where the range
// goes on into the next (clip, head), reads keys anew); each of kGroups warpgroups takes every kGroups-th of them and
// fetches its queries itself, two tiles ahead, into room that its last results have left. Keys come in tiles of 88,
// those of the second stream behind those of the first: 77 + 257 keys are 1 + 3 tiles with 18 keys to spare. Only a
// stream's last tile has keys to strike out.
//
// A warpgroup has O = or += P·V of one tile of keys and S = Q·Kᵀ of the next under way together; the other warpgroups'
// exponentials run meanwhile. There is one O: at the end of the first stream it is scaled by weight / sum and kept in
// registers until the second has passed.
//
// P = exp2(scale · S - reference), any reference near the row's largest score will do: it is 0, until a tile's sum
// shows that P has outgrown its dtype, or that the first tile of a stream all but vanishes. Then the tile is
// exponentiated again with its maximum as the reference. So there is no search for a maximum as a rule.
//
// Registers of a lane: 44 scores, 24 of P, 32 of O and 32 of the first stream's, of 168. Shared memory: 48 KB of Q and
// results, 22 KB a tile of keys and values: at most 5 tiles, as the backward holds.
//
// Measured 2026-11-23 on one H200 (B = 2, T = 24, D = 64, bfloat16, 77 + 257 keys, replays of a graph; 8192³ product
// 787 TFLOP/s), ms at N/H = 2880/5, 720/10, 180/20, 45/20: 0.182, 0.098, 0.056, 0.019.
#include <algorithm>
#include <cmath>

#include "dual_stream.h"
#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kGroups = 3;  // warpgroups
constexpr int kRows = 64;   // queries of each
constexpr int kKeys = 88;   // of a tile
constexpr int kQSlots = 2;  // tiles of Q
constexpr int kRowBytes = 128;
constexpr int kTileBytes = kRows * kRowBytes;
constexpr int kKeyBytes = kKeys * kRowBytes;
constexpr int kMaxKeyTiles = 5;
constexpr int kPacked = (kKeys + 15) / 16 * 4;  // registers of P, in which keys past the tile are zeros
constexpr int kScores = kKeys / 2;

struct Weight {
  WeightType type;
  float number;
  const void* data;
  int64_t stride_b, stride_t, stride_n;
};

struct Arguments {
  TensorMap q, out, k[2], v[2];
  Weight weight[2];
  float* logsumexp[2];
  int length[2], key_tiles[2];
  int heads, frames, tokens;  // H, T, N
  int groups, rows;           // of a (clip, head): rows in a row of queries, and how many such rows
  int tiles_per_group, tiles_per_line, num_tiles;  // of queries; a line is a (clip, head)
  float scale_log2;
};

struct Shared {
  alignas(1024) char q[kGroups][kQSlots][kTileBytes];  // and, where queries have passed, their results
  uint64_t q_filled[kGroups][kQSlots];
  uint64_t k_filled, v_filled;
  alignas(1024) char keys[];  // kKeyBytes for each tile of K, of V, and 8 rows of zeros
};

// Which queries a tile holds.
struct Place {
  int clip, head, group, row;

  __device__ Place(const Arguments& args, int tile) {
    const int line = tile / args.tiles_per_line;
    tile -= line * args.tiles_per_line;
    group = tile / args.tiles_per_group;
    row = (tile - group * args.tiles_per_group) * kRows;
    clip = line / args.heads;
    head = line - clip * args.heads;
  }
};

__device__ inline float load_weight(const Weight& weight, int clip, int query, int tokens) {
  const unsigned frame = static_cast<unsigned>(query) / static_cast<unsigned>(tokens);
  const int64_t at =
      clip * weight.stride_b + frame * weight.stride_t + (query - static_cast<int>(frame) * tokens) * weight.stride_n;
  if (weight.type == WeightType::kFloat32) return __ldg(static_cast<const float*>(weight.data) + at);
  const uint32_t bits = __ldg(static_cast<const unsigned short*>(weight.data) + at);
  if (weight.type == WeightType::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// The softmax of a lane's part of 64 rows over the tiles of one stream.
template <typename Element>
class Softmax {
 public:
  __device__ explicit Softmax(float scale_log2) : scale_(scale_log2) { restart(); }

  __device__ void restart() {
    reference_[0] = reference_[1] = 0;
    total_[0] = total_[1] = 0;
  }

  // p = exp2(s). `first`: of its stream. Rescales o where a row has outgrown its reference.
  __device__ void exponentiate(const float (&s)[kScores], uint32_t (&p)[kPacked], float (&o)[32], bool first) {
    float sums[2];
    exponentiate(s, p, sums);
    const float least = first ? kLeast : 0.f;
    const auto fits = [&](float sum) { return least <= sum && sum <= kMost; };
    if (!__all_sync(~0u, fits(sums[0]) && fits(sums[1]))) {
      float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < kScores; i++) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], s[i]);
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        peak[r] = row_max(peak[r]) * scale_;
        if (!first) peak[r] = fmaxf(peak[r], reference_[r]);
        factor[r] = first ? 0.f : exp2_fast(reference_[r] - peak[r]);
        reference_[r] = peak[r];
        total_[r] *= factor[r];
      }
      if (!first)
#pragma unroll
        for (int i = 0; i < 32; i++) o[i] *= factor[i / 2 % 2];
      exponentiate(s, p, sums);
    }
    total_[0] += sums[0];
    total_[1] += sums[1];
  }

  // The sum of a row, over its four lanes, and the logsumexp in natural units.
  __device__ void finish(float (&total)[2], float (&logsumexp)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] = row_sum(total_[r]);
      logsumexp[r] = (reference_[r] + __log2f(total[r])) * 0.69314718f;
    }
  }

 private:
  // What a lane's part of a tile may sum to: P keeps its precision, and its products with V stay within float32.
  static constexpr float kMost = std::is_same_v<Element, __half> ? 0x1p14f : 0x1p16f;
  static constexpr float kLeast = std::is_same_v<Element, __half> ? 0x1p-5f : 0x1p-30f;

  __device__ void exponentiate(const float (&s)[kScores], uint32_t (&p)[kPacked], float (&sums)[2]) const {
    sums[0] = sums[1] = 0;
#pragma unroll
    for (int i = 0; i < kScores / 2; i++) {
      const float x = exp2_fast(fmaf(s[2 * i], scale_, -reference_[i % 2]));
      const float y = exp2_fast(fmaf(s[2 * i + 1], scale_, -reference_[i % 2]));
      sums[i % 2] += x + y;
      p[i] = pack<Element>(x, y);
    }
  }

  float scale_;
  float reference_[2];
  float total_[2];
};

// Strikes out the scores of a tile's keys past the first `valid`; by groups of 8 keys.
__device__ inline void mask(float (&s)[kScores], int valid) {
  const int column = threadIdx.x % 4 * 2;
  const auto strike = [&](int group) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (8 * group + column + e % 2 >= valid) s[4 * group + e] = -INFINITY;
  };
  constexpr int kEasy = kKeys / 8 - 2;
  if (valid < 8 * kEasy)
#pragma unroll
    for (int group = 0; group < kEasy; group++) strike(group);
  strike(kEasy);
  strike(kEasy + 1);
}

template <typename Element>
__device__ void attend(const Arguments& args, Shared& shared, int w) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const int key_tiles = args.key_tiles[0] + args.key_tiles[1];
  const int second = args.key_tiles[0];  // the second stream's first tile of keys
  char* const k = shared.keys;
  char* const v = shared.keys + key_tiles * kKeyBytes;
  const int begin = static_cast<int>(int64_t{args.num_tiles} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{args.num_tiles} * (blockIdx.x + 1) / gridDim.x);
  Cursor<kQSlots> q_at;
  Softmax<Element> softmax(args.scale_log2);
  float s[kScores], o[32], first_o[32];
  uint32_t p[kPacked];
#pragma unroll
  for (int i = 0; i < 32; i++) o[i] = first_o[i] = 0;
#pragma unroll
  for (int i = kScores / 2; i < kPacked; i++) p[i] = 0;

  const auto load_queries = [&](int tile, int slot) {
    if (tile >= end) return;
    const Place place(args, tile);
    expect(&shared.q_filled[w][slot], kTileBytes);
    load_box(shared.q[w][slot], args.q, {place.row, place.head, place.group, place.clip}, &shared.q_filled[w][slot]);
  };
  const auto load_keys = [&](int line, const TensorMap(&maps)[2], char* to, uint64_t* filled) {
    const int clip = line / args.heads;
    expect(filled, key_tiles * kKeyBytes);
    for (int i = 0; i < 2; i++)
      for (int tile = 0; tile < args.key_tiles[i]; tile++, to += kKeyBytes)
        load_box(to, maps[i], {tile * kKeys, line - clip * args.heads, 0, clip}, filled);
  };
  const auto start_scores = [&](int tile) {
    pin(s);
    wgmma_fence();
    multiply_transposed<Element>(s, tile_descriptor(shared.q[w][q_at.slot]), tile_descriptor(k + tile * kKeyBytes));
    wgmma_commit();
  };
  const auto start_output = [&](int tile) {
    pin(o);
    pin(p);
    wgmma_fence();
    multiply_maybe_add<Element>(o, p, tile_descriptor(v + tile * kKeyBytes), tile != 0 && tile != second);
    wgmma_commit();
  };
  const auto exponentiate = [&](int tile) {
    const int left = tile < second ? args.length[0] - tile * kKeys : args.length[1] - (tile - second) * kKeys;
    if (left < kKeys) mask(s, left);
    softmax.exponentiate(s, p, o, tile == 0 || tile == second);
  };
  // Writes a stream's logsumexp; makes the factors of its O.
  const auto finish_sums = [&](int query_tile, int stream, float (&factor)[2]) {
    const Place place(args, query_tile);
    float total[2], logsumexp[2];
    softmax.finish(total, logsumexp);
    softmax.restart();
    const int64_t line = (static_cast<int64_t>(place.clip) * args.heads + place.head) * args.groups + place.group;
    const Weight& weight = args.weight[stream];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = place.row + warp * 16 + lane / 4 + 8 * i;
      const int query = place.group * args.rows + min(row, args.rows - 1);
      if (lane % 4 == 0 && row < args.rows) args.logsumexp[stream][line * args.rows + row] = logsumexp[i];
      const float number =
          weight.type == WeightType::kNumber ? weight.number : load_weight(weight, place.clip, query, args.tokens);
      factor[i] = number * __frcp_rn(total[i]);
    }
  };
  const auto store = [&](int query_tile) {
    const Place place(args, query_tile);
    // The tile of o is free once the former copy from it has been read; the thread that started it says so at the
    // barrier. At the second one, all warps have done with the queries of this tile.
    const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + w) : "memory"); };
    meet();
    store_tile<Element>(shared.q[w][q_at.slot ^ 1], o, warp, lane);
    ptx::fence_proxy_async(ptx::space_shared);
    meet();
    if (leader) {
      store_box(args.out, {place.row, place.head, place.group, place.clip}, shared.q[w][q_at.slot ^ 1]);
      ptx::cp_async_bulk_commit_group();
    }
  };

  if (leader)
    for (int i = 0; i < kQSlots; i++) load_queries(begin + w + i * kGroups, i);
  int tile = begin + w;  // of queries
  const int first_tile = tile;
  uint32_t round = 0;
  for (int first = begin; first < end; round ^= 1) {
    const int line = first / args.tiles_per_line;
    const int stop = min(end, (line + 1) * args.tiles_per_line);
    if (first > begin) __syncthreads();
    if (threadIdx.x == 0) {
      load_keys(line, args.k, k, &shared.k_filled);
      load_keys(line, args.v, v, &shared.v_filled);
    }
    first = stop;
    if (tile >= stop) continue;
    wait(&shared.k_filled, round);
    wait(&shared.q_filled[w][q_at.slot], q_at.round);
    start_scores(0);
    wgmma_wait<0>();
    pin(s);
    exponentiate(0);
    wait(&shared.v_filled, round);
    int key_tile = 0;
    while (true) {
      // P of key_tile is there. After the last the next tile of queries follows, if there is one: if not, its scores
      // are made of what lies there, and are not used.
      if (key_tile == 0 && leader && tile > first_tile) {
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
        load_queries(tile + kGroups, q_at.slot ^ 1);
      }
      const int next = key_tile + 1 == key_tiles ? 0 : key_tile + 1;
      if (next == 0) {
        q_at.advance();
        if (tile + kGroups < stop) wait(&shared.q_filled[w][q_at.slot], q_at.round);
      }
      start_scores(next);
      start_output(key_tile);
      float factor[2] = {0, 0};
      const bool ends_first = next != 0 && next == second;
      if (next == 0 || ends_first) finish_sums(tile, key_tile >= second, factor);
      wgmma_wait<0>();
      pin(s);
      pin(o);
      pin(p);
      if (ends_first) {
#pragma unroll
        for (int i = 0; i < 32; i++) first_o[i] = o[i] * factor[i / 2 % 2];
      }
      if (next == 0) {
#pragma unroll
        for (int i = 0; i < 32; i++) o[i] = fmaf(o[i], factor[i / 2 % 2], first_o[i]);
        store(tile);
        tile += kGroups;
        if (tile >= stop) break;
      }
      key_tile = next;
      exponentiate(key_tile);
    }
  }
  if (leader) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
}

template <typename Element>
__global__ void __launch_bounds__(kGroups * 128, 1) forward(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (auto& slots : shared.q_filled)
      for (uint64_t& barrier : slots) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&shared.k_filled, 1);
    ptx::mbarrier_init(&shared.v_filled, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (const TensorMap* map : {&args.q, &args.k[0], &args.v[0], &args.k[1], &args.v[1], &args.out})
      prefetch_map(*map);
  }
  // P of a tile has 96 columns, the last 8 being zeros: what they meet behind the last tile of V must be finite.
  if (threadIdx.x < 8 * kRowBytes / 16)
    reinterpret_cast<uint4*>(shared.keys + 2 * (args.key_tiles[0] + args.key_tiles[1]) * kKeyBytes)[threadIdx.x] = {};
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  attend<Element>(args, shared, __shfl_sync(~0u, threadIdx.x / 128, 0));
}

int key_tiles(int64_t length) { return static_cast<int>((length + kKeys - 1) / kKeys); }

// How many blocks share the tiles of queries, in contiguous ranges. A round of a block's warpgroups counts 2, reading
// keys 1.
int count_blocks(int64_t lines, int64_t tiles_per_line, int processors) {
  const int64_t tiles = lines * tiles_per_line;
  const auto cost = [&](int64_t blocks) {
    const int64_t share = (tiles + blocks - 1) / blocks;
    const int64_t crossed = blocks % lines == 0 ? 0 : 1 + (share - 1) / tiles_per_line;
    return 2 * ((share + kGroups - 1) / kGroups) + crossed;
  };
  const int64_t all = std::min<int64_t>(tiles, processors);
  const int64_t aligned = all / lines * lines;
  return static_cast<int>(aligned > 0 && cost(aligned) <= cost(all) ? aligned : all);
}

template <typename Element>
void launch(const DualStreamForward& call, int device, cudaStream_t stream) {
  const DualStreamShape& shape = call.shape;
  const int64_t groups = call.one_query ? 1 : shape.frames;
  const int64_t rows = shape.frames * shape.tokens / groups;
  const int64_t tiles_per_group = (rows + kRows - 1) / kRows;
  const int64_t lines = shape.batch * shape.heads;
  if (lines * groups * tiles_per_group > INT32_MAX / 2) throw std::invalid_argument("too many queries");

  Arguments args{};
  const auto query_map = [&](const TensorView& tensor) {
    return tensor_map(tensor, shape.dtype, shape.batch, groups, rows, shape.heads, kRows);
  };
  constexpr int kDim = 64;
  const int64_t stride_n = shape.heads * kDim;
  args.q = query_map(call.q);
  args.out = query_map({call.out, shape.frames * shape.tokens * stride_n, rows * stride_n, stride_n, kDim});
  for (int i = 0; i < 2; i++) {
    const KeyStream& keys = call.streams[i];
    if (keys.length == 0) continue;
    const auto key_map = [&](const TensorView& tensor) {
      return tensor_map(tensor, shape.dtype, shape.batch, 1, keys.length, shape.heads, kKeys);
    };
    args.k[i] = key_map(keys.k);
    args.v[i] = key_map(keys.v);
    args.weight[i] = {keys.weight_type,     keys.number,          keys.weight,
                      keys.weight_stride_b, keys.weight_stride_t, keys.weight_stride_n};
    args.logsumexp[i] = keys.logsumexp;
    args.length[i] = static_cast<int>(keys.length);
    args.key_tiles[i] = key_tiles(keys.length);
  }
  args.heads = static_cast<int>(shape.heads);
  args.frames = static_cast<int>(shape.frames);
  args.tokens = static_cast<int>(shape.tokens);
  args.groups = static_cast<int>(groups);
  args.rows = static_cast<int>(rows);
  args.tiles_per_group = static_cast<int>(tiles_per_group);
  args.tiles_per_line = static_cast<int>(groups * tiles_per_group);
  args.num_tiles = static_cast<int>(lines * args.tiles_per_line);
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const auto kernel = forward<Element>;
  static OncePerDevice once;
  prepare(once, kernel, device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const size_t shared_bytes = sizeof(Shared) + 2 * (args.key_tiles[0] + args.key_tiles[1]) * kKeyBytes + 2048;
  const int blocks = count_blocks(lines, args.tiles_per_line, processors);
  kernel<<<blocks, kGroups * 128, shared_bytes, stream>>>(args);
  check(cudaGetLastError(), "dual_stream_attn forward");
}

}  // namespace

bool dual_stream_attn_fits(int64_t first_length, int64_t second_length) {
  return key_tiles(first_length) + key_tiles(second_length) <= kMaxKeyTiles;
}

void dual_stream_attn_forward(const DualStreamForward& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (args.shape.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(args, device, stream);
  else
    launch<__half>(args, device, stream);
}

}  // namespace univid
