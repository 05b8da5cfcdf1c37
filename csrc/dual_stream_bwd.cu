// dual_stream_attn, backward, for Hopper: dQ with the queries' statistics (dual_stream_bwd_dq.cu), then dK and dV by
// blocks that stay with 128 keys, then the sum of what these found.
//
// The keys of both streams lie one behind the other, each stream filled up to a multiple of 16, so that the 16 rows of
// a warp belong to one stream: 77 + 257 keys are 80 + 272, five and a half units of 64. A block has two units, the rows
// of two warpgroups, and takes a range of the tiles of 64 queries that pass by all units: Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ;
// w·Pᵀ and dSᵀ are operands of dV += w·Pᵀ·dO and dK += dSᵀ·Q straight from registers. The third warpgroup is one thread
// that feeds. A weight that is a number waits until the end.
//
// As many blocks as a (clip, head) has pairs of units take the same range of its queries, so that Q and dO come from
// DRAM once. Ranges are equal and may go on into the next (clip, head). Blocks leave sums in float32, in the order of
// their lanes. They are added in the order of the ranges, so that results have the same bits from run to run.
//
// K and V come from registers: a product of 64 x 64 with both operands in shared memory takes all of its bandwidth, and
// the statistics wait.
//
// Registers of a lane: 64 of dK and dV, 64 of S and dP, 16 of P, dS, K and V each, of 232. Shared memory: K and V,
// 32 KB; 6 stages of Q, dO and statistics, 105 KB.
//
// Measured 2026-11-30 on one H200 (B = 2, T = 24, D = 64, bfloat16, 77 + 257 keys, replays of a graph), ms at N/H =
// 2880/5, 720/10, 180/20, 45/20: 0.409, 0.214, 0.122, 0.045; of that dQ, 2026-11-24, 0.203, 0.110, 0.064, 0.022.
#include <algorithm>
#include <cmath>

#include "dual_stream_bwd.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kUnits = 2;  // of a block, each a warpgroup
constexpr int kStages = 6;
constexpr int kPart = 16;  // keys of a warp
constexpr int kPartBytes = kPart * kRowBytes;
constexpr int kUnitParts = 4;
constexpr int kUnitFloats = 64 * 64;  // of dK, and of dV
constexpr int kAtOnce = 4;            // sums on their way to a lane

// Ranges of query tiles, those of all lines, (clip, head), one after the other: range r begins at ⌊r · tiles / count⌋.
// A line has `units` pairs of units: block b takes range ⌊b / units⌋ with pair b mod units. What it finds in a line
// lies at place() of the sums.
struct Ranges {
  int64_t tiles;
  int count;
  int per_line;  // tiles
  int units;     // of a line: pairs, a block each

  __host__ __device__ int64_t begin(int range) const { return tiles * range / count; }
  __host__ __device__ int range_of(int64_t tile) const { return static_cast<int>(((tile + 1) * count - 1) / tiles); }
  __device__ int64_t place(int range, int line, int unit) const { return int64_t{range + line} * units + unit; }
};

struct Arguments {
  Queries queries;
  Ranges ranges;
  TensorMap q, grad, k[2], v[2];
  int parts[2];      // of a stream's keys, 16 each
  bool is_weighted;  // some weight is a tensor
  const float* statistics;
  float* sums;
  float scale_log2;
};

// Of which gradients, and so of which products, there are.
template <bool kDK_, bool kDV_>
struct Config {
  static constexpr bool kDK = kDK_, kDV = kDV_;
  static constexpr int kSums = kDK + kDV;
};

struct Shared {
  alignas(1024) char k[kUnits][kTileBytes];
  alignas(1024) char v[kUnits][kTileBytes];
  alignas(1024) char q[kStages][kTileBytes];
  alignas(1024) char grad[kStages][kTileBytes];
  alignas(16) float statistics[kStages][kStatistics];
  Ring<1> key_ring;
  Ring<kStages> ring;
};

// A block's walk through its range, line by line.
struct Walk {
  int range, unit;
  int64_t at, end;

  __device__ explicit Walk(const Ranges& ranges)
      : range(blockIdx.x / ranges.units),
        unit(blockIdx.x - range * ranges.units),
        at(ranges.begin(range)),
        end(ranges.begin(range + 1)) {}
  __device__ bool more() const { return at < end; }
  __device__ int line(const Ranges& ranges) const { return static_cast<int>(at / ranges.per_line); }
  __device__ int count(const Ranges& ranges) const {
    return static_cast<int>(min(end, int64_t{line(ranges) + 1} * ranges.per_line) - at);
  }
  __device__ void advance(const Ranges& ranges) { at += count(ranges); }
};

