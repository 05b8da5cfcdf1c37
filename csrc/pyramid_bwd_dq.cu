// pyramid_st_attn, backward, for Hopper: dQ alone and in a fixed order, by blocks that stay with their queries.
//
// As in the forward, a block takes 64 · kGroups queries of one (clip, head, row of the table) after another, and K and
// V come as pyramid_gather.cuh tells. A warpgroup has 64 queries as rows: S = Q·Kᵀ, dP = dO·Vᵀ, and dS straight from
// registers as the operand of dQ += dS·K, which is under way together with the next tile's S and dP.
//
// Registers of a lane: 32 of S, dP and dQ each, 16 of dS, of 160. Shared memory: Q and dO twice, 96 KB; 5 stages of 64
// keys and values, 80 KB; 24 KB of results: 201 KB of 227.
//
// Measured 2026-11-23, an earlier version, on one H200 (B = 2, T = 24, D = 64, bfloat16, do_bench after rests, with the
// statistics; 8192³ product 806), TFLOP/s of its own three products at N/H/R = 2880/5/3, 720/10/6, 180/20/12, 45/20/24
// with pyramid() tables: 680, 470, 475, 262.
#include <algorithm>
#include <cmath>

#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "pyramid_bwd.cuh"
#include "pyramid_gather.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kGroups = 3;  // warpgroups that compute
constexpr int kKeys = 64;   // of a tile
constexpr int kStages = 5;  // tiles of K, and of V, in shared memory
constexpr int kQSlots = 2;  // tiles of Q and dO
constexpr int kKeyBytes = kKeys * kRowBytes;

struct Arguments : Gather {
  TensorMap q, grad, dq;
  const float* statistics;
  int statistics_per_group;  // tiles of 64 queries
  float scale, scale_log2;
};

struct Shared {
  alignas(1024) char q[kQSlots][kGroups][kTileBytes];
  alignas(1024) char grad[kQSlots][kGroups][kTileBytes];
  alignas(1024) char out[kGroups][kTileBytes];
  alignas(1024) char k[kStages][kKeyBytes];
  alignas(1024) char v[kStages][kKeyBytes];
  Ring<kQSlots> q_ring[kGroups];
  Ring<kStages> ring;  // of K and V
};

// The feeding thread.
__device__ void feed(const Arguments& args, Shared& shared) {
  Cursor<kQSlots> q_at;
  Cursor<kStages> at;
  for (int tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
    const Place place(args, tile, kGroups * kUnit);
    References refs(args, place);
    if (!refs.more()) continue;
    for (int w = 0; w < kGroups; w++) {
      Ring<kQSlots>& ring = shared.q_ring[w];
      uint64_t* filled = &ring.filled[q_at.slot];
      wait(&ring.free[q_at.slot], q_at.round ^ 1);
      expect(filled, 2 * kTileBytes);
      const Box box{place.row + w * kUnit, place.head, place.group, place.clip};
      load_box(shared.q[q_at.slot][w], args.q, box, filled);
      load_box(shared.grad[q_at.slot][w], args.grad, box, filled);
    }
    q_at.advance();
    load_row(args, place, refs, at, shared);
  }
}

