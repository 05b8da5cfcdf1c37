// What group_norm_silu's forward and backward share: slabs, and how a block's threads divide and add up their numbers.
//
// A slab is one m's rows of a few whole groups: runs of 64 bytes or more, of whole 16-byte units. A cluster of 1 to 8
// blocks holds it, each a part of its rows. A thread owns one unit, 8 channels, of every row_threads-th row of its
// block: it copies them to shared memory and is the only one to read them there, so that nothing but its own copies is
// waited for, its channels' parameters stay in registers, and whatever the runs, no two threads meet in a bank.
//
// Memory is kept busy by the blocks of other slabs on the same multiprocessor (SM): plan_slabs() weighs how many fit.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cuda/ptx>
#include <stdexcept>
#include <type_traits>

#include "group_norm.h"
#include "warp.cuh"

namespace univid {

namespace ptx = cuda::ptx;

constexpr int kUnit = 8;  // channels that are read at once
constexpr int kUnitBytes = 16;
constexpr int kMaxBlocks = 8;   // of a cluster: what every Hopper GPU can have
constexpr int kMaxUnits = 256;  // of a row

struct SlabPlan {
  int groups;           // of a slab
  int blocks;           // of its cluster
  int units;            // of a row
  int width;            // channels of a group
  int slabs;            // of an m
  int rows, more;       // of a block, and how many blocks, the first ones, have one row more
  int row_threads;      // rows that a block reads at once
  int steps;            // rows of a thread, at most
  int kept;             // steps whose units stay in shared memory; all of them in the forward
  int threads, shared;  // of a block; bytes

  __host__ __device__ int workers() const { return units * row_threads; }  // threads that own units
  __host__ __device__ int channels() const { return units * kUnit; }
  __host__ __device__ int data_bytes(int tensors) const { return tensors * kept * workers() * kUnitBytes; }
  __host__ __device__ int scratch_bytes() const { return workers() * kUnit * static_cast<int>(sizeof(float)); }
};

// What a kernel needs of an SM.
struct SlabNeeds {
  int tensors;      // held on chip
  int max_threads;  // of a block
  int registers;    // of a thread
  int steps;        // of a thread, wanted
  bool partial;     // slabs may be kept in part
  int (*table_bytes)(const SlabPlan&);
};

// An H200's multiprocessors (SM), and what one has.
constexpr int kProcessors = 132, kSharedMemory = 228 << 10, kRegisters = 64 << 10;
constexpr int kReserved = 1 << 10;  // shared memory that a block takes beside its own

// A plan for slabs of so many groups and clusters of so many blocks, or one of 0 groups where they do not fit.
inline SlabPlan plan_slab(const GroupNormShape& shape, const SlabNeeds& needs, int groups, int blocks) {
  constexpr int kMinThreads = 128, kMinBytes = 4 << 10, kMaxRows = 1 << 20;
  const int width = shape.channels / shape.groups;
  const int64_t rows = (shape.rows + blocks - 1) / blocks;
  SlabPlan plan{groups, blocks, groups * width / kUnit, width, shape.groups / groups};
  if (shape.groups % groups != 0 || groups * width % kUnit != 0 || plan.units > kMaxUnits || blocks > shape.rows ||
      rows > kMaxRows || (blocks > 1 && rows * plan.units * kUnitBytes < kMinBytes) ||
      shape.images * plan.slabs * blocks > INT32_MAX)
    return {};
  plan.rows = static_cast<int>(shape.rows / blocks);
  plan.more = static_cast<int>(shape.rows % blocks);
  const int64_t threads = std::clamp<int64_t>(rows * plan.units / needs.steps, kMinThreads, needs.max_threads);
  plan.row_threads = static_cast<int>(std::clamp<int64_t>(threads / plan.units, 1, rows));
  plan.steps = static_cast<int>((rows + plan.row_threads - 1) / plan.row_threads);
  plan.row_threads = static_cast<int>((rows + plan.steps - 1) / plan.steps);
  plan.threads = (plan.workers() + 31) / 32 * 32;
  const int others = plan.scratch_bytes() + needs.table_bytes(plan);
  const int room = kSharedMemory - kReserved - others;
  plan.kept = std::min(plan.steps, room / (needs.tensors * plan.workers() * kUnitBytes));
  if (room <= 0 || plan.kept < (needs.partial ? 1 : plan.steps)) return {};
  plan.shared = plan.data_bytes(needs.tensors) + others;
  return plan;
}

// How fast a plan is likely to be, from 0 to 1. Memory is the limit where an SM has some blocks, so that one's loads
// overlap another's arithmetic, and where runs are whole 32-byte sectors; clusters cost some waiting.
inline double estimate(const GroupNormShape& shape, const SlabNeeds& needs, const SlabPlan& plan) {
  constexpr int kThreads = 2048;
  constexpr double kOverlap[] = {0, 0.6, 0.92, 0.95, 1};  // by blocks of an SM
  const int resident = std::min({kSharedMemory / (plan.shared + kReserved), kThreads / plan.threads,
                                 kRegisters / (plan.threads * needs.registers)});
  const double bytes = plan.data_bytes(needs.tensors), run = plan.units * kUnitBytes;
  const double blocks = static_cast<double>(shape.images) * plan.slabs * plan.blocks / kProcessors;  // of an SM
  const double rounds = blocks / resident;
  const double even = rounds <= 1 ? blocks / std::ceil(blocks) : (1 + rounds / std::ceil(rounds)) / 2;
  const double at_once = std::min(1.0, resident * bytes / std::min(96e3, blocks * bytes));
  const double sectors = plan.units % 2 == 0 ? 1 : run / (run + 16);
  return kOverlap[std::min(resident, 4)] * even * at_once * sectors * (run < 64 ? 0.8 : 1) *
         std::pow(0.95, std::log2(plan.blocks)) * plan.kept / plan.steps;
}

// The plan of the highest estimate; one of 0 groups where none fits.
inline SlabPlan plan_slabs(const GroupNormShape& shape, const SlabNeeds& needs) {
  SlabPlan best{};
  double highest = 0;
  for (int groups = 1; groups <= shape.groups; groups++)
    for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
      const SlabPlan plan = plan_slab(shape, needs, groups, blocks);
      if (plan.groups == 0) continue;
      if (const double speed = estimate(shape, needs, plan); speed > highest) {
        highest = speed;
        best = plan;
      }
    }
  return best;
}

