// pyramid_st_attn: out[b, t, :, h] = softmax(scale · q[b, t, :, h] · Kᵀ) · V, K and V being the tokens of the key
// frames table[b, t] put one after the other. An entry outside [0, key_frames) is skipped; a row without keys gives 0.
//
// D = 64; pointers and strides multiples of 16 bytes; T·N < 2³¹. Launches its kernels on `stream`; throws
// std::invalid_argument or std::runtime_error.
#pragma once

#include "common.h"

namespace univid {

struct PyramidShape {
  int64_t batch, heads;            // B, H
  int64_t frames, tokens;          // T, N
  int64_t key_frames, key_tokens;  // Tk, Nk
  int head_dim, num_refs;          // D, R
  float scale;
  DType dtype;
};

struct PyramidForward {
  PyramidShape shape;
  TensorView q;          // (B, T, N, H, D)
  TensorView k, v;       // (B, Tk, Nk, H, D)
  const int32_t* table;  // (B, T, R), a row contiguous; a stride of 0: shared by all clips, by all frames
  int64_t table_stride_b, table_stride_t;
  bool one_query;    // all frames share their row and stride_t = N · stride_n in q: T·N tokens are one long query
  void* out;         // (B, T, N, H, D), contiguous
  float* logsumexp;  // (B, H, T, N), contiguous, natural logarithm
};

struct PyramidBackward {
  PyramidShape shape;
  TensorView q;          // (B, T, N, H, D)
  TensorView k, v;       // (B, Tk, Nk, H, D)
  TensorView grad;       // (B, T, N, H, D), of out
  TensorView dq;         // (B, T, N, H, D)
  TensorView dk, dv;     // (B, Tk, Nk, H, D)
  const int32_t* table;  // as in the forward
  int64_t table_stride_b, table_stride_t;
  const int32_t* inverse;  // of the table (univid/kernels/inverse.py says how it lies); for dk and dv
  int64_t inverse_stride_b;
  bool equal_rows;  // all frames share their row
  bool one_query;   // and stride_t = N · stride_n in q, grad and dq
  bool deterministic;
  const void* out;         // (B, T, N, H, D), contiguous
  const float* logsumexp;  // (B, H, T, N), contiguous
  void* workspace;         // pyramid_st_attn_workspace(...) bytes
};

void pyramid_st_attn_forward(const PyramidForward& args, int device, cudaStream_t stream);

// What the backward needs where these gradients are asked for, in bytes.
int64_t pyramid_st_attn_workspace(const PyramidShape& shape, bool one_query, bool dq, bool dk, bool dv,
                                  bool deterministic, int device);
void pyramid_st_attn_backward(const PyramidBackward& args, int device, cudaStream_t stream);

}  // namespace univid
