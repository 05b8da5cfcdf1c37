// The Python module univid.kernels.cuda._csrc: csrc's functions with pointers, devices and streams as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "dual_stream.h"
#include "group_norm.h"
#include "linear_geglu.h"
#include "pyramid.h"
#include "temporal.h"
#include "temporal_conv.h"

namespace py = pybind11;

namespace univid {
namespace {

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// (address, stride of B, of T, of N, of H)
using View = std::array<int64_t, 5>;

TensorView tensor(const View& view) { return {pointer<void>(view[0]), view[1], view[2], view[3], view[4]}; }

cudaStream_t stream_of(uintptr_t stream) { return pointer<CUstream_st>(stream); }

// (B, T, N, H, D)
using Sizes = std::array<int64_t, 5>;

TemporalShape temporal_shape(const Sizes& sizes, double scale, DType dtype) {
  return {
      sizes[0], sizes[2], sizes[3], static_cast<int>(sizes[1]), static_cast<int>(sizes[4]), static_cast<float>(scale),
      dtype};
}

DualStreamShape dual_stream_shape(const Sizes& sizes, double scale, DType dtype) {
  return {sizes[0], sizes[3], sizes[1], sizes[2], static_cast<float>(scale), dtype};
}

// B, T, N, H, D, Tk, Nk, R
using PyramidSizes = std::array<int64_t, 8>;

// (address, stride of B, of T)
using Table = std::array<int64_t, 3>;

PyramidShape pyramid_shape(const PyramidSizes& sizes, double scale, DType dtype) {
  const auto [B, T, N, H, D, Tk, Nk, R] = sizes;
  return {B, H, T, N, Tk, Nk, static_cast<int>(D), static_cast<int>(R), static_cast<float>(scale), dtype};
}

// L, of K: address, strides of B, L, H; the same of V; of the weight: what it is, the number, address, strides of B, T,
// N; the logsumexp's address
using KeyStreamArguments = std::tuple<int64_t, std::array<int64_t, 4>, std::array<int64_t, 4>, WeightType, double,
                                      std::array<int64_t, 4>, int64_t>;

KeyStream key_stream(const KeyStreamArguments& arguments) {
  const auto& [length, k, v, type, number, weight, logsumexp] = arguments;
  return {length,
          {pointer<void>(k[0]), k[1], 0, k[2], k[3]},
          {pointer<void>(v[0]), v[1], 0, v[2], v[3]},
          type,
          static_cast<float>(number),
          pointer<const void>(weight[0]),
          weight[1],
          weight[2],
          weight[3],
          pointer<float>(logsumexp)};
}

std::array<KeyStream, 2> key_streams(const std::vector<KeyStreamArguments>& streams) {
  return {key_stream(streams.at(0)), streams.size() > 1 ? key_stream(streams[1]) : KeyStream{}};
}

// B, T, N, C, C_out, K
using ConvSizes = std::array<int64_t, 6>;

TemporalConvShape conv_shape(const ConvSizes& sizes, bool transposed, DType dtype) {
  const auto [B, T, N, C, C_out, K] = sizes;
  return {B, T, N, C, C_out, K, transposed, dtype};
}

// (address, stride of B, of T·N)
using ClipsArguments = std::array<int64_t, 3>;

ClipsView clips(const ClipsArguments& x) { return {pointer<void>(x[0]), x[1], x[2]}; }

// M, channels of x, C
using GegluSizes = std::array<int64_t, 3>;

LinearGegluShape geglu_shape(const GegluSizes& sizes, DType dtype) { return {sizes[0], sizes[1], sizes[2], dtype}; }

// M, N, C, G
using GroupNormSizes = std::array<int64_t, 4>;

GroupNormShape group_norm_shape(const GroupNormSizes& sizes, double eps, bool silu, DType dtype) {
  const auto [M, N, C, G] = sizes;
  return {M, N, static_cast<int>(C), static_cast<int>(G), static_cast<float>(eps), silu, dtype};
}

// (address, stride of M, of N)
using RowsArguments = std::array<int64_t, 3>;

RowsView rows(const RowsArguments& x) { return {pointer<void>(x[0]), x[1], x[2]}; }

// (address, stride, whether it is float32)
using ChannelsArguments = std::tuple<int64_t, int64_t, bool>;

ChannelsView channels(const ChannelsArguments& arguments) {
  const auto& [address, stride, is_float] = arguments;
  return {pointer<void>(address), stride, is_float};
}

// Why this module's CUDA runtime cannot use any device, or nothing.
std::optional<std::string> problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace
}  // namespace univid

PYBIND11_MODULE(_csrc, module) {
  using namespace univid;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  py::enum_<DType>(module, "DType").value("BFLOAT16", DType::kBFloat16).value("FLOAT16", DType::kFloat16);
  module.attr("CUDA_VERSION") = CUDART_VERSION;
  module.def("problem", &problem);

  py::enum_<WeightType>(module, "WeightType")
      .value("NUMBER", WeightType::kNumber)
      .value("FLOAT32", WeightType::kFloat32)
      .value("BFLOAT16", WeightType::kBFloat16)
      .value("FLOAT16", WeightType::kFloat16);

  module.def("dual_stream_attn_fits", &dual_stream_attn_fits);

  module.def(
      "dual_stream_attn_forward",
      [](const Sizes& sizes, double scale, DType dtype, const View& q, const std::vector<KeyStreamArguments>& streams,
         bool one_query, uintptr_t out, int device, uintptr_t stream) {
        const auto [first, second] = key_streams(streams);
        dual_stream_attn_forward(
            {dual_stream_shape(sizes, scale, dtype), tensor(q), {first, second}, one_query, pointer<void>(out)}, device,
            stream_of(stream));
      },
      no_gil);

  module.def("dual_stream_attn_workspace",
             // lengths: L of each stream
             [](const Sizes& sizes, bool one_query, const std::array<int64_t, 2>& lengths, int device) {
               return dual_stream_attn_workspace(dual_stream_shape(sizes, 1, DType::kBFloat16), one_query, lengths[0],
                                                 lengths[1], device);
             });

  module.def(
      "dual_stream_attn_backward",
      // gradients: of each stream the addresses of dk, dv and deltas
      [](const Sizes& sizes, double scale, DType dtype, const View& q, const View& grad, const View& out,
         const View& dq, const std::vector<KeyStreamArguments>& streams,
         const std::array<std::array<int64_t, 3>, 2>& gradients, bool one_query, uintptr_t workspace, int device,
         uintptr_t stream) {
        const auto [first, second] = key_streams(streams);
        const auto of = [](const std::array<int64_t, 3>& x) {
          return KeyGradients{pointer<void>(x[0]), pointer<void>(x[1]), pointer<float>(x[2])};
        };
        dual_stream_attn_backward({dual_stream_shape(sizes, scale, dtype),
                                   tensor(q),
                                   tensor(grad),
                                   tensor(out),
                                   tensor(dq),
                                   {first, second},
                                   {of(gradients[0]), of(gradients[1])},
                                   one_query,
                                   pointer<void>(workspace)},
                                  device, stream_of(stream));
      },
      no_gil);

  module.def("group_norm_silu_fits", &group_norm_silu_fits);

  module.def(
      "group_norm_silu_forward",
      [](const GroupNormSizes& sizes, double eps, bool silu, DType dtype, const RowsArguments& x,
         const ChannelsArguments& weight, const ChannelsArguments& bias, uintptr_t out, uintptr_t mean, uintptr_t rstd,
         int device, uintptr_t stream) {
        group_norm_silu_forward({group_norm_shape(sizes, eps, silu, dtype), rows(x), channels(weight), channels(bias),
                                 pointer<void>(out), pointer<float>(mean), pointer<float>(rstd)},
                                device, stream_of(stream));
      },
      no_gil);

  module.def(
      "group_norm_silu_backward",
      [](const GroupNormSizes& sizes, double eps, bool silu, DType dtype, const RowsArguments& x,
         const RowsArguments& grad, const RowsArguments& dx, const ChannelsArguments& weight,
         const ChannelsArguments& bias, const ChannelsArguments& dweight, const ChannelsArguments& dbias,
         uintptr_t mean, uintptr_t rstd, uintptr_t sums, int device, uintptr_t stream) {
        group_norm_silu_backward({group_norm_shape(sizes, eps, silu, dtype), rows(x), rows(grad), rows(dx),
                                  channels(weight), channels(bias), channels(dweight), channels(dbias),
                                  pointer<const float>(mean), pointer<const float>(rstd), pointer<float>(sums)},
                                 device, stream_of(stream));
      },
      no_gil);

  module.def(
      "temporal_attn_forward",
      [](const Sizes& sizes, double scale, DType dtype, const View& q, const View& k, const View& v, const View& out,
         uintptr_t logsumexp, int device, uintptr_t stream) {
        temporal_attn_forward({temporal_shape(sizes, scale, dtype), tensor(q), tensor(k), tensor(v), tensor(out),
                               pointer<float>(logsumexp)},
                              device, stream_of(stream));
      },
      no_gil);

  module.def(
      "temporal_attn_backward",
      [](const Sizes& sizes, double scale, DType dtype, const View& q, const View& k, const View& v, const View& grad,
         const View& dq, const View& dk, const View& dv, int device, uintptr_t stream) {
        temporal_attn_backward({temporal_shape(sizes, scale, dtype), tensor(q), tensor(k), tensor(v), tensor(grad),
                                tensor(dq), tensor(dk), tensor(dv)},
                               device, stream_of(stream));
      },
      no_gil);

  module.def(
      "pyramid_st_attn_forward",
      [](const PyramidSizes& sizes, double scale, DType dtype, const View& q, const View& k, const View& v,
         const Table& table, bool one_query, uintptr_t out, uintptr_t logsumexp, int device, uintptr_t stream) {
        pyramid_st_attn_forward(
            {pyramid_shape(sizes, scale, dtype), tensor(q), tensor(k), tensor(v), pointer<const int32_t>(table[0]),
             table[1], table[2], one_query, pointer<void>(out), pointer<float>(logsumexp)},
            device, stream_of(stream));
      },
      no_gil);

  module.def("pyramid_st_attn_workspace",
             // asked: for dq, dk, dv
             [](const PyramidSizes& sizes, double scale, DType dtype, bool one_query, const std::array<bool, 3>& asked,
                bool deterministic, int device) {
               return pyramid_st_attn_workspace(pyramid_shape(sizes, scale, dtype), one_query, asked[0], asked[1],
                                                asked[2], deterministic, device);
             });

  module.def(
      "pyramid_st_attn_backward",
      // inverse: address, stride of B
      [](const PyramidSizes& sizes, double scale, DType dtype, const View& q, const View& k, const View& v,
         const View& grad, const View& dq, const View& dk, const View& dv, const Table& table,
         const std::array<int64_t, 2>& inverse, bool equal_rows, bool one_query, bool deterministic, uintptr_t out,
         uintptr_t logsumexp, uintptr_t workspace, int device, uintptr_t stream) {
        pyramid_st_attn_backward(
            {pyramid_shape(sizes, scale, dtype), tensor(q), tensor(k), tensor(v), tensor(grad), tensor(dq), tensor(dk),
             tensor(dv), pointer<const int32_t>(table[0]), table[1], table[2], pointer<const int32_t>(inverse[0]),
             inverse[1], equal_rows, one_query, deterministic, pointer<const void>(out),
             pointer<const float>(logsumexp), pointer<void>(workspace)},
            device, stream_of(stream));
      },
      no_gil);

  module.def("temporal_conv_workspace", [](const ConvSizes& sizes, int tiling, int device) {
    return temporal_conv_workspace(conv_shape(sizes, false, DType::kBFloat16), tiling, device);
  });

  module.def(
      "temporal_conv",
      // weight: address, stride of C_out, of K; bias: address, stride of B
      [](const ConvSizes& sizes, bool transposed, DType dtype, const ClipsArguments& x,
         const std::array<int64_t, 3>& weight, const std::array<int64_t, 2>& bias, const ClipsArguments& residual,
         const ClipsArguments& out, uintptr_t workspace, int tiling, int device, uintptr_t stream) {
        temporal_conv({conv_shape(sizes, transposed, dtype), clips(x), clips(residual), clips(out),
                       pointer<const void>(weight[0]), weight[1], weight[2], pointer<const void>(bias[0]), bias[1],
                       pointer<void>(workspace), tiling},
                      device, stream_of(stream));
      },
      no_gil);

  module.def("temporal_conv_weight_workspace", [](const ConvSizes& sizes, int tiling, int device) {
    return temporal_conv_weight_workspace(conv_shape(sizes, false, DType::kBFloat16), tiling, device);
  });

  module.def(
      "temporal_conv_weight",
      // dweight: address, stride of C_out, of K
      [](const ConvSizes& sizes, DType dtype, const ClipsArguments& x, const ClipsArguments& grad,
         const std::array<int64_t, 3>& dweight, uintptr_t workspace, int tiling, int device, uintptr_t stream) {
        temporal_conv_weight({conv_shape(sizes, false, dtype), clips(x), clips(grad), pointer<void>(dweight[0]),
                              dweight[1], dweight[2], pointer<void>(workspace), tiling},
                             device, stream_of(stream));
      },
      no_gil);

  module.def("linear_geglu_workspace", [](const GegluSizes& sizes, int tiling, int device) {
    return linear_geglu_workspace(geglu_shape(sizes, DType::kBFloat16), tiling, device);
  });

  module.def(
      "linear_geglu",
      // x, weight: address, stride of rows
      [](const GegluSizes& sizes, DType dtype, const std::array<int64_t, 2>& x, const std::array<int64_t, 2>& weight,
         uintptr_t bias, uintptr_t out, uintptr_t workspace, int tiling, int device, uintptr_t stream) {
        linear_geglu({geglu_shape(sizes, dtype), pointer<const void>(x[0]), pointer<const void>(weight[0]),
                      pointer<const void>(bias), x[1], weight[1], pointer<void>(out), pointer<void>(workspace), tiling},
                     device, stream_of(stream));
      },
      no_gil);
}