// A warpgroup of queries.
template <typename Element>
__device__ void consume(const Arguments& args, Shared& shared, int w) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const int pieces = args.pieces_per_tile;
  const bool whole_frames = args.last_piece_rows == args.piece_rows;
  Cursor<kQSlots> q_at;
  Cursor<kStages> at;
  float s[32], dp[32], dq[32];
  uint32_t ds[16];
  for (int tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
    const Place place(args, tile, kGroups * kUnit);
    const int row = place.row + w * kUnit;
    int left = __shfl_sync(~0u, count_references(args, place) * args.pieces_per_frame, 0);  // pieces yet to be read
    int first = 0;  // of the pieces of a frame, the next tile's first
#pragma unroll
    for (int i = 0; i < 32; i++) dq[i] = 0;
    if (left > 0) {
      float logsumexp[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};
      if (row < args.rows) {
        const int line = (place.clip * args.heads + place.head) * args.groups + place.group;
        const float* statistics =
            args.statistics + (int64_t{line} * args.statistics_per_group + row / kUnit) * kStatistics;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          logsumexp[i] = statistics[warp * 16 + lane / 4 + 8 * i];
          delta[i] = statistics[kUnit + warp * 16 + lane / 4 + 8 * i];
        }
      }
      wait(&shared.q_ring[w].filled[q_at.slot], q_at.round);
      const uint64_t q_tile = tile_descriptor(shared.q[q_at.slot][w]);
      const uint64_t grad_tile = tile_descriptor(shared.grad[q_at.slot][w]);
      int held = -1;  // the stage that dQ under way still reads
      while (left > 0) {
        const uint64_t k_tile = tile_descriptor(shared.k[at.slot]), v_tile = tile_descriptor(shared.v[at.slot]);
        wait(&shared.ring.filled[at.slot], at.round);
        pin(s);
        wgmma_fence();
        multiply_transposed<Element>(s, q_tile, k_tile);
        wgmma_commit();
        pin(dp);
        multiply_transposed<Element>(dp, grad_tile, v_tile);
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        pin(ds);
        if (held >= 0) arrive_warp(&shared.ring.free[held]);
        if (left < pieces || (!whole_frames && first + pieces >= args.pieces_per_frame)) mask(args, first, left, s);
        first += args.pieces_step;
        if (first >= args.pieces_per_frame) first -= args.pieces_per_frame;
        left -= pieces;
#pragma unroll
        for (int i = 0; i < 32; i++) s[i] = exp2_fast(fmaf(s[i], args.scale_log2, -logsumexp[i / 2 % 2]));
        wgmma_wait<0>();
        pin(dp);
#pragma unroll
        for (int i = 0; i < 16; i++)
          ds[i] = pack<Element>(s[2 * i] * (dp[2 * i] - delta[i % 2]), s[2 * i + 1] * (dp[2 * i + 1] - delta[i % 2]));
        pin(ds);
        wgmma_fence();
        multiply_add<Element>(dq, ds, k_tile);
        wgmma_commit();
        held = at.slot;
        at.advance();
      }
      wgmma_wait<0>();
      pin(dq);
      pin(ds);
      arrive_warp(&shared.ring.free[held]);
      arrive_warp(&shared.q_ring[w].free[q_at.slot]);
      q_at.advance();
    }
    const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + w) : "memory"); };
    if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    meet();
#pragma unroll
    for (int i = 0; i < 32; i++) dq[i] *= args.scale;
    store_tile<Element>(shared.out[w], dq, warp, lane);
    ptx::fence_proxy_async(ptx::space_shared);
    meet();
    if (leader) {
      if (row < args.rows) store_box(args.dq, {row, place.head, place.group, place.clip}, shared.out[w]);
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
}

template <typename Element>
__global__ void __launch_bounds__((kGroups + 1) * 128, 1) backward_dq(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (auto& ring : shared.q_ring) ring.init(4);
    shared.ring.init(4 * kGroups);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (const TensorMap* map : {&args.q, &args.grad, &args.dq}) prefetch_map(*map);
  } else if (threadIdx.x <= args.pieces_per_tile) {
    prefetch_map(args.k[threadIdx.x - 1]);
    prefetch_map(args.v[threadIdx.x - 1]);
  }
  __syncthreads();
  take_over();
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (w == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(32));
    if (threadIdx.x / 32 % 4 == 0 && elect()) feed(args, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(160));
    consume<Element>(args, shared, w);
  }
}

template <typename Element>
void launch(const PyramidBackward& call, const float* statistics, int device, cudaStream_t stream) {
  const PyramidShape& shape = call.shape;
  Arguments args{};
  set_gather(args, call, kGroups * kUnit, kKeys);
  const auto map = [&](const TensorView& tensor) {
    return tensor_map(tensor, shape.dtype, shape.batch, args.groups, args.rows, shape.heads, kUnit);
  };
  args.q = map(call.q);
  args.grad = map(call.grad);
  args.dq = map(call.dq);
  args.statistics = statistics;
  args.statistics_per_group = static_cast<int>(QueryTiles(shape, call.one_query).per_group);
  args.scale = shape.scale;
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const auto kernel = backward_dq<Element>;
  static OncePerDevice once;
  prepare(once, kernel, device);
  launch_early(kWhat, kernel, std::min(args.num_tiles, num_processors(device)), (kGroups + 1) * 128,
               sizeof(Shared) + 1024, stream, args);
}

}  // namespace

void pyramid_st_attn_dq(const PyramidBackward& args, const float* statistics, int device, cudaStream_t stream) {
  if (args.shape.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(args, statistics, device, stream);
  else
    launch<__half>(args, statistics, device, stream);
}

}  // namespace univid
