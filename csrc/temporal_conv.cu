// temporal_conv and its gradient in x, for Hopper: an implicit matrix product over shifted rows.
//
// x is seen as (B, T·N, C): tap k of a tile of rows is the box of rows (k - K/2) · N further on. Rows outside a clip
// arrive as zeros, which is the padding of frames, so that tiles may cross frames and no row is looked at.
//
// A block computes 256 x 160 of out (up to 4 blocks of 64 rows): one thread feeds, two warpgroups multiply, each every
// second block of rows; or 192 x 160 by three warpgroups, where few products come before each store. Two blocks are a
// cluster of neighbouring columns: each loads its own weight and half of the rows (every second block), which are sent
// to both, 36 KB a block and step of 5.2 MFLOP from L2. Steps are of 64 channels of one tap.
// Which worker (cluster) computes what: temporal_conv_plan.h.
//
// The gradient in x is the same product with taps flipped; its weight tile lies with the elements of the sum as rows,
// in boxes of 32 columns, which wgmma reads transposed.
//
// Results: a warp takes 16 x 32 at a time, adds bias and residual in float32, and sends it through 1 KB of shared
// memory of its own. The residual is read in units of 16 bytes, which quads of lanes exchange for what the accumulators
// hold.
//
// Registers of a lane: 160 accumulators of 232; the feeding warpgroup has 40. Shared memory: 52 KB a stage, 4 stages,
// 16 KB of results: 225 KB of 227. A step's products take 1280 cycles, its shared memory 1312: 56 KB read by each
// warpgroup and 52 KB written.
//
// Measured (H200, B = 2, a product of 794 TFLOP/s): 646 / 739 / 778 / 639 TFLOP/s at f1, f2, f4, f8, of which a cuBLAS
// product of the same size has 674 / 733 / 749 / 769; with bias and residual 546 / 690 / 721 / 625.
#include <algorithm>

#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "temporal_conv.h"
#include "temporal_conv_plan.h"
#include "temporal_conv_results.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kBlockBytes = kBlockRows * kStepChannels * 2;

template <int kGroups_, int kBlocks_, int kColumns_, int kStages_, int kCluster_, int kSlots_>
struct Config {
  static constexpr int kGroups = kGroups_;    // warpgroups that compute
  static constexpr int kBlocks = kBlocks_;    // of 64 rows, of each
  static constexpr int kColumns = kColumns_;  // of out
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;  // blocks that share rows
  static constexpr int kSlots = kSlots_;      // for parts of results, of a warp
  static constexpr int kTileBlocks = kGroups * kBlocks;
  static constexpr int kWeightBytes = kColumns * kStepChannels * 2;
  static constexpr int kParts = kColumns / kPartColumns;
  static constexpr int kSums = kColumns / 2;  // of a lane and block
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRegisters = kGroups == 2 ? 232 : 160, kFeedRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kPartialBytes = kTileBlocks * kBlockRows * kColumns * 4;  // of a tile in float32
};

struct Arguments {
  CUtensorMap x, weight, out;
  int x_moves, out_moves;  // 1, or 0: one clip, or the same for all
  Addends addends;
  float4* partials;
  uint32_t* flags;  // of (worker's part, rank, warpgroup): the partial tile is there
  Tiling tiling;
  Schedule schedule;
};

template <class C>
struct Shared {
  alignas(1024) char x[C::kStages][C::kTileBlocks][kBlockBytes];
  alignas(1024) char weight[C::kStages][C::kWeightBytes];
  alignas(1024) char out[C::kGroups * 4][C::kSlots][kPartBytes];
  Ring<C::kStages> ring;
};

template <class C>
constexpr int kSharedBytes = sizeof(Shared<C>) + 1024;  // to begin at a multiple of 1024

