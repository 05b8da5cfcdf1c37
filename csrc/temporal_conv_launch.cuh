// How temporal_conv's kernels are launched, by whom they are.
#pragma once

#include "temporal_conv.cuh"

namespace univid {
namespace {

template <class C>
Schedule schedule_for(const Tiling& tiling, int device) {
  return share_out(tiling, num_processors(device) / C::kCluster);
}

int64_t flags_bytes(const Schedule& schedule, int of_worker) {
  return (schedule.workers * of_worker * 4 + 15) / 16 * 16;
}

template <class C>
int64_t workspace_for(const Tiling& tiling, int device) {
  const Schedule schedule = schedule_for<C>(tiling, device);
  if (!schedule.cuts()) return 0;
  return flags_bytes(schedule, C::kCluster * C::kGroups) + int64_t{schedule.workers} * C::kCluster * C::kPartialBytes;
}

template <typename Element, class C, Kind kKind>
void launch(Arguments args, void* workspace, int device, cudaStream_t stream) {
  static_assert(kSharedBytes<C> <= 227 * 1024);
  constexpr const char* kName = kKind == Kind::kGated ? "linear_geglu" : "temporal_conv";
  args.schedule = schedule_for<C>(args.tiling, device);
  if (args.schedule.cuts()) {
    const int64_t size = flags_bytes(args.schedule, C::kCluster * C::kGroups);
    args.flags = static_cast<uint32_t*>(workspace);
    args.partials = reinterpret_cast<float4*>(static_cast<char*>(workspace) + size);
    check(cudaMemsetAsync(args.flags, 0, size, stream), kName);
  }
  static OncePerDevice once;
  prepare(once, convolve<Element, C, kKind>, device);
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
  check(cudaLaunchKernelEx(&config, convolve<Element, C, kKind>, args), kName);
}

template <typename F>
void with_element(DType dtype, F&& f) {
  if (dtype == DType::kBFloat16)
    f(__nv_bfloat16());
  else
    f(__half());
}

}  // namespace
}  // namespace univid
