// group_norm_silu: out[m, n, c] = f((x[m, n, c] - mean[m, g]) · rstd[m, g] · weight[c] + bias[c]), where g is the group
// of the channel c, mean and rstd are taken over its C / G neighbouring channels and all n, and f is SiLU or nothing.
//
// C a multiple of 8; pointers and strides of tensors (M, N, C) multiples of 16 bytes. Launches its kernels on `stream`;
// throws std::invalid_argument or std::runtime_error.
#pragma once

#include "common.h"

namespace univid {

struct GroupNormShape {
  int64_t images, rows;  // M, N
  int channels, groups;  // C, G, which divides C
  float eps;
  bool silu;
  DType dtype;
};

// A (M, N, C) tensor in device memory whose last dimension is contiguous. Strides count elements.
struct RowsView {
  void* data;
  int64_t stride_m, stride_n;
};

// A (C,) tensor, float32 or of the shape's dtype.
struct ChannelsView {
  void* data;  // null: this output is not asked for
  int64_t stride;
  bool is_float;
};

struct GroupNormForward {
  GroupNormShape shape;
  RowsView x;
  ChannelsView weight, bias;
  void* out;           // (M, N, C), contiguous
  float *mean, *rstd;  // (M, G), contiguous
};

struct GroupNormBackward {
  GroupNormShape shape;
  RowsView x, grad;
  RowsView dx;  // null: not asked for
  ChannelsView weight, bias;
  ChannelsView dweight, dbias;
  const float *mean, *rstd;  // as the forward left them
  float* sums;               // workspace, (M, 2, C); null where neither dweight nor dbias is asked for
};

// Whether the forward can hold a slab on chip. The backward takes whatever the forward does.
bool group_norm_silu_fits(int64_t images, int64_t rows, int channels, int groups);

void group_norm_silu_forward(const GroupNormForward& args, int device, cudaStream_t stream);
void group_norm_silu_backward(const GroupNormBackward& args, int device, cudaStream_t stream);

}  // namespace univid
