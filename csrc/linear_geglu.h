// linear_geglu: out[m, c] = a · GELU(b), a = x[m] · weight[c] + bias[c], b = x[m] · weight[C + c] + bias[C + c], sums
// and what is behind them in float32.
//
// Channels and C multiples of 8; out contiguous; addresses and strides multiples of 16 bytes, the bias at one of 4;
// rows of x and of the weight lie apart, less than 2³⁰ of x. Launches on `stream`; throws std::invalid_argument or
// std::runtime_error.
#pragma once

#include "common.h"

namespace univid {

struct LinearGegluShape {
  int64_t rows, channels, columns;  // of x (M, channels); C, of out (M, C)
  DType dtype;
};

struct LinearGeglu {
  LinearGegluShape shape;
  const void *x, *weight, *bias;    // (M, channels), (2C, channels), (2C,); no bias: null
  int64_t stride_x, stride_weight;  // of rows, in elements
  void* out;
  void* workspace;  // linear_geglu_workspace(...) bytes
  int tiling;       // its number; -1: the one that suits the shape
};

int64_t linear_geglu_workspace(const LinearGegluShape& shape, int tiling, int device);
void linear_geglu(const LinearGeglu& args, int device, cudaStream_t stream);

}  // namespace univid