__device__ void feed(const Arguments& args, Shared& shared) {
  const Queries& queries = args.queries;
  Cursor<1> key_at;
  Cursor<kStages> at;
  for (Walk walk(args.ranges); walk.more(); walk.advance(args.ranges)) {
    const int line = walk.line(args.ranges);
    const int clip = line / queries.heads, head = line - clip * queries.heads;
    wait(&shared.key_ring.free[0], key_at.round ^ 1);
    uint64_t* filled = &shared.key_ring.filled[0];
    expect(filled, 2 * kUnits * kTileBytes);
    for (int i = 0; i < kUnits * kUnitParts; i++) {
      int part = walk.unit * kUnits * kUnitParts + i;
      const int stream = part >= args.parts[0] && args.parts[1] > 0;
      if (stream) part -= args.parts[0];
      const Box box{part * kPart, head, 0, clip};  // rows that do not exist come as zeros
      load_box(shared.k[0] + i * kPartBytes, args.k[stream], box, filled);
      load_box(shared.v[0] + i * kPartBytes, args.v[stream], box, filled);
    }
    key_at.advance();
    const int count = walk.count(args.ranges);
    int tile = static_cast<int>(walk.at);
    for (int i = 0; i < count; i++, tile++) {
      const Box box = Place(queries, tile).box();
      wait(&shared.ring.free[at.slot], at.round ^ 1);
      filled = &shared.ring.filled[at.slot];
      expect(filled, 2 * kTileBytes + kStatistics * 4);
      load_box(shared.q[at.slot], args.q, box, filled);
      ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, shared.statistics[at.slot],
                         args.statistics + int64_t{tile} * kStatistics, kStatistics * 4, filled);
      load_box(shared.grad[at.slot], args.grad, box, filled);
      at.advance();
    }
  }
}

template <typename Element, class C>
__device__ void consume(const Arguments& args, Shared& shared, int w) {
  const int warp = threadIdx.x / 32 % 4;
  Cursor<1> key_at;
  Cursor<kStages> at;
  float dk[32], dv[32], s[32], dp[32];
  uint32_t k[16], v[16], p[16], ds[16];

  for (Walk walk(args.ranges); walk.more(); walk.advance(args.ranges)) {
    const int count = walk.count(args.ranges);
    const int part = (walk.unit * kUnits + w) * kUnitParts + warp;
    const int offset = part >= args.parts[0] ? kOfStream : 0;  // of the warp's stream, among the statistics
#pragma unroll
    for (int i = 0; i < 32; i++) dk[i] = dv[i] = 0;
    wait(&shared.key_ring.filled[0], key_at.round);
    key_at.advance();
    load_tile(shared.k[w], k, warp, threadIdx.x % 32);
    if constexpr (C::kDK) load_tile(shared.v[w], v, warp, threadIdx.x % 32);
    int held = -1;  // the stage that the products under way still read
    for (int i = 0; i < count; i++) {
      wait(&shared.ring.filled[at.slot], at.round);
      const uint64_t q_tile = tile_descriptor(shared.q[at.slot]), grad_tile = tile_descriptor(shared.grad[at.slot]);
      const float* statistics = shared.statistics[at.slot] + offset;
      float2 logsumexp[8], delta[8];
      load_columns<0, 8>(logsumexp, statistics);  // before the products that keep shared memory busy
      pin(s);
      pin(k);
      wgmma_fence();
      multiply_transposed<Element>(s, k, q_tile);
      wgmma_commit();
      if constexpr (C::kDK) {
        pin(dp);
        pin(v);
        multiply_transposed<Element>(dp, v, grad_tile);
        wgmma_commit();
      }
      if constexpr (C::kDK) load_columns<0, 8>(delta, statistics + kRows);
      wgmma_wait<C::kDK ? 1 : 0>();
      pin(s);
      pin(ds);
      pin(k);
      const uint32_t zero = at.slot >> 8;  // ptxas overwrites an operand that a loop keeps, so the loop makes it anew
#pragma unroll
      for (int j = 0; j < 16; j++) k[j] |= zero;
      pin(k);
      if (held >= 0) arrive_warp(&shared.ring.free[held]);
#pragma unroll
      for (int j = 0; j < 32; j++) {
        const float2 x = logsumexp[j / 4];
        s[j] = exp2_fast(fmaf(s[j], args.scale_log2, j % 2 == 0 ? -x.x : -x.y));
      }
      if (args.is_weighted) {
        float2 weight[8];
        load_columns<0, 8>(weight, statistics + 2 * kRows);
#pragma unroll
        for (int j = 0; j < 32; j++) s[j] *= j % 2 == 0 ? weight[j / 4].x : weight[j / 4].y;
      }
      if constexpr (C::kDV) {
#pragma unroll
        for (int j = 0; j < 16; j++) p[j] = pack<Element>(s[2 * j], s[2 * j + 1]);
        pin(p);
        wgmma_fence();
        multiply_add<Element>(dv, p, grad_tile);
        wgmma_commit();
      }
      if constexpr (C::kDK) {
        wgmma_wait<C::kDV ? 1 : 0>();
        pin(dp);
        pin(v);
#pragma unroll
        for (int j = 0; j < 16; j++) v[j] |= zero;
        pin(v);
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float2 x = delta[j / 2];
          ds[j] = pack<Element>(s[2 * j] * (dp[2 * j] - x.x), s[2 * j + 1] * (dp[2 * j + 1] - x.y));
        }
        pin(ds);
        wgmma_fence();
        multiply_add<Element>(dk, ds, q_tile);
        wgmma_commit();
        if constexpr (C::kDV) {
          wgmma_wait<1>();
          pin(p);
        }
      }
      held = at.slot;
      at.advance();
    }
    wgmma_wait<0>();
    pin(p);
    pin(ds);
    pin(dk);
    pin(dv);
    arrive_warp(&shared.ring.free[held]);
    arrive_warp(&shared.key_ring.free[0]);
    const int64_t place = args.ranges.place(walk.range, walk.line(args.ranges), walk.unit) * kUnits + w;
    float4* to = reinterpret_cast<float4*>(args.sums) + place * C::kSums * (kUnitFloats / 4) + threadIdx.x % 128;
    const auto put = [&](const float (&d)[32]) {
#pragma unroll
      for (int j = 0; j < 8; j++) to[128 * j] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
      to += kUnitFloats / 4;
    };
    if constexpr (C::kDK) put(dk);
    if constexpr (C::kDV) put(dv);
  }
}

