// What temporal_conv does with its sums: bias and residual are added in float32, and the results leave a warp as parts
// of 16 x 32, rounded once.
#pragma once

#include "hopper/wgmma.cuh"
#include "temporal_conv_plan.h"

namespace univid {

constexpr int kPartColumns = 32, kPartBytes = 16 * kPartColumns * 2;

struct Addends {
  int columns;                                                  // of out
  const char *bias, *residual;                                  // null: there is none
  int64_t bias_stride_b, residual_stride_b, residual_stride_n;  // bytes
};

// Four lanes hold four words each of a row: word i of lane q becomes word q of lane i.
__device__ inline void transpose_quad(uint4& words, int lane) {
  const auto exchange = [](uint32_t& low, uint32_t& high, bool keeps_high, int distance) {
    const uint32_t other = __shfl_xor_sync(~0u, keeps_high ? low : high, distance);
    (keeps_high ? low : high) = other;
  };
  exchange(words.x, words.y, lane & 1, 1);
  exchange(words.z, words.w, lane & 1, 1);
  exchange(words.x, words.z, lane & 2, 2);
  exchange(words.y, words.w, lane & 2, 2);
}

// Where a warp's results of a block of rows go.
struct Target {
  const char *bias, *residual;  // at the lane's first two columns; at its row and first eight columns
  int row, clip;                // of the warp's first row
  bool exists[2];               // the lane's rows, 8 apart

  __device__ Target(const Tiling& t, const Addends& addends, int block, int warp, int lane) {
    const Rows rows(t, block);
    row = rows.row + warp * 16;
    clip = rows.clip;
    const int own = row + lane / 4;
    exists[0] = own < t.rows;
    exists[1] = own + 8 < t.rows;
    bias = addends.bias + clip * addends.bias_stride_b + lane % 4 * 4;
    residual = addends.residual + clip * addends.residual_stride_b + own * addends.residual_stride_n + lane % 4 * 16;
  }

  // The residual of a part: of the lane's rows eight columns, of its place in its quad.
  __device__ void load(const Addends& addends, int column, int lane, uint4 (&to)[2]) const {
    if (addends.residual == nullptr) return;
    const bool inside = column + lane % 4 * 8 < addends.columns;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const char* at = residual + 8 * r * addends.residual_stride_n + column * 2;
      to[r] = exists[r] && inside ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{};
    }
  }
};

// Adds to 16 x 32 sums, and leaves them, rounded, in a slot of 64-byte rows in the 64-byte swizzle.
template <typename Element>
__device__ void finish_part(const Addends& addends, const Target& target, int column, uint4 (&residual)[2], float* sums,
                            char* slot, int lane) {
  const auto add = [&](uint32_t pair, float* to) {
    float low, high;
    hopper::unpack<Element>(pair, low, high);
    to[0] += low;
    to[1] += high;
  };
  if (addends.bias != nullptr)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (column + 8 * j < addends.columns) {
        const uint32_t pair = __ldg(reinterpret_cast<const uint32_t*>(target.bias + (column + 8 * j) * 2));
        add(pair, sums + 4 * j);
        add(pair, sums + 4 * j + 2);
      }
  if (addends.residual != nullptr)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint4& words = residual[r];
      transpose_quad(words, lane);
      add(words.x, sums + 2 * r);
      add(words.y, sums + 4 + 2 * r);
      add(words.z, sums + 8 + 2 * r);
      add(words.w, sums + 12 + 2 * r);
    }
  const int row = lane % 16;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(slot)) + row * 64;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float* of = sums + 8 * i;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     base + (((2 * i + lane / 16) ^ (row / 2 % 4)) << 4)),
                 "r"(hopper::pack<Element>(of[0], of[1])), "r"(hopper::pack<Element>(of[2], of[3])),
                 "r"(hopper::pack<Element>(of[4], of[5])), "r"(hopper::pack<Element>(of[6], of[7]))
                 : "memory");
  }
}

}  // namespace univid