// The feeding thread.
template <class C, bool kTransposed>
__device__ void produce(const Arguments& args, Shared<C>& shared, int worker, int rank) {
  constexpr uint16_t kAll = (1 << C::kCluster) - 1;
  const Tiling& t = args.tiling;
  Cursor<C::kStages> at;
  Piece piece;
  while (advance(args.schedule, worker, piece)) {
    const Place place(t, piece.tile);
    const int column = (place.column_tile * C::kCluster + rank) * C::kColumns, end = min(piece.end, place.steps);
    int row[C::kTileBlocks], clip[C::kTileBlocks];
#pragma unroll
    for (int b = 0; b < C::kTileBlocks; b++) {
      const Rows rows(t, place.block + b);
      row[b] = rows.row;
      clip[b] = rows.clip * args.x_moves;
    }
    int tap = place.first_tap + piece.begin / t.steps_of_tap, c = piece.begin % t.steps_of_tap * kStepChannels;
    for (int step = piece.begin; step < end; step++) {
      uint64_t* const filled = &shared.ring.filled[at.slot];
      wait(&shared.ring.free[at.slot], at.round ^ 1);
      expect(filled, place.height * kBlockBytes + C::kWeightBytes);
      const int shift = (tap - t.taps / 2) * t.tokens;
#pragma unroll
      for (int b = 0; b < C::kTileBlocks; b++) {
        if (b >= place.height || b % C::kCluster != rank) continue;
        const int32_t box[3] = {c, row[b] + shift, clip[b]};
        void* const to = shared.x[at.slot][b];
        if constexpr (C::kCluster > 1)
          ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &args.x, box, filled, kAll);
        else
          ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &args.x, box, filled);
      }
      char* const weight = shared.weight[at.slot];
      if constexpr (kTransposed) {
#pragma unroll
        for (int i = 0; i < C::kParts; i++) {
          const int32_t box[3] = {column + i * kPartColumns, t.taps - 1 - tap, c};
          ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, weight + i * (kPartColumns * 128),
                                    &args.weight, box, filled);
        }
      } else {
        const int32_t box[3] = {c, tap, column};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, weight, &args.weight, box, filled);
      }
      at.advance();
      c += kStepChannels;
      if (c >= t.steps_of_tap * kStepChannels) {
        c = 0;
        tap++;
      }
    }
  }
}

// A warpgroup's sums.
template <typename Element, class C, bool kTransposed>
class Consumer {
 public:
  __device__ Consumer(const Arguments& args, Shared<C>& shared) : args_(args), shared_(shared) {}

  __device__ void run() {
    Piece piece;
    while (advance(args_.schedule, worker(), piece)) {
      const Place place(args_.tiling, piece.tile);
      const int blocks = (place.height + C::kGroups - 1 - group()) / C::kGroups,
                steps = min(piece.end, place.steps) - piece.begin;
      if (blocks == C::kBlocks)
        multiply<C::kBlocks>(steps);
      else if (C::kBlocks > 1 && blocks == 1)
        multiply<1>(steps);
      else
        multiply<0>(steps);
      const int part = part_of(args_.schedule, worker());
      if (piece.begin > 0) {
        leave(part, blocks);
      } else {
        if (piece.end < place.steps)
          for_others(args_.schedule, part, piece.tile, [&](int other) { take(other, blocks); });
        store(place, blocks);
      }
    }
    if (lane() == 0) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
  }