// What a block and a thread of it own.
struct Share {
  int image;
  int group, channel;  // the slab's first; the thread's first, counted from the slab's
  int rank;            // of the block in its cluster
  int row, steps;      // the thread's first, and how many
  int rows;            // of the block
  bool works;          // has units

  __device__ explicit Share(const SlabPlan& plan) {
    const int slab = ptx::get_sreg_clusterid_x();
    image = slab / plan.slabs;
    group = (slab - image * plan.slabs) * plan.groups;
    rank = ptx::get_sreg_cluster_ctarank();
    rows = rows_of(plan, rank);
    works = threadIdx.x < plan.workers();
    row = threadIdx.x / plan.units;
    channel = (threadIdx.x - row * plan.units) * kUnit;
    steps = works ? plan.steps - (row + (plan.steps - 1) * plan.row_threads >= rows) : 0;
    row += plan.rows * rank + min(rank, plan.more);
  }

  __device__ static int rows_of(const SlabPlan& plan, int rank) { return plan.rows + (rank < plan.more); }

  // Calls f(k, group of the slab) for the thread's channels.
  template <typename F>
  __device__ void each_channel(int width, F&& f) const {
    int of = channel / width, left = width - (channel - of * width);
#pragma unroll
    for (int k = 0; k < kUnit; k++) {
      f(k, of);
      if (--left == 0) {
        of++;
        left = width;
      }
    }
  }
};

// A thread's units of a tensor, in global memory and, the first of them, in shared memory.
struct Column {
  char* global;
  int64_t step;  // bytes from one unit to the next
  uint4* shared;
  int pitch;  // units from one unit to the next there

