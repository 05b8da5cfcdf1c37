// What temporal_attn's forward and backward share: a warp owns one (b, n, h), whose T x D slices of q, k, v are its
// tiles.
//
// A tile lies in shared memory with T rows, none added: where a 16-row block ends past T, lanes read the last row again
// and what they computed there is masked or not stored. Rows are D rounded up to 16 elements (columns added are zero)
// and 16 bytes more, an odd number of 16-byte units, so that eight rows read at one column fall into different banks.
//
// kBlocks, T rounded up to 16, 32 or 64 in 16s, is a template argument since registers hold the T x T matrices. D is
// one where it is common and 0 elsewhere: it only counts iterations.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "temporal.h"
#include "warp.cuh"

namespace univid {

// A 16·kBlocks x 16·kBlocks matrix: [i][j] is the block of rows 16·i and columns 16·j.
template <int kBlocks>
using Matrix = Fragment[kBlocks][kBlocks];

__host__ __device__ inline int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }
__host__ __device__ inline int row_bytes(int head_dim) { return padded_dim(head_dim) * 2 + 16; }

template <typename Element, int kBlocks, int kHeadDim>
class Tiles {
 public:
  // `index` counts the (b, n, h), h fastest: neighbouring warps read neighbouring memory.
  __device__ Tiles(const TemporalShape& shape, uint64_t index, uint32_t shared)
      : shared_(shared), frames_(shape.frames), head_dim_(shape.head_dim), lane_(threadIdx.x % 32) {
    h = index % shape.heads;
    n = index / shape.heads % shape.tokens;
    b = index / shape.heads / shape.tokens;
    const int swapped = lane_ & 7 | (lane_ & 8) << 1 | (lane_ & 16) >> 1;
#pragma unroll
    for (int i = 0; i < kBlocks; i++) {
      fragment_[i] = fragment_offset(i, lane_);
      swapped_[i] = fragment_offset(i, swapped);
    }
  }

  int64_t b, n, h;

  __device__ int frames() const { return frames_; }
  __device__ int row() const { return lane_ / 4; }         // of an accumulator's [0] and [1]
  __device__ int column() const { return lane_ % 4 * 2; }  // of its [0] and [2]

  // Starts the copies of a tensor's slice into a tile.
  __device__ void load(int tile, const TensorView& source) const {
    const char* global = slice(source);
    const int64_t stride = source.stride_t * 2;
    if constexpr (kHeadDim != 0) {
      const uint32_t shared = address(tile) + unit_row() * pitch() + unit_column();
      global += unit_row() * stride + unit_column();
#pragma unroll
      for (int row = 0; row < 16 * kBlocks; row += kRows, global += kRows * stride)
        if (row + unit_row() < frames_) copy_async(shared + row * pitch(), global);
    } else {
      each_unit([&](int row, int column) {
        copy_async(address(tile) + row * pitch() + column, global + row * stride + column);
      });
      if (head_dim() % 16 != 0)
#pragma unroll 1
        for (int row = lane_; row < frames_; row += 32)
          store_shared(address(tile) + row * pitch() + head_dim() * 2, make_uint4(0, 0, 0, 0));
    }
  }

  // Writes a tile to a tensor's slice, 16 bytes a lane.
  __device__ void store(int tile, const TensorView& target) const {
    __syncwarp();
    char* global = slice(target);
    const int64_t stride = target.stride_t * 2;
    if constexpr (kHeadDim != 0) {
      const uint32_t shared = address(tile) + unit_row() * pitch() + unit_column();
      global += unit_row() * stride + unit_column();
#pragma unroll
      for (int row = 0; row < 16 * kBlocks; row += kRows, global += kRows * stride)
        if (row + unit_row() < frames_) *reinterpret_cast<uint4*>(global) = load_shared(shared + row * pitch());
    } else {
      each_unit([&](int row, int column) {
        *reinterpret_cast<uint4*>(global + row * stride + column) = load_shared(address(tile) + row * pitch() + column);
      });
    }
  }