 private:
  // Made anew wherever they are needed: registers are scarce.
  __device__ static int worker() { return blockIdx.x / C::kCluster; }
  __device__ static int rank() { return blockIdx.x % C::kCluster; }
  __device__ static int group() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }
  __device__ static int warp() { return threadIdx.x / 32 % 4; }
  __device__ static int lane() { return threadIdx.x % 32; }

  // Products of one stage are under way while the next are started.
  template <int kActive>
  __device__ void multiply(int steps) {
    const uint64_t first_x = tile_descriptor(shared_.x[0][group()]);
    const uint64_t first_weight =
        kTransposed ? half_tile_descriptor<kStepChannels>(shared_.weight[0]) : tile_descriptor(shared_.weight[0]);
    int former = 0;
#pragma unroll
    for (int b = 0; b < kActive; b++)
#pragma unroll
      for (int i = 0; i < C::kSums; i++) sums_[b][i] = 0;
#pragma unroll
    for (int b = 0; b < kActive; b++) pin(sums_[b]);
    for (int step = 0; step < steps; step++) {
      wait(&shared_.ring.filled[at_.slot], at_.round);
      if constexpr (kActive > 0) {
        const uint64_t x = first_x + at_.slot * (sizeof(shared_.x[0]) / 16);
        const uint64_t weight = first_weight + at_.slot * (C::kWeightBytes / 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kStepChannels / 16; i++) {
#pragma unroll
          for (int b = 0; b < kActive; b++)
            multiply_tiles<kTransposed>(Element{}, sums_[b], x + b * (C::kGroups * kBlockBytes / 16) + 2 * i,
                                        weight + (kTransposed ? 64 : 2) * i);
        }
        wgmma_commit();
        wgmma_wait<1>();
      }
      if (step > 0) release(former);
      former = at_.slot;
      at_.advance();
    }
    if constexpr (kActive > 0) wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kActive; b++) pin(sums_[b]);
    release(former);
  }

  __device__ void release(int slot) {
    __syncwarp();
    if (C::kCluster > 1) {
      if (lane() < C::kCluster) arrive_in(&shared_.ring.free[slot], lane());
    } else if (lane() == 0) {
      ptx::mbarrier_arrive(&shared_.ring.free[slot]);
    }
  }

  __device__ int place_of(int part) const { return (part * C::kCluster + rank()) * C::kGroups + group(); }

  __device__ float4* partial(int part) const {
    return args_.partials + place_of(part) * (C::kBlocks * C::kSums / 4 * 128) + threadIdx.x % 128;
  }

  // Leaves sums in the workspace for who began the tile.
  __device__ void leave(int part, int blocks) {
    float4* const to = partial(part);
    uint32_t* const flag = args_.flags + place_of(part);
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++)
      if (b < blocks)
#pragma unroll
        for (int i = 0; i < C::kSums; i += 4)
          __stcg(to + (b * C::kSums + i) * 32, float4{sums_[b][i], sums_[b][i + 1], sums_[b][i + 2], sums_[b][i + 3]});
    __threadfence();
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group()) : "memory");
    if (threadIdx.x % 128 == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
  }

  __device__ void take(int part, int blocks) {
    const uint32_t* const flag = args_.flags + place_of(part);
    uint32_t there = 0;
    while (there == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
    const float4* const from = partial(part);
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++)
      if (b < blocks)
#pragma unroll
        for (int i = 0; i < C::kSums; i += 4) {
          const float4 more = __ldcg(from + (b * C::kSums + i) * 32);
          sums_[b][i] += more.x;
          sums_[b][i + 1] += more.y;
          sums_[b][i + 2] += more.z;
          sums_[b][i + 3] += more.w;
          if (i % 20 == 16) __syncwarp();  // or more registers go into loads than there are
        }
  }

  __device__ void store(const Place& place, int blocks) {
    constexpr int kAhead = 2;  // parts whose residual is under way
    const int column = (place.column_tile * C::kCluster + rank()) * C::kColumns;
    uint4 residual[kAhead][2];
    if (lane() == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());  // all slots are free
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++) {
      if (b >= blocks) break;
      const Target target(args_.tiling, args_.addends, place.block + group() + b * C::kGroups, warp(), lane());
#pragma unroll
      for (int i = 0; i < kAhead; i++) target.load(args_.addends, column + i * kPartColumns, lane(), residual[i]);
#pragma unroll
      for (int i = 0; i < C::kParts; i++) {
        char* const slot = shared_.out[group() * 4 + warp()][(b * C::kParts + i) % C::kSlots];
        if (lane() == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<C::kSlots - 1>());
        __syncwarp();
        finish_part<Element>(args_.addends, target, column + i * kPartColumns, residual[i % kAhead], sums_[b] + i * 16,
                             slot, lane());
        if (i + kAhead < C::kParts)
          target.load(args_.addends, column + (i + kAhead) * kPartColumns, lane(), residual[i % kAhead]);
        ptx::fence_proxy_async(ptx::space_shared);
        __syncwarp();
        if (lane() == 0) {
          const int32_t box[3] = {column + i * kPartColumns, target.row, target.clip * args_.out_moves};
          if (box[0] < args_.addends.columns && target.row < args_.tiling.rows)
            ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &args_.out, box, slot);
          ptx::cp_async_bulk_commit_group();
        }
      }
    }
  }

  const Arguments& args_;
  Shared<C>& shared_;
  Cursor<C::kStages> at_;
  float sums_[C::kBlocks][C::kSums];
};

