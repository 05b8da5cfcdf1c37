// temporal_conv's launches: maps of tensors, and which tiling suits which shape.
#include <type_traits>

#include "temporal_conv.h"
#include "temporal_conv_launch.cuh"

namespace univid {
namespace {

template <class C>
Tiling tiling_for(const TemporalConvShape& s) {
  return tiling_of(s.batch, s.frames, s.tokens, s.channels, s.channels_out, s.taps, C::kTileBlocks,
                   C::kColumns * C::kCluster);
}

template <class C>
Tiling weight_tiling_for(const TemporalConvShape& s) {
  return weight_tiling_of(s.batch, s.frames, s.tokens, s.channels, s.channels_out, s.taps, C::kTileBlocks,
                          C::kColumns * C::kCluster);
}

CUtensorMapSwizzle swizzle_of(int columns) {
  return columns == kPartColumns ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
}

// As boxes of `rows` rows and `columns` columns.
CUtensorMap map_of(const ClipsView& tensor, const TemporalConvShape& s, int64_t channels, int rows, int columns,
                   int& moves) {
  const int64_t all_rows = s.frames * s.tokens;
  moves = s.batch > 1 && tensor.stride_b != 0;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(all_rows),
                               static_cast<cuuint64_t>(moves ? s.batch : 1)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(all_rows > 1 ? tensor.stride_n * 2 : 16),
                                 static_cast<cuuint64_t>(moves ? tensor.stride_b * 2 : 16)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1};
  return encode_map(tensor.data, s.dtype, sizes, strides, box, swizzle_of(columns));
}

// The forward's (C_out, C, K), as boxes of one tap: 64 channels of kColumns of C_out, or, transposed, 32 of 64.
template <class C>
CUtensorMap map_of_weight(const TemporalConv& call) {
  const TemporalConvShape& s = call.shape;
  const int64_t inner = s.transposed ? s.channels_out : s.channels, outer = s.transposed ? s.channels : s.channels_out;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(inner), static_cast<cuuint64_t>(s.taps),
                               static_cast<cuuint64_t>(outer)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(s.taps > 1 ? call.weight_stride_k * 2 : 16),
                                 static_cast<cuuint64_t>(call.weight_stride_o * 2)};
  const cuuint32_t straight[3] = {kStepChannels, 1, C::kColumns}, across[3] = {kPartColumns, 1, kStepChannels};
  const auto& box = s.transposed ? across : straight;
  return encode_map(call.weight, s.dtype, sizes, strides, box, swizzle_of(box[0]));
}

// Its gradient, as boxes of 32 channels of 16 of C_out of a tap.
CUtensorMap map_of_weight_gradient(const TemporalConvWeight& call) {
  const TemporalConvShape& s = call.shape;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(s.channels), static_cast<cuuint64_t>(s.channels_out),
                               static_cast<cuuint64_t>(s.taps)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(s.channels_out > 1 ? call.stride_o * 2 : 16),
                                 static_cast<cuuint64_t>(s.taps > 1 ? call.stride_k * 2 : 16)};
  const cuuint32_t box[3] = {kPartColumns, 16, 1};
  return encode_map(call.dweight, s.dtype, sizes, strides, box, swizzle_of(kPartColumns));
}

using High = Config<2, 2, 160, 4, 2, 2>;       // 256 x 160 in pairs: the fewest bytes
using Low = Config<3, 1, 160, 4, 2, 2>;        // 192 x 160 in pairs: for few products before a store, or few rows
using Alone = Config<2, 2, 160, 4, 1, 2>;      // 256 x 160: where there is no neighbour
using Even = Config<2, 2, 128, 4, 2, 2>;       // 256 x 128 in pairs: where 160 columns leave more empty
using EvenAlone = Config<2, 2, 128, 4, 1, 2>;  // 256 x 128

