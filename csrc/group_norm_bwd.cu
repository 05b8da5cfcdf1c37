// group_norm_silu, backward: with x̂ = (x - mean) · rstd, z = x̂ · weight + bias and dz its gradient,
//
//   dx = rstd · (dz · weight - mean(dz · weight) - x̂ · mean(dz · weight · x̂)),  dbias = Σ dz,  dweight = Σ dz · x̂,
//
// the means over a group, the sums over m and n. x and grad are read once and dx written once; between, both stay in
// the shared memory of a cluster (group_norm_slab.cuh) as far as they fit there, and the rest is read again.
//
// 1. A block adds dz and dz · x̂ per channel over its rows. dz, rounded, takes grad's place in shared memory, since its
//    two special functions an element are what bounds this kernel after memory.
// 2. Blocks send each other these sums, and each adds them in the order of ranks; the first keeps them for 4.
// 3. dx is written in units of 16 bytes.
// 4. A small kernel adds the sums of channels over m, in order.
//
// A thread: at most 80 registers. A block: 32 bytes of shared memory a thread for sums and 24 to 80 a channel beside
// its parts of x and grad. At 2880 x 320 in 16 bits those are 360 rows of 80 bytes each, 57.6 KB, and 256 threads:
// three blocks an SM.
//
// Measured as the forward, GB/s of two reads and one write: 1908, 1805, 1712, 1014.
#include "group_norm_slab.cuh"