template <typename Element, class C>
__global__ void __launch_bounds__((kUnits + 1) * 128, 1) backward_keys(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    shared.key_ring.init(4 * kUnits);
    shared.ring.init(4 * kUnits);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    prefetch_map(args.q);
    prefetch_map(args.grad);
  }
  __syncthreads();
  take_over();
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (w == kUnits) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
    if (threadIdx.x == kUnits * 128) feed(args, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(232));
    consume<Element, C>(args, shared, w);
  }
}

// Where the sums go. By stream: dK, dV; null: not asked for.
struct Results {
  void* to[2][2];
  float factor[2][2];
  int length[2];
};

// Adds up a unit's sums of dK (or dV), as many as there are: four numbers a lane.
template <typename Element>
__global__ void __launch_bounds__(128) add_sums(const __grid_constant__ Results results, const Ranges ranges,
                                                const float4* sums, int num_sums, bool dk, int parts, int heads) {
  const int of_block = blockIdx.x / kUnits, w = blockIdx.x % kUnits, lane = threadIdx.x % 32;
  const int line = of_block / ranges.units, unit = of_block - line * ranges.units;
  const int clip = line / heads, head = line - clip * heads;
  const int which = blockIdx.y + (dk ? 0 : 1), j = blockIdx.z;
  int part = (unit * kUnits + w) * kUnitParts + threadIdx.x / 32;
  const int stream = part >= parts;
  if (stream) part -= parts;
  const int row = part * kPart + lane / 4, length = results.length[stream];
  const int64_t first = int64_t{line} * ranges.per_line;
  int range = ranges.range_of(first);
  const int end = ranges.range_of(first + ranges.per_line - 1) + 1;
  const int64_t next = int64_t{ranges.units} * kUnits * num_sums * (kUnitFloats / 4);  // of one range after another
  const float4* from =
      sums + ((ranges.place(range, line, unit) * kUnits + w) * num_sums + blockIdx.y) * (kUnitFloats / 4) + 128 * j;
  take_over();
  if (part * kPart >= length || results.to[stream][which] == nullptr) return;
  float4 total = {};
  for (; range < end; range += kAtOnce, from += kAtOnce * next) {
    float4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) x[i] = __ldcs(from + min(i, end - 1 - range) * next + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (range + i >= end) continue;
      total.x += x[i].x;
      total.y += x[i].y;
      total.z += x[i].z;
      total.w += x[i].w;
    }
  }
  const float factor = results.factor[stream][which];
  uint32_t* to = static_cast<uint32_t*>(results.to[stream][which]) +
                 ((int64_t{clip} * length + row) * heads + head) * 32 + lane % 4 + 4 * j;
  if (row < length) *to = pack<Element>(total.x * factor, total.y * factor);
  if (row + 8 < length) to[int64_t{8} * heads * 32] = pack<Element>(total.z * factor, total.w * factor);
}

