// pyramid_st_attn, backward, for Hopper.
//
// Launches: the statistics of the queries (and zeros in a float32 dQ); dK and dV by blocks that stay with their keys,
// which add to dQ on the way (pyramid_bwd_keys.cuh); dQ to its dtype. Deterministic, or where not all of dQ, dK and dV
// are asked for, dQ has a kernel of its own (pyramid_bwd_dq.cu).
//
// Measured 2026-11-30 on one H200 (B = 2, T = 24, D = 64, bfloat16; 8192³ product 707), TFLOP/s of 2.5 forwards at
// N/H/R = 2880/5/3, 720/10/6, 180/20/12, 45/20/24 with pyramid() tables: 511, 464, 442, 372; deterministic 413, 398,
// 347, 296. After rests, the product at 817, an earlier version took 525 to 538 at the first.
#include <algorithm>
#include <cmath>

#include "pyramid_bwd_keys.cuh"

namespace univid {
namespace {

// --- before and after ------------------------------------------------------------------------------------------------

// A tile of queries, of a grid in which heads, neighbours in memory, come first.
struct QueryTile {
  int clip, head, group, row;
  int64_t line;   // (clip, head, group)
  int64_t index;  // as QueryTiles counts

  __device__ QueryTile(int heads, int groups, int per_group) {
    int i = blockIdx.x;
    head = i % heads;
    i /= heads;
    row = i % per_group * kUnit;
    i /= per_group;
    group = i % groups;
    clip = i / groups;
    line = (int64_t{clip} * heads + head) * groups + group;
    index = line * per_group + row / kUnit;
  }
};

// Statistics of the queries, zeros in dQ, and counters at their start. Eight lanes have a query.
template <typename Element>
__global__ void __launch_bounds__(256)
    prepare_queries(const Element* out, const TensorView grad, const float* logsumexp, float* statistics, float4* dq,
                    int* counters, int heads, int groups, int rows, int per_group) {
  take_over();
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < kCounters; i += 256) counters[i] = 0;
  const QueryTile tile(heads, groups, per_group);
  statistics += tile.index * kStatistics;
#pragma unroll
  for (int first = 0; first < kUnit; first += 32) {
    const int i = first + threadIdx.x / 8, row = tile.row + i, d = threadIdx.x % 8 * 8;
    float delta = 0;
    if (row < rows) {
      const Element* o = out + (((int64_t{tile.clip} * groups + tile.group) * rows + row) * heads + tile.head) * 64 + d;
      const Element* g = static_cast<const Element*>(grad.data) + tile.clip * grad.stride_b +
                         tile.group * grad.stride_t + row * grad.stride_n + tile.head * grad.stride_h + d;
      const uint4 a = *reinterpret_cast<const uint4*>(o), b = *reinterpret_cast<const uint4*>(g);
#pragma unroll
      for (int j = 0; j < 8; j++)
        delta += static_cast<float>(reinterpret_cast<const Element*>(&a)[j]) *
                 static_cast<float>(reinterpret_cast<const Element*>(&b)[j]);
    }
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
    if (threadIdx.x % 8 == 0) {
      const float l = row < rows ? logsumexp[tile.line * rows + row] * static_cast<float>(M_LOG2E) : INFINITY;
      statistics[i] = l == -INFINITY ? INFINITY : l;
      statistics[kUnit + i] = delta;
    }
  }
  if (dq != nullptr)
#pragma unroll
    for (int i = 0; i < kTileFloats / 4; i += 256) dq[tile.index * (kTileFloats / 4) + i + threadIdx.x] = {0, 0, 0, 0};
}

// dQ in its dtype.
template <typename Element>
__global__ void __launch_bounds__(128) finish_dq(const __grid_constant__ TensorMap to, const float4* dq, float scale,
                                                 int heads, int groups, int per_group) {
  __shared__ alignas(1024) char shared[kTileBytes];
  take_over();
  const QueryTile tile(heads, groups, per_group);
  float d[32];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float4 x = __ldcs(dq + tile.index * (kTileFloats / 4) + 128 * j + threadIdx.x);
    d[4 * j] = x.x * scale;
    d[4 * j + 1] = x.y * scale;
    d[4 * j + 2] = x.z * scale;
    d[4 * j + 3] = x.w * scale;
  }
  store_tile<Element>(shared, d, threadIdx.x / 32, threadIdx.x % 32);
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    store_box(to, {tile.row, tile.head, tile.group, tile.clip}, shared);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

// One kernel makes all three gradients; otherwise dQ has its own.
bool is_fused(bool dq, bool dk, bool dv, bool deterministic) { return dq && dk && dv && !deterministic; }

// Keys that lie in one list: those of a frame, or of all frames.
struct KeyLists {
  int64_t count, rows;
  int64_t whole_tiles;  // of a list
  bool has_rest;

