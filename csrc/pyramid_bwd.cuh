// What the kernels of pyramid attention's backward share: how they keep facts about queries, and how they follow each
// other.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "pyramid.h"

namespace univid {

constexpr int kUnit = 64;                   // queries of a tile; keys of a warpgroup
constexpr int kTileBytes = kUnit * 64 * 2;  // 64 tokens of one head
constexpr int kTileFloats = kUnit * 64;     // of dQ
constexpr int kStatistics = 2 * kUnit;      // of a tile of queries: logsumexps in powers of two (inf: this query adds
                                            // nothing), then deltas, rowsum(dO∘O)

// The queries in tiles of 64: those of a (clip, head, group) one after the other. A group is a frame, or all frames as
// one long query.
struct QueryTiles {
  int64_t groups, rows, per_group, count;

  QueryTiles(const PyramidShape& shape, bool one_query)
      : groups(one_query ? 1 : shape.frames),
        rows(shape.frames * shape.tokens / groups),
        per_group((rows + kUnit - 1) / kUnit),
        count(shape.batch * shape.heads * groups * per_group) {
    if (count > INT32_MAX) throw std::invalid_argument("too many queries");
  }
};

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
  check(cudaLaunchKernelEx(&config, kernel, parameters...), "pyramid_st_attn backward");
}

__device__ inline void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_former() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// dQ alone, in a fixed order (pyramid_bwd_dq.cu), from the statistics of all tiles of queries.
void pyramid_st_attn_dq(const PyramidBackward& args, const float* statistics, int device, cudaStream_t stream);

}  // namespace univid
