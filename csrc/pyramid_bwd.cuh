// What the kernels of pyramid attention's backward share: how they keep facts about queries.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "hopper/launch.cuh"
#include "pyramid.h"

namespace univid {

constexpr char kWhat[] = "pyramid_st_attn backward";  // in errors

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
    // A tile's number has kStepBits bits below it.
    if (count > INT32_MAX / 8) throw std::invalid_argument("too many queries");
  }
};

// dQ alone, in a fixed order (pyramid_bwd_dq.cu), from the statistics of all tiles of queries.
void pyramid_st_attn_dq(const PyramidBackward& args, const float* statistics, int device, cudaStream_t stream);

}  // namespace univid