  KeyLists(const PyramidShape& shape, bool flat)
      : count(flat ? 1 : shape.key_frames), rows(shape.key_frames * shape.key_tokens / count) {
    const int64_t left = rows % kKeys;
    has_rest = 0 < left && left <= kUnit;
    whole_tiles = rows / kKeys + (left > kUnit);
  }
  // How many are read where all rows are equal, unless some entries are equal or do not exist.
  int64_t read(const PyramidShape& shape) const { return std::min<int64_t>(count, shape.num_refs); }
  int64_t tiles(int64_t lists) const { return lists * whole_tiles + (has_rest ? (lists + 1) / 2 : 0); }
};

Split split_of(const PyramidShape& shape, const KeyLists& lists, bool one_query, int device) {
  if (!one_query) return {};
  const int64_t clip_heads = shape.batch * shape.heads;
  return split_last_round(clip_heads * lists.tiles(lists.read(shape)), QueryTiles(shape, one_query).per_group,
                          num_processors(device));
}

// The parts of the workspace.
struct Workspace {
  float *statistics, *dq;
  int* counters;  // kCounters: the next tile; for the warpgroups of each tile that is split, how many parts are done
  float* parts;

  Workspace(const PyramidBackward& call, const QueryTiles& queries, bool fused)
      : statistics(static_cast<float*>(call.workspace)),
        dq(fused ? statistics + queries.count * kStatistics : nullptr),
        counters(reinterpret_cast<int*>(statistics + queries.count * (kStatistics + (fused ? kTileFloats : 0)))),
        parts(reinterpret_cast<float*>(counters + kCounters)) {}
};

bool is_flat(const PyramidShape& shape, const TensorView& tensor) {
  return tensor.data == nullptr || (tensor.stride_n != 0 && tensor.stride_t == shape.key_tokens * tensor.stride_n);
}

// Where fewer frames are listed than there are, tiles across frames would mix those that are read with others.
bool is_flat(const PyramidBackward& call) {
  const PyramidShape& shape = call.shape;
  return call.equal_rows && shape.num_refs >= shape.key_frames && is_flat(shape, call.k) && is_flat(shape, call.v) &&
         is_flat(shape, call.dk) && is_flat(shape, call.dv) && shape.key_frames * shape.key_tokens <= INT32_MAX;
}

template <typename Element, class C>
void launch_keys(const PyramidBackward& call, const QueryTiles& queries, const Workspace& workspace, int device,
                 cudaStream_t stream) {
  const PyramidShape& shape = call.shape;
  const KeyLists lists(shape, is_flat(call));
  const auto map = [&](const TensorView& tensor, int64_t frames, int64_t tokens) {
    return tensor_map(tensor, shape.dtype, shape.batch, frames, tokens, shape.heads, kUnit);
  };
  Arguments args{};
  args.q = map(call.q, queries.groups, queries.rows);
  args.grad = map(call.grad, queries.groups, queries.rows);
  args.k = map(call.k, lists.count, lists.rows);
  args.v = map(call.v, lists.count, lists.rows);
  if (C::kDK) args.dk = map(call.dk, lists.count, lists.rows);
  if (C::kDV) args.dv = map(call.dv, lists.count, lists.rows);
  args.inverse = call.inverse;
  args.inverse_stride_b = call.inverse_stride_b;
  args.statistics = workspace.statistics;
  args.dq = workspace.dq;
  args.counters = workspace.counters;
  args.parts = workspace.parts;
  args.split = split_of(shape, lists, call.one_query, device);
  args.clips = static_cast<int>(shape.batch);
  args.heads = static_cast<int>(shape.heads);
  args.key_frames = static_cast<int>(shape.key_frames);
  args.key_tokens = static_cast<int>(shape.key_tokens);
  args.lists = static_cast<int>(lists.count);
  args.key_rows = static_cast<int>(lists.rows);
  args.query_groups = static_cast<int>(queries.groups);
  args.query_rows = static_cast<int>(queries.rows);
  args.query_tiles = static_cast<int>(queries.per_group);
  args.has_rest = lists.has_rest;
  args.whole_tiles = static_cast<int>(lists.whole_tiles);
  // Half of the lists, a quarter, and what is left; where all rows are equal, those that are read, and the others.
  const int64_t quarter = (lists.count + 7) / 8 * 2;
  const int64_t first = call.equal_rows ? lists.read(shape) : std::min(2 * quarter, lists.count);
  const int64_t next = call.equal_rows ? lists.count - first : quarter;
  args.first_lists = static_cast<int>(first);
  args.next_lists = static_cast<int>(next);
  int64_t num_tiles = lists.tiles(first);
  for (int64_t rank = first; rank < lists.count; rank += next)
    num_tiles += lists.tiles(std::min(next, lists.count - rank));
  num_tiles *= shape.batch * shape.heads;
  if (num_tiles > INT32_MAX / 2) throw std::invalid_argument("too many keys");
  args.num_tiles = static_cast<int>(num_tiles);
  args.equal_rows = call.equal_rows;
  args.scale = shape.scale;
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const auto kernel = backward<Element, C>;
  static OncePerDevice once;
  prepare(once, kernel, device);
  const int launched = args.num_tiles + args.split.count * (args.split.parts - 1);
  launch_early(kWhat, kernel, std::min(launched, num_processors(device)), C::kThreads, sizeof(Shared<C>) + 1024, stream,
               args);
}

template <typename Element>
void launch(const PyramidBackward& call, int device, cudaStream_t stream) {
  const PyramidShape& shape = call.shape;
  const QueryTiles queries(shape, call.one_query);
  const bool dq = call.dq.data != nullptr, dk = call.dk.data != nullptr, dv = call.dv.data != nullptr;
  const bool fused = is_fused(dq, dk, dv, call.deterministic);
  const Workspace workspace(call, queries, fused);
  const int heads = static_cast<int>(shape.heads), groups = static_cast<int>(queries.groups),
            rows = static_cast<int>(queries.rows), per_group = static_cast<int>(queries.per_group);
  static OncePerDevice once;
  load(once, device, prepare_queries<Element>, finish_dq<Element>);
  launch_early(kWhat, prepare_queries<Element>, static_cast<unsigned>(queries.count), 256, 0, stream,
               static_cast<const Element*>(call.out), call.grad, call.logsumexp, workspace.statistics,
               reinterpret_cast<float4*>(workspace.dq), workspace.counters, heads, groups, rows, per_group);
  if (fused) {
    launch_keys<Element, Config<true, true, true>>(call, queries, workspace, device, stream);
    const TensorMap map =
        tensor_map(call.dq, shape.dtype, shape.batch, queries.groups, queries.rows, shape.heads, kUnit);
    launch_early(kWhat, finish_dq<Element>, static_cast<unsigned>(queries.count), 128, 0, stream, map,
                 reinterpret_cast<const float4*>(workspace.dq), shape.scale, heads, groups, per_group);
    return;
  }
  if (dk && dv)
    launch_keys<Element, Config<false, true, true>>(call, queries, workspace, device, stream);
  else if (dk)
    launch_keys<Element, Config<false, true, false>>(call, queries, workspace, device, stream);
  else if (dv)
    launch_keys<Element, Config<false, false, true>>(call, queries, workspace, device, stream);
  if (dq) pyramid_st_attn_dq(call, workspace.statistics, device, stream);
}

}  // namespace

int64_t pyramid_st_attn_workspace(const PyramidShape& shape, bool one_query, bool dq, bool dk, bool dv,
                                  bool deterministic, int device) {
  const int floats = kStatistics + (is_fused(dq, dk, dv, deterministic) ? kTileFloats : 0);
  int parts = 0;
  if (dk || dv)
    for (const bool flat : {false, true}) {
      const Split split = split_of(shape, KeyLists(shape, flat), one_query, device);
      parts = std::max(parts, split.count * split.parts);
    }
  return (QueryTiles(shape, one_query).count * floats + kCounters + int64_t{parts} * kPartFloats) * 4;
}

void pyramid_st_attn_backward(const PyramidBackward& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (args.shape.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(args, device, stream);
  else
    launch<__half>(args, device, stream);
}

}  // namespace univid
