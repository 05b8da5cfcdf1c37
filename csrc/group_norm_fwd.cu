// group_norm_silu, forward: x is read once and out written once; between, a slab stays in the shared memory of its
// cluster (group_norm_slab.cuh), bound by memory.
//
// 1. A block takes the mean of each group over its rows, then the squares of the differences from it: two passes over
//    shared memory, so that a large mean costs no digits.
// 2. Blocks send each other both, and each merges them in the order of ranks (Chan, Golub and LeVeque 1983).
// 3. The numbers are normalised, activated and written in units of 16 bytes.
//
// A thread: at most 64 registers, 24 of them its channels' mean, scale and bias. A block: 32 bytes of shared memory a
// thread for sums and some hundred for groups beside its part of the slab. At 2880 x 320 in 16 bits that is 360 rows of
// 160 bytes, 17 or 16 a thread: 59.8 KB of data, 68.1 KB in all, and 224 threads: three blocks an SM.
//
// Measured 2026-11-29 on one H200 (M = 48, 32 groups, bfloat16, replays of a graph; a copy 4243 GB/s), GB/s of one read
// and one write at N/C = 2880/320, 720/640, 180/1280, 45/1280: 2315, 2347, 2283, 1090.
#include "group_norm_slab.cuh"

namespace univid {
namespace {

constexpr int kMaxThreads = 512;

// Of a block and a group.
struct alignas(8) Moments {
  float mean, squares;  // the sum of squared differences from the mean
};

struct alignas(8) Statistics {
  float mean, rstd;
};

struct alignas(8) Affine {
  float weight, bias;  // of a channel
};

constexpr SlabNeeds kNeeds{.tensors = 1,
                           .max_threads = kMaxThreads,
                           .registers = 64,
                           .steps = 16,
                           .partial = false,
                           .table_bytes = [](const SlabPlan& plan) {
                             const int of_group =
                                 static_cast<int>(plan.blocks * sizeof(Moments) + sizeof(Statistics) + sizeof(float));
                             return plan.groups * of_group + plan.channels() * static_cast<int>(sizeof(Affine));
                           }};

// Calls finish(group, sum over its channels and the block's rows) in every lane of one warp, for each group of the
// slab.
template <typename F>
__device__ void sum_groups(const float (&values)[kUnit], float* scratch, const Share& share, const SlabPlan& plan,
                           F&& finish) {
  share_values(values, scratch, share);
  __syncthreads();
  const int lane = threadIdx.x % 32, width = plan.width, rows_ahead = 32 / width, columns_ahead = 32 % width;
  for (int group = threadIdx.x / 32; group < plan.groups; group += blockDim.x / 32) {
    const float* at = scratch + group * width;
    int row = lane / width, column = lane % width;
    float sum = 0;
#pragma unroll 4
    while (row < plan.row_threads) {
      sum += at[row * plan.channels() + column];
      row += rows_ahead;
      column += columns_ahead;
      if (column >= width) {
        column -= width;
        row++;
      }
    }
    finish(group, warp_sum(sum));
  }
}

// Of a group, from what every block of the cluster found.
__device__ Statistics merge(const Moments* moments, const GroupNormShape& shape, const SlabPlan& plan) {
  const auto weight = [&](int rank) { return static_cast<float>(Share::rows_of(plan, rank) * plan.width); };
  const float count = static_cast<float>(shape.rows * plan.width);
  float drift = 0, squares = 0;
  for (int rank = 1; rank < plan.blocks; rank++)
    drift += weight(rank) * (moments[rank * plan.groups].mean - moments[0].mean);
  const float mean = moments[0].mean + drift / count;
  for (int rank = 0; rank < plan.blocks; rank++) {
    const auto [mean_there, squares_there] = moments[rank * plan.groups];
    squares += squares_there + weight(rank) * (mean_there - mean) * (mean_there - mean);
  }
  return {mean, rsqrtf(squares / count + shape.eps)};
}

template <typename Element, bool kSilu>
__global__ void __launch_bounds__(kMaxThreads, 2)
    forward(const __grid_constant__ GroupNormForward args, const __grid_constant__ SlabPlan plan) {
  extern __shared__ __align__(16) char memory[];
  float* const scratch = reinterpret_cast<float*>(memory + plan.data_bytes(1));
  Moments* const moments = reinterpret_cast<Moments*>(scratch + plan.workers() * kUnit);  // (blocks, groups)
  Statistics* const statistics = reinterpret_cast<Statistics*>(moments + plan.blocks * plan.groups);
  Affine* const affine = reinterpret_cast<Affine*>(statistics + plan.groups);
  float* const means = reinterpret_cast<float*>(affine + plan.channels());  // of this block

  const GroupNormShape& shape = args.shape;
  const int width = plan.width, lane = threadIdx.x % 32;
  const Share share(plan);
  const Column x(args.x, share, plan, reinterpret_cast<uint4*>(memory));
  x.load(share.steps);
  commit_copies();
  ptx::barrier_cluster_arrive(ptx::sem_relaxed);  // this block has begun: others may write to it
  for (int i = threadIdx.x; i < plan.channels(); i += blockDim.x) {
    const int channel = share.group * width + i;
    affine[i] = {element<Element>(args.weight, channel), element<Element>(args.bias, channel)};
  }

  float mean[kUnit], sums[kUnit] = {};
  wait_copies<0>();
  each_kept<Element>(x, share.steps, [&](int, float (&numbers)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; k++) sums[k] += numbers[k];
  });
  const float count = static_cast<float>(share.rows * width);
  sum_groups(sums, scratch, share, plan, [&](int group, float sum) {
    if (lane == 0) means[group] = sum / count;
  });
  __syncthreads();
  share.each_channel(width, [&](int k, int group) {
    mean[k] = means[group];
    sums[k] = 0;
  });
  each_kept<Element>(x, share.steps, [&](int, float (&numbers)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; k++) {
      const float off = numbers[k] - mean[k];
      sums[k] += off * off;
    }
  });
  ptx::barrier_cluster_wait();
  sum_groups(sums, scratch, share, plan, [&](int group, float squares) {
    if (lane < plan.blocks)
      *in_block(&moments[share.rank * plan.groups + group], lane) = Moments{means[group], squares};
  });
  sync_cluster();

