// Kernels that overlap the one ahead of them in the stream (programmatic dependent launch).
#pragma once

#include <type_traits>

#include "../common.h"

namespace univid::hopper {

// Launches a kernel that may begin before the one ahead of it in the stream has ended, and waits itself.
template <typename... Parameters>
void launch_early(const char* what, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
                  cudaStream_t stream, std::type_identity_t<Parameters>... parameters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, parameters...), what);
}

// Before anything in global memory is read or written: waits until the kernel ahead has ended, and lets the next one
// begin. Not earlier, so that no more than two are there at once: what a third one wrote while a block was there might
// not be seen through its L1.
__device__ inline void take_over() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace univid::hopper
