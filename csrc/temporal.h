// temporal_attn: out[b, :, n, h] = softmax(scale · q[b, :, n, h] · k[b, :, n, h]ᵀ) · v[b, :, n, h], along T for every
// (b, n, h).
//
// T ≤ 64; D a multiple of 8, ≤ 128; pointers and strides multiples of 16 bytes; B, N and H of any size. Both functions
// launch one kernel on `stream` and throw std::invalid_argument or std::runtime_error.
#pragma once

#include "common.h"

namespace univid {

struct TemporalShape {
  int64_t batch, tokens, heads;  // B, N, H
  int frames, head_dim;          // T, D
  float scale;
  DType dtype;
};

struct TemporalForward {
  TemporalShape shape;
  TensorView q, k, v;
  TensorView out;
  float* logsumexp;  // (B, H, T, N), contiguous, natural logarithm
};

struct TemporalBackward {
  TemporalShape shape;
  TensorView q, k, v, grad;
  TensorView dq, dk, dv;
};

void temporal_attn_forward(const TemporalForward& args, int device, cudaStream_t stream);
void temporal_attn_backward(const TemporalBackward& args, int device, cudaStream_t stream);

}  // namespace univid