// The number of the tiling that suits so many columns.
int suiting_tiling(int64_t columns, bool is_high) {
  const int tiles = tiles_of(columns, High::kColumns), even = tiles_of(columns, Even::kColumns);
  if (even * Even::kColumns < tiles * High::kColumns) return even % 2 == 0 ? 3 : 4;
  return tiles % 2 == 1 ? 2 : is_high ? 0 : 1;
}

// Calls f with the tiling of that number.
template <bool kMayBeLow, typename F>
auto with_tiling(int number, F&& f) {
  using MaybeLow = std::conditional_t<kMayBeLow, Low, High>;
  switch (number) {
    case 0:
      return f(High());
    case 1:
      return f(MaybeLow());
    case 2:
      return f(Alone());
    case 3:
      return f(Even());
    default:
      return f(EvenAlone());
  }
}

// Calls f with the tiling that a shape is computed by, `tiling` if it is not -1.
template <typename F>
auto with_config(const TemporalConvShape& shape, int tiling, F&& f) {
  constexpr int64_t kManySteps = 64, kManyRows = 4096;
  const bool is_high = shape.taps * shape.channels >= kManySteps * kStepChannels &&
                       shape.batch * shape.frames * shape.tokens >= kManyRows;
  return with_tiling<true>(tiling >= 0 ? tiling : suiting_tiling(shape.channels_out, is_high), f);
}

template <typename F>
auto with_weight_config(const TemporalConvShape& shape, int tiling, F&& f) {
  return with_tiling<false>(tiling >= 0 ? tiling : suiting_tiling(shape.channels, true), f);
}

}  // namespace

int64_t temporal_conv_workspace(const TemporalConvShape& shape, int tiling, int device) {
  return with_config(shape, tiling, [&](auto config) {
    using C = decltype(config);
    return workspace_for<C>(tiling_for<C>(shape), device);
  });
}

void temporal_conv(const TemporalConv& call, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const TemporalConvShape& s = call.shape;
  with_config(s, call.tiling, [&](auto config) {
    using C = decltype(config);
    Arguments args{};
    args.left = map_of(call.x, s, s.channels, kBlockRows, kStepChannels, args.left_moves);
    args.right = map_of_weight<C>(call);
    args.out = map_of(call.out, s, s.channels_out, 16, kPartColumns, args.out_moves);
    args.addends = {static_cast<int>(s.channels_out),
                    static_cast<const char*>(call.bias),
                    static_cast<const char*>(call.residual.data),
                    call.bias_stride_b * 2,
                    call.residual.stride_b * 2,
                    call.residual.stride_n * 2};
    args.tiling = tiling_for<C>(s);
    with_element(s.dtype, [&](auto element) {
      using Element = decltype(element);
      if (s.transposed)
        launch<Element, C, Kind::kInputGradient>(args, call.workspace, device, stream);
      else
        launch<Element, C, Kind::kForward>(args, call.workspace, device, stream);
    });
  });
}

int64_t temporal_conv_weight_workspace(const TemporalConvShape& shape, int tiling, int device) {
  return with_weight_config(shape, tiling, [&](auto config) {
    using C = decltype(config);
    return workspace_for<C>(weight_tiling_for<C>(shape), device);
  });
}

void temporal_conv_weight(const TemporalConvWeight& call, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const TemporalConvShape& s = call.shape;
  with_weight_config(s, call.tiling, [&](auto config) {
    using C = decltype(config);
    Arguments args{};
    args.left = map_of(call.grad, s, s.channels_out, kBlockRows, kStepChannels, args.left_moves);
    args.right = map_of(call.x, s, s.channels, kBlockRows, kPartColumns, args.right_moves);
    args.out = map_of_weight_gradient(call);
    args.addends.columns = static_cast<int>(s.channels);
    args.tiling = weight_tiling_for<C>(s);
    with_element(s.dtype, [&](auto element) {
      launch<decltype(element), C, Kind::kWeightGradient>(args, call.workspace, device, stream);
    });
  });
}

}  // namespace univid