  __device__ Column(const RowsView& tensor, const Share& share, const SlabPlan& plan, uint4* memory)
      : shared(memory + threadIdx.x), pitch(plan.workers()) {
    const int channel = share.group * plan.width + share.channel;
    global =
        static_cast<char*>(tensor.data) + 2 * (share.image * tensor.stride_m + share.row * tensor.stride_n + channel);
    step = 2 * plan.row_threads * tensor.stride_n;
  }

  __device__ void load(int count) const {
    const uint32_t address = shared_address(shared);
#pragma unroll 4
    for (int i = 0; i < count; i++) copy_async(address + i * pitch * kUnitBytes, global + i * step);
  }

  __device__ uint4& kept(int i) const { return shared[i * pitch]; }
  __device__ uint4& far(int i) const { return *reinterpret_cast<uint4*>(global + i * step); }
};

template <typename Element>
__device__ inline void unpack(float& low, float& high, uint32_t pair);

template <>
__device__ inline void unpack<BFloat16>(float& low, float& high, uint32_t pair) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

template <>
__device__ inline void unpack<Half>(float& low, float& high, uint32_t pair) {
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

template <typename Element>
__device__ inline void unpack(float (&d)[kUnit], const uint4& unit) {
  unpack<Element>(d[0], d[1], unit.x);
  unpack<Element>(d[2], d[3], unit.y);
  unpack<Element>(d[4], d[5], unit.z);
  unpack<Element>(d[6], d[7], unit.w);
}

// Calls f(i, numbers) for each of a thread's units that are kept.
template <typename Element, typename F>
__device__ void each_kept(const Column& column, int steps, F&& f) {
#pragma unroll 2
  for (int i = 0; i < steps; i++) {
    float numbers[kUnit];
    unpack<Element>(numbers, column.kept(i));
    f(i, numbers);
  }
}

template <typename Element>
__device__ inline uint4 pack(const float (&a)[kUnit]) {
  return {pack<Element>(a[0], a[1]), pack<Element>(a[2], a[3]), pack<Element>(a[4], a[5]), pack<Element>(a[6], a[7])};
}

template <typename Element>
__device__ inline float element(const ChannelsView& tensor, int64_t channel) {
  if (tensor.is_float) return static_cast<const float*>(tensor.data)[channel * tensor.stride];
  float low, high;
  unpack<Element>(low, high, static_cast<const uint16_t*>(tensor.data)[channel * tensor.stride]);
  return low;
}

// 1 / (1 + exp(-z)), to some 2^-22 of it.
__device__ inline float sigmoid(float z) {
  float gate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(gate) : "f"(1 + exp2_fast(z * -1.4426950408889634f)));
  return gate;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Leaves every worker's values in scratch: (row_threads, channels of the slab).
__device__ inline void share_values(const float (&values)[kUnit], float* scratch, const Share& share) {
  if (!share.works) return;
  float4* at = reinterpret_cast<float4*>(scratch) + threadIdx.x * 2;
  at[0] = {values[0], values[1], values[2], values[3]};
  at[1] = {values[4], values[5], values[6], values[7]};
}

// A block's blocks are done with, or ready for, each other's shared memory.
__device__ inline void sync_cluster() {
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// Where `local` lies in another block of the cluster.
template <typename T>
__device__ inline T* in_block(T* local, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(local, rank);
}

// Launches `kernel` on clusters of a plan.
template <typename Kernel, typename Args>
void launch_slabs(Kernel* kernel, OncePerDevice& once, const Args& args, const SlabPlan& plan, int device,
                  cudaStream_t stream) {
  prepare(once, kernel, device);
  const GroupNormShape& shape = args.shape;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.images * plan.slabs * plan.blocks);
  config.blockDim = plan.threads;
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args, plan), "group_norm_silu");
}

// Calls f with the dtype's element and silu as types.
template <typename F>
void dispatch(const GroupNormShape& shape, F&& f) {
  const auto with = [&](auto element) {
    if (shape.silu)
      f(element, std::true_type());
    else
      f(element, std::false_type());
  };
  if (shape.dtype == DType::kBFloat16)
    with(BFloat16());
  else
    with(Half());
}

}  // namespace univid
