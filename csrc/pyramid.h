// pyramid_st_attn: out[b, t, :, h] = softmax(scale · q[b, t, :, h] · Kᵀ) · V, K and V being the tokens of the key
// frames table[b, t] put one after the other. An entry outside [0, key_frames) is skipped; a row without keys gives 0.
//
// D = 64; pointers and strides multiples of 16 bytes; T·N < 2³¹. Launches one kernel on `stream`; throws
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

void pyramid_st_attn_forward(const PyramidForward& args, int device, cudaStream_t stream);

}  // namespace univid