namespace univid {
namespace {

constexpr int kMaxThreads = 384;

struct alignas(16) Parameters {
  float mean, rstd, weight, bias;  // of a channel
};

struct alignas(8) Means {
  float dz, dz_x;  // of a group: of dz · weight and dz · weight · x̂
};

constexpr SlabNeeds kNeeds{.tensors = 2,
                           .max_threads = kMaxThreads,
                           .registers = 80,
                           .steps = 8,
                           .partial = true,
                           .table_bytes = [](const SlabPlan& plan) {
                             const int of_channel =
                                 static_cast<int>(sizeof(Parameters) + 2 * sizeof(float) * plan.blocks);
                             return plan.groups * static_cast<int>(sizeof(Means)) + plan.channels() * of_channel;
                           }};

template <bool kSilu>
__device__ float gradient(float grad, float z) {
  if (!kSilu) return grad;
  const float gate = sigmoid(z);
  return grad * gate * (1 + z * (1 - gate));
}

// Adds what each channel has in scratch over the block's rows, times factor(channel), and sends it to every block.
template <typename F>
__device__ void send_sums(const float* scratch, float* sums, const SlabPlan& plan, F&& factor) {
  for (int channel = threadIdx.x; channel < plan.channels(); channel += blockDim.x) {
    float sum = 0;
#pragma unroll 8
    for (int row = 0; row < plan.row_threads; row++) sum += scratch[row * plan.channels() + channel];
    sum *= factor(channel);
    for (int rank = 0; rank < plan.blocks; rank++) *in_block(sums + channel, rank) = sum;
  }
}

template <typename Element, bool kSilu>
__global__ void __launch_bounds__(kMaxThreads, 2)
    backward(const __grid_constant__ GroupNormBackward args, const __grid_constant__ SlabPlan plan) {
  extern __shared__ __align__(16) char memory[];
  float* const scratch = reinterpret_cast<float*>(memory + plan.data_bytes(2));
  Parameters* const parameters = reinterpret_cast<Parameters*>(scratch + plan.workers() * kUnit);
  float* const sums = reinterpret_cast<float*>(parameters + plan.channels());  // (blocks, 2, channels): Σ dz, Σ dz · x̂
  Means* const means = reinterpret_cast<Means*>(sums + plan.blocks * 2 * plan.channels());

  const GroupNormShape& shape = args.shape;
  const int width = plan.width, channels = plan.channels();
  const Share share(plan);
  const int first_channel = share.group * width;
  uint4* const units = reinterpret_cast<uint4*>(memory);
  const Column x(args.x, share, plan, units);
  const Column grad(args.grad, share, plan, units + plan.kept * plan.workers());
  const int kept = min(share.steps, plan.kept);
  x.load(kept);
  grad.load(kept);
  commit_copies();
  ptx::barrier_cluster_arrive(ptx::sem_relaxed);  // this block has begun: others may write to it
  for (int i = threadIdx.x; i < channels; i += blockDim.x) {
    const int64_t group = static_cast<int64_t>(share.image) * shape.groups + share.group + i / width;
    const int channel = first_channel + i;
    parameters[i] = {args.mean[group], args.rstd[group], element<Element>(args.weight, channel),
                     element<Element>(args.bias, channel)};
  }
  __syncthreads();
  float mean[kUnit], scale[kUnit], bias[kUnit];
#pragma unroll
  for (int k = 0; k < kUnit; k++) {
    const Parameters of = parameters[share.channel + k];
    mean[k] = of.mean;
    scale[k] = of.weight * of.rstd;
    bias[k] = of.bias;
  }

  float dz_sum[kUnit] = {}, dz_off_sum[kUnit] = {};
  const auto gradients = [&](float (&off)[kUnit], float (&dz)[kUnit], const uint4& x_unit, const uint4& grad_unit) {
    unpack<Element>(off, x_unit);
    unpack<Element>(dz, grad_unit);
#pragma unroll
    for (int k = 0; k < kUnit; k++) {
      off[k] -= mean[k];
      dz[k] = gradient<kSilu>(dz[k], off[k] * scale[k] + bias[k]);
    }
  };
  const auto add = [&](const uint4& x_unit, const uint4& grad_unit) {
    float off[kUnit], dz[kUnit];
    gradients(off, dz, x_unit, grad_unit);
#pragma unroll
    for (int k = 0; k < kUnit; k++) {
      dz_sum[k] += dz[k];
      dz_off_sum[k] += dz[k] * off[k];
    }
    return pack<Element>(dz);
  };
  wait_copies<0>();
#pragma unroll 1
  for (int i = 0; i < kept; i++) {
    const uint4 dz = add(x.kept(i), grad.kept(i));
    if (kSilu) grad.kept(i) = dz;
  }
#pragma unroll 1
  for (int i = kept; i < share.steps; i++) add(x.far(i), grad.far(i));

  float* const sums_here = sums + share.rank * 2 * channels;
  share_values(dz_sum, scratch, share);
  ptx::barrier_cluster_wait();
  __syncthreads();
  send_sums(scratch, sums_here, plan, [](int) { return 1.f; });
  __syncthreads();
  share_values(dz_off_sum, scratch, share);
  __syncthreads();
  send_sums(scratch, sums_here + channels, plan, [&](int channel) { return parameters[channel].rstd; });
  sync_cluster();

  for (int i = threadIdx.x; i < 2 * channels; i += blockDim.x) {
    float sum = 0;
    for (int rank = 0; rank < plan.blocks; rank++) sum += sums[rank * 2 * channels + i];
    sums[i] = sum;
    if (args.sums != nullptr && share.rank == 0)
      args.sums[(2ll * share.image + i / channels) * shape.channels + first_channel + i % channels] = sum;
  }
  if (args.dx.data == nullptr) return;
  __syncthreads();
  const float count = static_cast<float>(shape.rows * width);
  for (int group = threadIdx.x / 32; group < plan.groups; group += blockDim.x / 32) {
    float dz = 0, dz_x = 0;
    for (int channel = group * width + threadIdx.x % 32; channel < (group + 1) * width; channel += 32) {
      dz += sums[channel] * parameters[channel].weight;
      dz_x += sums[channels + channel] * parameters[channel].weight;
    }
    dz = warp_sum(dz);
    dz_x = warp_sum(dz_x);
    if (threadIdx.x % 32 == 0) means[group] = {dz / count, dz_x / count};
  }
  __syncthreads();

  float shift[kUnit], slope[kUnit];
  share.each_channel(width, [&](int k, int group) {
    const float rstd = parameters[share.channel + k].rstd;
    shift[k] = rstd * means[group].dz;
    slope[k] = rstd * rstd * means[group].dz_x;
  });
  const Column dx(args.dx, share, plan, nullptr);
  const auto write = [&](int i, float (&off)[kUnit], const float (&dz)[kUnit]) {
#pragma unroll
    for (int k = 0; k < kUnit; k++) off[k] = dz[k] * scale[k] - shift[k] - off[k] * slope[k];
    dx.far(i) = pack<Element>(off);
  };
#pragma unroll 1
  for (int i = 0; i < kept; i++) {
    float off[kUnit], dz[kUnit];
    unpack<Element>(off, x.kept(i));
    unpack<Element>(dz, grad.kept(i));
#pragma unroll
    for (int k = 0; k < kUnit; k++) off[k] -= mean[k];
    write(i, off, dz);
  }
#pragma unroll 1
  for (int i = kept; i < share.steps; i++) {
    float off[kUnit], dz[kUnit];
    gradients(off, dz, x.far(i), grad.far(i));
    write(i, off, dz);
  }
}

constexpr int kAdders = 16;

// dbias and dweight, each of whose channels is a column of sums (M, 2 · C). A block: 32 columns, a warp every
// kAdders-th m.
template <typename Element>
__global__ void __launch_bounds__(32 * kAdders) affine_gradients(const __grid_constant__ GroupNormBackward args) {
  __shared__ float partial[kAdders][32];
  const int lane = threadIdx.x % 32, adder = threadIdx.x / 32, columns = 2 * args.shape.channels;
  const int column = blockIdx.x * 32 + lane, channel = column % args.shape.channels;
  const ChannelsView& target = column < args.shape.channels ? args.dbias : args.dweight;
  const bool asked = column < columns && target.data != nullptr;
  float sum = 0;
  if (asked) {
#pragma unroll 4
    for (int64_t m = adder; m < args.shape.images; m += kAdders) sum += args.sums[m * columns + column];
  }
  partial[adder][lane] = sum;
  __syncthreads();
  if (adder != 0 || !asked) return;
  for (int other = 1; other < kAdders; other++) sum += partial[other][lane];
  if (target.is_float)
    static_cast<float*>(target.data)[channel * target.stride] = sum;
  else
    static_cast<uint16_t*>(target.data)[channel * target.stride] = static_cast<uint16_t>(pack<Element>(sum, 0));
}

}  // namespace

void group_norm_silu_backward(const GroupNormBackward& args, int device, cudaStream_t stream) {
  const SlabPlan plan = plan_slabs(args.shape, kNeeds);
  if (plan.groups == 0) throw std::invalid_argument("group_norm_silu: slabs that fit in a cluster needed");
  const DeviceGuard guard(device);
  dispatch(args.shape, [&](auto element, auto silu) {
    using Element = decltype(element);
    static OncePerDevice once;
    launch_slabs(backward<Element, silu()>, once, args, plan, device, stream);
    if (args.sums == nullptr) return;
    static OncePerDevice once_for_affine;
    load(once_for_affine, device, affine_gradients<Element>);
    affine_gradients<Element><<<(2 * args.shape.channels + 31) / 32, 32 * kAdders, 0, stream>>>(args);
    check(cudaGetLastError(), "group_norm_silu");
  });
}

}  // namespace univid
