// dual_stream_attn: out[b, t, n, h] = Σ_s weight_s[b, t, n] · softmax(scale · q[b, t, n, h] · k_s[b, :, h]ᵀ) · v_s[b,
// :, h] over the streams s, of which there are one or two, each with a few keys of its own.
//
// D = 64; pointers and strides multiples of 16 bytes; T·N < 2³¹. Launches its kernels on `stream`; throws
// std::invalid_argument or std::runtime_error.
#pragma once

#include "common.h"

namespace univid {

struct DualStreamShape {
  int64_t batch, heads;    // B, H
  int64_t frames, tokens;  // T, N
  float scale;
  DType dtype;
};

// What a weight's elements are.
enum class WeightType : int { kNumber = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct KeyStream {
  int64_t length;   // L; 0: there is no such stream
  TensorView k, v;  // (B, 1, L, H, D)
  WeightType weight_type;
  float number;        // the weight, where it is a number
  const void* weight;  // else (B, T, N); a stride of 0: shared
  int64_t weight_stride_b, weight_stride_t, weight_stride_n;
  float* logsumexp;  // (B, H, T, N), contiguous, natural logarithm
};

struct DualStreamForward {
  DualStreamShape shape;
  TensorView q;          // (B, T, N, H, D)
  KeyStream streams[2];  // the first exists
  bool one_query;        // stride_t = N · stride_n in q: T·N tokens are one long query
  void* out;             // (B, T, N, H, D), contiguous
};

struct KeyGradients {
  void *dk, *dv;  // (B, L, H, D), contiguous; null: not asked for, as below
  float* delta;   // (B, H, T, N), contiguous: rowsum(P∘dP), P being the softmax before the weight
};

struct DualStreamBackward {
  DualStreamShape shape;
  TensorView q, grad;         // (B, T, N, H, D)
  TensorView out, dq;         // (B, T, N, H, D), contiguous
  KeyStream streams[2];       // the first exists
  KeyGradients gradients[2];  // of the streams
  bool one_query;             // stride_t = N · stride_n in q and grad
  void* workspace;            // dual_stream_attn_workspace(...) bytes
};

// Whether there are kernels for these numbers of keys.
bool dual_stream_attn_fits(int64_t first_length, int64_t second_length);

void dual_stream_attn_forward(const DualStreamForward& args, int device, cudaStream_t stream);

int64_t dual_stream_attn_workspace(const DualStreamShape& shape, bool one_query, int64_t first_length,
                                   int64_t second_length, int device);
void dual_stream_attn_backward(const DualStreamBackward& args, int device, cudaStream_t stream);

}  // namespace univid
