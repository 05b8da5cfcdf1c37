// What the kernels of dual-stream attention's backward share.
#pragma once

#include "dual_stream.cuh"

namespace univid {

// What dK and dV need to know of a tile of queries. Of each stream, for 64 queries each: logsumexps in powers of two
// (inf: this query adds nothing), deltas (rowsum(P∘dP)), weights.
constexpr int kOfStream = 3 * kRows;
constexpr int kStatistics = 2 * kOfStream;

__device__ inline void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_former() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Launches a kernel that may begin before the one ahead of it in the stream has ended, and waits itself.
template <typename... Parameters>
void launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                  std::type_identity_t<Parameters>... parameters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, parameters...), "dual_stream_attn backward");
}

// The statistics and, where it is asked for, dQ (dual_stream_bwd_dq.cu).
void dual_stream_attn_queries(const DualStreamBackward& args, const Queries& queries, float* statistics, int device,
                              cudaStream_t stream);

}  // namespace univid