  for (int group = threadIdx.x; group < plan.groups; group += blockDim.x) {
    statistics[group] = merge(moments + group, shape, plan);
    if (share.rank == 0) {
      const int64_t at = static_cast<int64_t>(share.image) * shape.groups + share.group + group;
      args.mean[at] = statistics[group].mean;
      args.rstd[at] = statistics[group].rstd;
    }
  }
  __syncthreads();
  float scale[kUnit], bias[kUnit];
  share.each_channel(width, [&](int k, int group) {
    const Affine& of = affine[share.channel + k];
    mean[k] = statistics[group].mean;
    scale[k] = statistics[group].rstd * of.weight;
    bias[k] = of.bias;
  });
  const RowsView out{args.out, shape.rows * shape.channels, shape.channels};
  const Column target(out, share, plan, nullptr);
  each_kept<Element>(x, share.steps, [&](int i, float (&numbers)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; k++) {
      const float z = (numbers[k] - mean[k]) * scale[k] + bias[k];
      numbers[k] = kSilu ? z * sigmoid(z) : z;
    }
    target.far(i) = pack<Element>(numbers);
  });
}

}  // namespace

bool group_norm_silu_fits(int64_t images, int64_t rows, int channels, int groups) {
  const GroupNormShape shape{images, rows, channels, groups};
  for (int of_slab = 1; of_slab <= groups; of_slab++)
    for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2)
      if (plan_slab(shape, kNeeds, of_slab, blocks).groups > 0) return true;
  return false;
}

void group_norm_silu_forward(const GroupNormForward& args, int device, cudaStream_t stream) {
  const SlabPlan plan = plan_slabs(args.shape, kNeeds);
  if (plan.groups == 0) throw std::invalid_argument("group_norm_silu: slabs that fit in a cluster needed");
  const DeviceGuard guard(device);
  dispatch(args.shape, [&](auto element, auto silu) {
    static OncePerDevice once;
    launch_slabs(forward<decltype(element), silu()>, once, args, plan, device, stream);
  });
}

}  // namespace univid
