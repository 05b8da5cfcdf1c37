// What linear_geglu does with sums: value · GELU(gate) in float32, rounded once. A lane has both of a column, in the
// halves of its sums.
#pragma once

#include "temporal_conv_results.cuh"

namespace univid {

struct Gated {
  char* out;          // (rows, columns), contiguous
  int rows, columns;  // columns a multiple of 8
  const char* bias;   // of the values, then of the gates; null: there is none
};

// x · Φ(x) = max(x, 0) - |x| · Φ(-|x|). The logarithm of Φ(-z) is nearly a parabola: a polynomial of the sixth degree,
// fitted on [0, 7], has it so that Φ(-z) is wrong by less than 1e-5 of itself up to 3.5, and z · Φ(-z) by less than
// 2e-6 anywhere. From 13.5 on, where the polynomial would rise again, it is 4e-32. NaN stays NaN; -inf gives that too.
__device__ inline float gelu(float x) {
  float z, above, tail;
  asm("min.NaN.f32 %0, %1, 0f41580000;" : "=f"(z) : "f"(fabsf(x)));
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(above) : "f"(x));
  float p = 3.1665105780e-05f;
  p = fmaf(p, z, -7.3872169014e-04f);
  p = fmaf(p, z, 7.8971069306e-03f);
  p = fmaf(p, z, -5.2955057472e-02f);
  p = fmaf(p, z, -4.5926403999e-01f);
  p = fmaf(p, z, -1.1510035992f);
  p = fmaf(p, z, -1.0000094175f);
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(p));
  return fmaf(-z, tail, above);
}

// A warp's results leave it as parts of 16 rows and so many columns of out.
template <int kColumns>
constexpr int kGatedPartColumns = kColumns / 4;

// What a tile's sums begin with: a lane's two columns of each eight, for both of its rows.
template <typename Element, int kColumns, int kActive>
__device__ void begin_with_bias(const Gated& gated, int column, float (*sums)[kColumns / 2], int lane) {
  const char* const from = gated.bias + (column + lane % 4 * 2) * 2;
#pragma unroll
  for (int i = 0; i < kColumns / 8; i++) {
    const int eight = i % (kColumns / 16);
    const char* const at = (i == eight ? from : from + gated.columns * 2) + eight * 16;
    const uint32_t pair = column + 8 * eight < gated.columns ? __ldg(reinterpret_cast<const uint32_t*>(at)) : 0;
    float low, high;
    hopper::unpack<Element>(pair, low, high);
    // Where an instruction for floats defines what products add to, ptxas serialises them (C7515).
    if constexpr (std::is_same_v<Element, __half>) {
      const uint32_t nothing = gated.rows >> 31;  // which the compiler cannot know
      low = __uint_as_float(__float_as_uint(low) ^ nothing);
      high = __uint_as_float(__float_as_uint(high) ^ nothing);
    }
#pragma unroll
    for (int b = 0; b < kActive; b++) {
      sums[b][4 * i] = sums[b][4 * i + 2] = low;
      sums[b][4 * i + 1] = sums[b][4 * i + 3] = high;
    }
  }
}

// A part's results, rounded: of each eight columns a word of the lane's upper row, and one of its lower row.
template <typename Element, int kColumns>
__device__ void finish_gated(const float (&sums)[kColumns / 2], int part, uint32_t (&words)[kColumns / 16]) {
#pragma unroll
  for (int i = 0; i < kColumns / 16; i++) {
    const float *values = sums + (part * (kColumns / 16) + i) * 2, *gates = values + kColumns / 4;
    words[i] = hopper::pack<Element>(values[0] * gelu(gates[0]), values[1] * gelu(gates[1]));
  }
}

// Writes them, through a slot of 16 rows: quads of lanes hold a row's words, a lane writes 16 bytes. Rows of 80 bytes
// meet no bank twice.
template <int kWords>
__device__ void write_gated(const Gated& gated, int row, int column, const uint32_t (&words)[kWords], char* slot,
                            int lane) {
  constexpr int kUnits = kWords / 2;  // of 16 bytes, in a row
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(slot));
  const uint32_t to = base + (lane % 16 * kUnits + lane / 16) * 16;
  __syncwarp();  // the slot is free
#pragma unroll
  for (int i = 0; i + 4 <= kWords; i += 4)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 8), "r"(words[i]),
                 "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                 : "memory");
  if constexpr (kWords % 4 == 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to + (kWords - 2) * 8),
                 "r"(words[kWords - 2]), "r"(words[kWords - 1])
                 : "memory");
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kUnits; i += 32) {
    const int unit = i + lane, to_row = row + unit / kUnits, to_column = column + unit % kUnits * 8;
    if (unit < 16 * kUnits && to_row < gated.rows && to_column < gated.columns)
      *reinterpret_cast<uint4*>(gated.out + (int64_t{to_row} * gated.columns + to_column) * 2) =
          reinterpret_cast<const uint4*>(slot)[unit];
  }
}

}  // namespace univid
