// temporal_conv: out[b, t, n, o] = Σ_{k, c} x[b, t + k - K/2, n, c] · weight[o, c, k] + bias[b, o] + residual[b, t, n,
// o], frames outside being 0; or, transposed, the gradient in x: the same with weight[c, o, K - 1 - k], x being out's
// gradient.
//
// The gradient in the weight: dweight[o, c, k] = Σ_{b, t, n} grad[b, t, n, o] · x[b, t + k - K/2, n, c].
//
// C and C_out multiples of 8; pointers and strides of tensors (B, T·N, C) and of the weight multiples of 16 bytes;
// (T + K) · N and B · T · N < 2³⁰; rows, and o and k of the weight, lie apart. Launches on `stream`; throws
// std::invalid_argument or std::runtime_error.
#pragma once

#include "common.h"

namespace univid {

struct TemporalConvShape {
  int64_t batch, frames, tokens;   // B, T, N
  int64_t channels, channels_out;  // of x and out
  int64_t taps;                    // K, odd
  bool transposed;
  DType dtype;
};

// A (B, T·N, C) tensor in device memory whose last dimension is contiguous. Strides count elements.
struct ClipsView {
  void* data;  // null: there is none
  int64_t stride_b, stride_n;
};

struct TemporalConv {
  TemporalConvShape shape;
  ClipsView x, residual, out;
  const void* weight;  // the forward's (C_out, C, K), C contiguous
  int64_t weight_stride_o, weight_stride_k;
  const void* bias;  // a clip's C_out elements contiguous, at a multiple of 4 bytes; null: there is none
  int64_t bias_stride_b;
  void* workspace;  // temporal_conv_workspace(...) bytes
  int tiling;       // its number; -1: the one that suits the shape
};

struct TemporalConvWeight {
  TemporalConvShape shape;  // the forward's
  ClipsView x, grad;
  void* dweight;  // (C_out, C, K), C contiguous
  int64_t stride_o, stride_k;
  void* workspace;  // temporal_conv_weight_workspace(...) bytes
  int tiling;
};

int64_t temporal_conv_workspace(const TemporalConvShape& shape, int tiling, int device);
void temporal_conv(const TemporalConv& args, int device, cudaStream_t stream);
int64_t temporal_conv_weight_workspace(const TemporalConvShape& shape, int tiling, int device);
void temporal_conv_weight(const TemporalConvWeight& args, int device, cudaStream_t stream);

}  // namespace univid