// --- launches --------------------------------------------------------------------------------------------------------

int count_parts(int64_t length) { return static_cast<int>((length + kPart - 1) / kPart); }

int count_units(int parts) { return (parts + kUnits * kUnitParts - 1) / (kUnits * kUnitParts); }

Ranges make_ranges(const Queries& queries, int units, int device) {
  const int lines = queries.num_tiles / queries.tiles_per_line;
  const int ranges = count_blocks(lines, queries.tiles_per_line, std::max(num_processors(device) / units, 1), 1, 4);
  return {queries.num_tiles, ranges, queries.tiles_per_line, units};
}

template <typename Element, class C>
void launch_keys(const DualStreamBackward& call, const Queries& queries, const float* statistics, int device,
                 cudaStream_t stream) {
  const DualStreamShape& shape = call.shape;
  Arguments args{};
  Results results{};
  args.queries = queries;
  const auto query_map = [&](const TensorView& tensor) {
    return tensor_map(tensor, shape.dtype, shape.batch, queries.groups, queries.rows, shape.heads, kRows);
  };
  args.q = query_map(call.q);
  args.grad = query_map(call.grad);
  for (int i = 0; i < 2; i++) {
    const KeyStream& keys = call.streams[i];
    const KeyGradients& gradients = call.gradients[i];
    if (gradients.dk == nullptr && gradients.dv == nullptr) continue;
    const auto key_map = [&](const TensorView& tensor) {
      return tensor_map(tensor, shape.dtype, shape.batch, 1, keys.length, shape.heads, kPart);
    };
    args.k[i] = key_map(keys.k);
    args.v[i] = key_map(keys.v);
    args.parts[i] = count_parts(keys.length);
    args.is_weighted |= keys.weight_type != WeightType::kNumber;
    results.to[i][0] = gradients.dk;
    results.to[i][1] = gradients.dv;
    results.length[i] = static_cast<int>(keys.length);
  }
  for (int i = 0; i < 2; i++) {
    // Where some weight is a tensor, all weights are in the statistics.
    const float number = args.is_weighted ? 1 : call.streams[i].number;
    results.factor[i][0] = number * shape.scale;
    results.factor[i][1] = number;
  }
  args.ranges = make_ranges(queries, count_units(args.parts[0] + args.parts[1]), device);
  args.statistics = statistics;
  args.sums = const_cast<float*>(statistics) + int64_t{queries.num_tiles} * kStatistics;
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const auto kernel = backward_keys<Element, C>;
  static OncePerDevice once;
  prepare(once, kernel, device);
  launch_early(kWhat, kernel, args.ranges.count * args.ranges.units, (kUnits + 1) * 128, sizeof(Shared) + 1024, stream,
               args);

  const auto units = static_cast<unsigned>(args.ranges.tiles / args.ranges.per_line * args.ranges.units);
  launch_early(kWhat, add_sums<Element>, {units * kUnits, C::kSums, kUnitFloats / 4 / 128}, 128, 0, stream, results,
               args.ranges, reinterpret_cast<const float4*>(args.sums), int{C::kSums}, bool{C::kDK}, args.parts[0],
               queries.heads);
}

template <typename Element>
void launch(const DualStreamBackward& call, const Queries& queries, int device, cudaStream_t stream) {
  float* statistics = static_cast<float*>(call.workspace);
  bool dk = false, dv = false;
  for (const KeyGradients& gradients : call.gradients) {
    dk |= gradients.dk != nullptr;
    dv |= gradients.dv != nullptr;
  }
  dual_stream_attn_queries(call, queries, statistics, device, stream);
  if (dk && dv)
    launch_keys<Element, Config<true, true>>(call, queries, statistics, device, stream);
  else if (dk)
    launch_keys<Element, Config<true, false>>(call, queries, statistics, device, stream);
  else if (dv)
    launch_keys<Element, Config<false, true>>(call, queries, statistics, device, stream);
}

}  // namespace

int64_t dual_stream_attn_workspace(const DualStreamShape& shape, bool one_query, int64_t first_length,
                                   int64_t second_length, int device) {
  const DeviceGuard guard(device);
  const Queries queries(shape, one_query);
  const int64_t units = shape.batch * shape.heads * count_units(count_parts(first_length) + count_parts(second_length));
  const int64_t sums = (units + num_processors(device)) * kUnits * 2;
  return 4 * (int64_t{queries.num_tiles} * kStatistics + sums * kUnitFloats);
}

void dual_stream_attn_backward(const DualStreamBackward& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const Queries queries(args.shape, args.one_query);
  if (args.shape.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(args, queries, device, stream);
  else
    launch<__half>(args, queries, device, stream);
}

}  // namespace univid
