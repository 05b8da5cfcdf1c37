// Tiles of keys that several blocks share, each taking a part of the queries.
//
// Where all queries are one long one, all tiles that are read take the same time, and the last round of them leaves
// most multiprocessors idle. So those of the last round are done in parts: each writes its float32 dK and dV to device
// memory, and who comes last adds them up, in their order: the result does not depend on who that is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pyramid_bwd.cuh"

namespace univid {

constexpr int kKeyUnits = 2;                              // of 64 keys, in a tile
constexpr int kPartFloats = 2 * kKeyUnits * kTileFloats;  // of dK and dV

constexpr int kCounters = 512;

struct Split {
  int from = 0, count = 0;  // tiles from..from + count - 1 are split
  int parts = 1;
};

// How to split the last of `tiles` equal tiles of `steps` queries by 64.
inline Split split_last_round(int64_t tiles, int64_t steps, int processors) {
  // In steps: what a tile costs besides, and what a part costs besides.
  constexpr double kTileCost = 2, kPartCost = 6;
  Split split;
  const int rest = static_cast<int>(tiles % processors);
  if (rest == 0 || 1 + rest * kKeyUnits > kCounters) return split;
  double best = (steps + kTileCost) * 0.95;
  for (int parts = 2; rest * parts <= 4 * processors && parts * 2 <= steps; parts++) {
    const double cost = (rest * parts + processors - 1) / processors * (double(steps) / parts + kPartCost);
    if (cost < best) best = cost, split = {static_cast<int>(tiles - rest), rest, parts};
  }
  return split;
}

// A lane's numbers of a warpgroup's dK and dV.
template <bool kDK, bool kDV>
__device__ inline void write_part(float* to, const float (&dk)[32], const float (&dv)[32]) {
  const auto write = [](float* to, const float (&d)[32]) {
#pragma unroll
    for (int j = 0; j < 8; j++)
      __stcg(reinterpret_cast<float4*>(to + 512 * j), float4{d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
  };
  to += threadIdx.x % 128 * 4;
  if (kDK) write(to, dk);
  if (kDV) write(to + kTileFloats, dv);
}

// Their sums over all parts.
template <bool kDK, bool kDV>
__device__ inline void add_parts(const float* from, int parts, float (&dk)[32], float (&dv)[32]) {
  const auto add = [](const float* from, float (&d)[32]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(from + 512 * j));
      d[4 * j] += x.x;
      d[4 * j + 1] += x.y;
      d[4 * j + 2] += x.z;
      d[4 * j + 3] += x.w;
    }
  };
#pragma unroll
  for (int i = 0; i < 32; i++) dk[i] = dv[i] = 0;
  from += threadIdx.x % 128 * 4;
  for (int part = 0; part < parts; part++, from += kPartFloats) {
    if (kDK) add(from, dk);
    if (kDV) add(from + kTileFloats, dv);
  }
}

}  // namespace univid