template <int kCluster>
__device__ void meet() {
  if constexpr (kCluster > 1) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  } else {
    __syncthreads();
  }
}

template <typename Element, class C, bool kTransposed>
__global__ void __launch_bounds__(C::kThreads, 1) convolve(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    shared.ring.init(4 * C::kGroups * C::kCluster);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  meet<C::kCluster>();
  const int worker = blockIdx.x / C::kCluster, rank = blockIdx.x % C::kCluster;
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (w == C::kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kFeedRegisters));
    if (threadIdx.x == C::kGroups * 128) produce<C, kTransposed>(args, shared, worker, rank);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    Consumer<Element, C, kTransposed>(args, shared).run();
  }
  if constexpr (C::kCluster > 1) meet<C::kCluster>();  // the other block may still write here
}

// --- launches --------------------------------------------------------------------------------------------------------

template <class C>
Tiling tiling_for(const TemporalConvShape& s) {
  return tiling_of(s.batch, s.frames, s.tokens, s.channels, s.channels_out, s.taps, C::kTileBlocks,
                   C::kColumns * C::kCluster);
}

template <class C>
Schedule schedule_for(const Tiling& tiling, int device) {
  return share_out(tiling, num_processors(device) / C::kCluster);
}

int64_t flags_bytes(const Schedule& schedule, int of_worker) {
  return (schedule.workers * of_worker * 4 + 15) / 16 * 16;
}

template <class C>
int64_t workspace_for(const TemporalConvShape& shape, int device) {
  const Schedule schedule = schedule_for<C>(tiling_for<C>(shape), device);
  if (!schedule.cuts()) return 0;
  return flags_bytes(schedule, C::kCluster * C::kGroups) + int64_t{schedule.workers} * C::kCluster * C::kPartialBytes;
}

