// What the kernels of dual-stream attention's backward share.
#pragma once

#include "dual_stream.cuh"
#include "hopper/launch.cuh"

namespace univid {

constexpr char kWhat[] = "dual_stream_attn backward";  // in errors

// What dK and dV need to know of a tile of queries. Of each stream, for 64 queries each: logsumexps in powers of two
// (inf: this query adds nothing), deltas (rowsum(P∘dP)), weights.
constexpr int kOfStream = 3 * kRows;
constexpr int kStatistics = 2 * kOfStream;

// The statistics and, where it is asked for, dQ (dual_stream_bwd_dq.cu).
void dual_stream_attn_queries(const DualStreamBackward& args, const Queries& queries, float* statistics, int device,
                              cudaStream_t stream);

}  // namespace univid
