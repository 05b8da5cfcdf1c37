// What linear_geglu does with sums: value · GELU(gate) in float32, rounded once. A lane has both of a column, in the
// halves of its sums, so that nothing moves but what quads of lanes exchange to write 16 bytes each.
#pragma once

#include "temporal_conv_results.cuh"

namespace univid {

struct Gated {
  char* out;          // (rows, columns), contiguous
  int rows, columns;  // columns a multiple of 8
  const char* bias;   // of the values, then of the gates; null: there is none
};

// x · Φ(x). Φ(-|x|) = erfc(|x|/√2) / 2 is one over a polynomial to the 16th (Abramowitz and Stegun 7.1.28, whose error
// is below 3e-7), with the square root of 2 and the half in its coefficients.
__device__ inline float gelu(float x) {
  const float z = fabsf(x);
  float p = 5.6212996640e-06f;
  p = fmaf(p, z, 5.1055209009e-05f);
  p = fmaf(p, z, 3.9686137011e-05f);
  p = fmaf(p, z, 3.4227392389e-03f);
  p = fmaf(p, z, 2.2076998457e-02f);
  p = fmaf(p, z, 5.2075163037e-02f);
  p = fmaf(p, z, 1.0442737824f);
  p *= p;
  p *= p;
  p *= p;
  p *= p;
  float tail;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(p));
  return x * (x > 0 ? 1 - tail : tail);
}

// Eight columns of a row, of 16 rows whose lower eight are 8 further on.
struct Unit {
  bool is_low;
  int eight;
};

// Unit i in the order in which quads of lanes take them: four by four those of upper rows, of lower ones, then the
// rest.
template <int kEights>
__device__ Unit unit_of(int i) {
  constexpr int kFull = kEights / 4 * 4, kRest = kEights - kFull;
  if constexpr (kRest == 0)
    return {i >= kFull, i % kFull};
  else if (i < 2 * kFull)
    return {i >= kFull, i % kFull};
  else
    return {i - 2 * kFull >= kRest, kFull + (i - 2 * kFull) % kRest};
}

// Of a warp's 16 rows, sums of kColumns columns: values, and behind them gates.
template <typename Element, int kColumns>
__device__ void store_gated(const Gated& gated, int row, int column, const float (&sums)[kColumns / 2], int lane) {
  constexpr int kEights = kColumns / 16;  // of columns of out
  static_assert(kEights % 2 == 0);
  const auto add_bias = [&](int at, const float* sums) {
    float low = 0, high = 0;
    if (gated.bias != nullptr)
      hopper::unpack<Element>(__ldg(reinterpret_cast<const uint32_t*>(gated.bias + at * 2)), low, high);
    return float2{sums[0] + low, sums[1] + high};
  };
  // Two columns of eight j of the lane's upper or lower row.
  const auto word = [&](bool is_low, int j) {
    const int at = min(column + 8 * j, gated.columns - 8) + lane % 4 * 2;
    const float* of = sums + 4 * j + 2 * is_low;
    const float2 value = add_bias(at, of), gate = add_bias(gated.columns + at, of + kColumns / 4);
    return hopper::pack<Element>(value.x * gelu(gate.x), value.y * gelu(gate.y));
  };
#pragma unroll
  for (int i = 0; i < kEights / 2; i++) {
    const auto word_of = [&](int k) {
      const Unit unit = unit_of<kEights>(4 * i + k);
      return word(unit.is_low, unit.eight);
    };
    uint4 own{word_of(0), word_of(1), word_of(2), word_of(3)};
    transpose_quad(own, lane);
    const Unit unit = unit_of<kEights>(4 * i + lane % 4);
    const int to_row = row + lane / 4 + 8 * unit.is_low, to_column = column + 8 * unit.eight;
    if (to_row < gated.rows && to_column < gated.columns)
      *reinterpret_cast<uint4*>(gated.out + (int64_t{to_row} * gated.columns + to_column) * 2) = own;
    __syncwarp();  // or more registers go into what is ahead than there are
  }
}

}  // namespace univid
