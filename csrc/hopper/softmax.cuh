// The running softmax of a warpgroup's 64 rows, on wgmma's accumulators, without a maximum for every tile.
//
// P = exp2(scale · S - reference): any reference near a row's maximum will do, since numerator and denominator share it
// and floating point keeps the same relative precision at every scale. So a row takes its reference from its first tile
// and keeps it; a tile whose sum shows that P has outgrown kLimit is exponentiated again with its own maximum, and what
// was accumulated is rescaled. That is rare; a search for each tile's maximum, before the first exponential can start,
// is not.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../row.cuh"
#include "wgmma.cuh"

namespace univid::hopper {

// Each lane holds a quarter of two rows, 8 apart: [0] and [1] of the arrays of two.
template <typename Element, int kKeys>
class Softmax {
 public:
  static constexpr int kScores = kKeys / 2;  // of a lane
  static constexpr int kPacked = kKeys / 4;
  using Scores = float[kScores];

  __device__ explicit Softmax(float scale_log2) : scale_(scale_log2) {}

  // A row's first tile.
  __device__ void start(const Scores& s, uint32_t (&p)[kPacked]) {
    reference_[0] = reference_[1] = -INFINITY;
    raise(s);
    total_[0] = total_[1] = 0;
    exponentiate<0, kPacked>(s, p, total_);
  }

  // p = exp2(s) of a part of a tile, in units of two neighbouring scores; sums are added to `sums`. With a 0 that the
  // compiler does not know as `zero`, the multiplications of the second half stand behind the first exponentials, and
  // not all in front of them.
  template <int kBegin, int kEnd>
  __device__ void exponentiate(const Scores& s, uint32_t* p, float (&sums)[2], uint32_t zero = 0) const {
    float scale = scale_;
#pragma unroll
    for (int i = kBegin; i < kEnd; i++) {
      if (i == (kBegin + kEnd) / 2) scale = __uint_as_float(__float_as_uint(scale) | (p[0] & zero));
      const float x = exp2_fast(fmaf(s[2 * i], scale, -reference_[i % 2]));
      const float y = exp2_fast(fmaf(s[2 * i + 1], scale, -reference_[i % 2]));
      sums[i % 2] += x + y;
      p[i - kBegin] = pack<Element>(x, y);
    }
  }

  // Whether no row of the warp has outgrown its reference. False for NaN.
  __device__ static bool fits(const float (&sums)[2]) {
    return __all_sync(~0u, sums[0] <= kLimit && sums[1] <= kLimit);
  }

  // Where some row of the warp has outgrown its reference: makes p again, and its sums, and rescales o.
  __device__ void repeat(const Scores& s, uint32_t (&p)[kPacked], float (&sums)[2], float (&o)[32]) {
    const float former[2] = {reference_[0], reference_[1]};
    raise(s);
    const float factor[2] = {exp2_fast(former[0] - reference_[0]), exp2_fast(former[1] - reference_[1])};
#pragma unroll
    for (int i = 0; i < 32; i++) o[i] *= factor[i / 2 % 2];
    total_[0] *= factor[0];
    total_[1] *= factor[1];
    sums[0] = sums[1] = 0;
    exponentiate<0, kPacked>(s, p, sums);
  }

  __device__ void add(const float (&sums)[2]) {
    total_[0] += sums[0];
    total_[1] += sums[1];
  }

  // o divided by the rows' sums; logsumexp in natural units.
  __device__ void divide(const float (&o)[32], float (&result)[32], float (&logsumexp)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float total = row_sum(total_[r]);
      logsumexp[r] = (reference_[r] + __log2f(total)) * 0.69314718f;
      total_[r] = __frcp_rn(total);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) result[i] = o[i] * total_[i / 2 % 2];
  }

 private:
  // What one lane's part of a tile may sum to: P stays within float16, and products with V within float32.
  static constexpr float kLimit = std::is_same_v<Element, __half> ? 0x1p14f : 0x1p16f;

  __device__ void raise(const Scores& s) {
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kScores; i++) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) reference_[r] = fmaxf(reference_[r], row_max(peak[r]) * scale_);
  }

  float scale_;
  float reference_[2];
  float total_[2];
};

}  // namespace univid::hopper