// As boxes of `rows` rows and `columns` columns.
CUtensorMap map_of(const ClipsView& tensor, const TemporalConvShape& s, int64_t channels, int rows, int columns,
                   int& moves) {
  const int64_t all_rows = s.frames * s.tokens;
  moves = s.batch > 1 && tensor.stride_b != 0;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(all_rows),
                               static_cast<cuuint64_t>(moves ? s.batch : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(all_rows > 1 ? tensor.stride_n * 2 : 16),
                                 static_cast<cuuint64_t>(moves ? tensor.stride_b * 2 : 16)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1};
  return encode_map(tensor.data, s.dtype, sizes, strides, box,
                    columns == kPartColumns ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

// The forward's (C_out, C, K), as boxes of one tap: 64 channels of kColumns of C_out, or, transposed, 32 of 64.
template <class C>
CUtensorMap map_of_weight(const TemporalConv& call) {
  const TemporalConvShape& s = call.shape;
  const int64_t inner = s.transposed ? s.channels_out : s.channels, outer = s.transposed ? s.channels : s.channels_out;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(inner), static_cast<cuuint64_t>(s.taps),
                               static_cast<cuuint64_t>(outer)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(s.taps > 1 ? call.weight_stride_k * 2 : 16),
                                 static_cast<cuuint64_t>(call.weight_stride_o * 2)};
  const cuuint32_t straight[3] = {kStepChannels, 1, C::kColumns}, across[3] = {kPartColumns, 1, kStepChannels};
  return encode_map(call.weight, s.dtype, sizes, strides, s.transposed ? across : straight,
                    s.transposed ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
}

template <typename Element, class C, bool kTransposed>
void launch(const TemporalConv& call, int device, cudaStream_t stream) {
  static_assert(kSharedBytes<C> <= 227 * 1024);
  const TemporalConvShape& s = call.shape;
  Arguments args{};
  args.x = map_of(call.x, s, s.channels, kBlockRows, kStepChannels, args.x_moves);
  args.out = map_of(call.out, s, s.channels_out, 16, kPartColumns, args.out_moves);
  args.weight = map_of_weight<C>(call);
  args.addends = {static_cast<int>(s.channels_out),
                  static_cast<const char*>(call.bias),
                  static_cast<const char*>(call.residual.data),
                  call.bias_stride_b * 2,
                  call.residual.stride_b * 2,
                  call.residual.stride_n * 2};
  args.tiling = tiling_for<C>(s);
  args.schedule = schedule_for<C>(args.tiling, device);
  if (args.schedule.cuts()) {
    const int64_t size = flags_bytes(args.schedule, C::kCluster * C::kGroups);
    args.flags = static_cast<uint32_t*>(call.workspace);
    args.partials = reinterpret_cast<float4*>(static_cast<char*>(call.workspace) + size);
    check(cudaMemsetAsync(args.flags, 0, size, stream), "temporal_conv");
  }
  static OncePerDevice once;
  prepare(once, convolve<Element, C, kTransposed>, device);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {C::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = args.schedule.workers * C::kCluster;
  config.blockDim = C::kThreads;
  config.dynamicSmemBytes = kSharedBytes<C>;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, convolve<Element, C, kTransposed>, args), "temporal_conv");
}

// Calls f with the tiling that a shape is computed by.
template <typename F>
auto with_config(const TemporalConvShape& shape, int tiles, F&& f) {
  using High = Config<2, 2, 160, 4, 2, 2>;    // 256 x 160: the fewest bytes
  using Low = Config<3, 1, 160, 4, 2, 2>;     // 192 x 160: the shortest stores, behind few products
  using Single = Config<2, 2, 160, 4, 1, 2>;  // where there is no neighbour
  constexpr int64_t kManySteps = 64, kManyRows = 4096;
  const bool has_neighbour = (shape.channels_out + 159) / 160 % 2 == 0;
  const bool is_long = shape.taps * shape.channels >= kManySteps * kStepChannels &&
                       shape.batch * shape.frames * shape.tokens >= kManyRows;
  switch (tiles >= 0 ? tiles : !has_neighbour ? 2 : is_long ? 0 : 1) {
    case 0:
      return f(High());
    case 1:
      return f(Low());
    default:
      return f(Single());
  }
}

}  // namespace

int64_t temporal_conv_workspace(const TemporalConvShape& shape, int tiles, int device) {
  return with_config(shape, tiles, [&](auto config) { return workspace_for<decltype(config)>(shape, device); });
}

void temporal_conv(const TemporalConv& call, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  with_config(call.shape, call.tiles, [&](auto config) {
    using C = decltype(config);
    const auto with = [&](auto element) {
      using Element = decltype(element);
      if (call.shape.transposed)
        launch<Element, C, true>(call, device, stream);
      else
        launch<Element, C, false>(call, device, stream);
    };
    if (call.shape.dtype == DType::kBFloat16)
      with(__nv_bfloat16());
    else
      with(__half());
  });
}

}  // namespace univid