  // s = rows 16·i to 16·i + 15 of tile a times tile b transposed.
  __device__ void multiply_transposed(Accumulator (&s)[2 * kBlocks], int i, int tile_a, int tile_b) const {
#pragma unroll
    for (int j = 0; j < 2 * kBlocks; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[j][e] = 0;
#pragma unroll(kHeadDim ? 4 : 1)
    for (int column = 0; column < padded(); column += 16) {
      Fragment a, b;
      load_fragment(a, address(tile_a) + fragment_[i] + column * 2);
#pragma unroll
      for (int j = 0; j < kBlocks; j++) {
        load_fragment(b, address(tile_b) + swapped_[j] + column * 2);
        univid::multiply<Element>(s[2 * j], a, b[0], b[1]);
        univid::multiply<Element>(s[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // Tile out = factor · p · tile b, rounded; `out` is not `b`.
  __device__ void multiply(int out, const Matrix<kBlocks>& p, int tile_b, float factor) const {
    __syncwarp();  // whoever read `out` has done so
#pragma unroll(kHeadDim ? 2 : 1)
    for (int column = 0; column < padded(); column += 16) {
      Fragment b[kBlocks];
#pragma unroll
      for (int j = 0; j < kBlocks; j++) load_fragment_transposed(b[j], address(tile_b) + fragment_[j] + column * 2);
#pragma unroll
      for (int i = 0; i < kBlocks; i++) {
        Accumulator o[2] = {};
#pragma unroll
        for (int j = 0; j < kBlocks; j++) {
          univid::multiply<Element>(o[0], p[i][j], b[j][0], b[j][1]);
          univid::multiply<Element>(o[1], p[i][j], b[j][2], b[j][3]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = 16 * i + 8 * half + this->row();
          if (row >= frames_) continue;
#pragma unroll
          for (int side = 0; side < 2; side++)
            store_shared(address(out) + row * pitch() + (column + 8 * side + this->column()) * 2,
                         pack<Element>(o[side][2 * half] * factor, o[side][2 * half + 1] * factor));
        }
      }
    }
  }

  // The softmax of rows of products, in place; `scale` holds log2(e). peak[half] is a row's largest product and
  // total[half] what its exponentials were divided by, half 0 being an accumulator's first row.
  __device__ void softmax(Accumulator (&s)[2 * kBlocks], float scale, float (&peak)[2], float (&total)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      peak[half] = -INFINITY;
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const bool may_be_past = kBlocks == 1 || j >= kBlocks;
          if (may_be_past && 8 * j + column() + e % 2 >= frames_) s[j][e] = -INFINITY;
          peak[half] = fmaxf(peak[half], s[j][e]);
        }
      peak[half] = row_max(peak[half]);
      const float shift = peak[half] * scale;
      total[half] = 0;
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          s[j][e] = exp2_fast(fmaf(s[j][e], scale, -shift));
          total[half] += s[j][e];
        }
      total[half] = row_sum(total[half]);
      const float inverse = __fdividef(1.f, total[half]);
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) s[j][e] *= inverse;
    }
  }

 private:
  __device__ int head_dim() const { return kHeadDim ? kHeadDim : head_dim_; }
  __device__ int padded() const { return padded_dim(head_dim()); }
  __device__ int pitch() const { return row_bytes(head_dim()); }
  __device__ uint32_t address(int tile) const { return shared_ + tile * frames_ * pitch(); }

  __device__ char* slice(const TensorView& x) const {
    return static_cast<char*>(x.data) + (b * x.stride_b + n * x.stride_n + h * x.stride_h) * 2;
  }

  __device__ int fragment_offset(int block, int lane) const {
    return min(16 * block + lane % 16, frames_ - 1) * pitch() + lane / 16 * 16;
  }

  // Where D is known, a warp moves kRows rows of a tile at a time; 16 bytes at (unit_row, unit_column) are this lane's.
  static constexpr int kUnits = kHeadDim ? kHeadDim / 8 : 32;
  static constexpr int kRows = 32 / kUnits;
  __device__ int unit_row() const { return lane_ / kUnits; }
  __device__ int unit_column() const { return lane_ % kUnits * 16; }

  // Where it is not: calls f(row, column in bytes) for this lane's share of a tile's 16-byte units.
  template <typename F>
  __device__ void each_unit(F f) const {
    const int units = head_dim() / 8;
    int row = lane_ / units, unit = lane_ % units;
#pragma unroll 4
    while (row < frames_) {
      f(row, unit * 16);
      row += 32 / units;
      unit += 32 % units;
      if (unit >= units) unit -= units, row++;
    }
  }

  uint32_t shared_;
  int frames_, head_dim_, lane_;
  int fragment_[kBlocks];  // for each 16 rows, the offset in a tile that this lane gives to load their fragment
  int swapped_[kBlocks];  // the same for one with quarters 1 and 2 swapped, so that a product's operands are neighbours
};

// Rounds a row of accumulators.
template <typename Element, int kBlocks>
__device__ void pack_row(Fragment (&p)[kBlocks], const Accumulator (&s)[2 * kBlocks]) {
#pragma unroll
  for (int j = 0; j < kBlocks; j++)
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const Accumulator& x = s[2 * j + q / 2];
      p[j][q] = pack<Element>(x[q % 2 * 2], x[q % 2 * 2 + 1]);
    }
}

// t = a transposed.
__device__ inline void transpose(Fragment& t, const Fragment& a) {
#pragma unroll
  for (int q = 0; q < 4; q++) t[q] = transpose_quarter(a[q % 2 * 2 + q / 2]);
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMaxFrames = 64;
constexpr int kMaxHeadDim = 128;
constexpr int kMaxWarps = 4;

// Calls f(element, blocks, head_dim) with the template arguments as types and constants.
template <typename F>
void dispatch(const TemporalShape& shape, F f) {
  if (shape.frames < 1 || shape.frames > kMaxFrames) throw std::invalid_argument("temporal_attn: T must be 1 to 64");
  if (shape.head_dim < 8 || shape.head_dim > kMaxHeadDim || shape.head_dim % 8 != 0)
    throw std::invalid_argument("temporal_attn: D must be a multiple of 8, 8 to 128");
  const auto with_head_dim = [&](auto element, auto blocks) {
    if constexpr (blocks < 4) {  // with more, registers are too short to unroll what a known D would let
      if (shape.head_dim == 32) return f(element, blocks, std::integral_constant<int, 32>{});
      if (shape.head_dim == 64) return f(element, blocks, std::integral_constant<int, 64>{});
      if (shape.head_dim == 128) return f(element, blocks, std::integral_constant<int, 128>{});
    }
    return f(element, blocks, std::integral_constant<int, 0>{});
  };
  const auto with_frames = [&](auto element) {
    if (shape.frames <= 16) return with_head_dim(element, std::integral_constant<int, 1>{});
    if (shape.frames <= 32) return with_head_dim(element, std::integral_constant<int, 2>{});
    return with_head_dim(element, std::integral_constant<int, 4>{});
  };
  return shape.dtype == DType::kBFloat16 ? with_frames(BFloat16{}) : with_frames(Half{});
}

// Runs `kernel` with one warp, and `num_tiles` tiles, for every (b, n, h).
template <typename Args>
void launch(void (*kernel)(Args), OncePerDevice& once, const Args& args, int num_tiles, int device,
            cudaStream_t stream) {
  const DeviceGuard guard(device);
  prepare(once, kernel, device);
  const TemporalShape& shape = args.shape;
  const int warp_bytes = num_tiles * shape.frames * row_bytes(shape.head_dim);
  // Four blocks to a multiprocessor where they fit.
  const int warps = std::clamp(shared_memory_limit(device) / 4 / warp_bytes, 1, kMaxWarps);
  const int64_t slices = shape.batch * shape.tokens * shape.heads;
  const dim3 grid(static_cast<unsigned>((slices + warps - 1) / warps)), block(32 * warps);
  void* parameters[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, parameters, warps * warp_bytes, stream),
        "temporal_attn");
}

}  // namespace univid
