// linear_geglu for Hopper: temporal_conv's product of one tap (temporal_conv.cuh), whose 160 columns are those of 80
// values and of their 80 gates, so that what becomes of them needs no pass of its own (temporal_conv_gated.cuh). Each
// warpgroup ends its rows of a tile by itself: while one does, others may multiply, as far ahead as stages go.
//
// A result takes 12 instructions; the bias is what sums begin with. What limits, counted when consumers still reckoned
// where a tile lies (f1 then took 1.5% longer): of some 11,900 cycles of a tile at f1 a warpgroup's five steps take
// 6,470, twice what they would alone, and the rest is not hidden.
//
// Measured 2026-11-29 (H200, B = 2, a product of 698 TFLOP/s), replays: 490 / 596 / 664 / 647 TFLOP/s at f1, f2, f4,
// f8, 0.462 / 0.380 / 0.341 / 0.088 ms; as single calls, which leave the card time to rest, 0.441 / 0.349 / 0.324 at f1
// to f4. The projection alone takes cuBLAS 0.387 / 0.342 / 0.312 / 0.082 in another run.
#include "linear_geglu.h"
#include "temporal_conv_launch.cuh"

namespace univid {
namespace {

using High = Config<2, 2, 160, 4, 2, 2>;   // 256 x 160 in pairs
using Low = Config<3, 1, 160, 4, 2, 2>;    // 192 x 160 in pairs: for few rows
using Alone = Config<2, 2, 160, 4, 1, 2>;  // 256 x 160: where there is no neighbour

// Calls f with the tiling that a shape is computed by, `tiling` if it is not -1.
template <typename F>
auto with_config(const LinearGegluShape& shape, int tiling, F&& f) {
  constexpr int64_t kManyRows = 4096;
  const bool has_neighbour = tiles_of(2 * shape.columns, High::kColumns) % 2 == 0;
  switch (tiling >= 0 ? tiling : !has_neighbour ? 2 : shape.rows >= kManyRows ? 0 : 1) {
    case 0:
      return f(High());
    case 1:
      return f(Low());
    default:
      return f(Alone());
  }
}

template <class C>
Tiling tiling_for(const LinearGegluShape& s) {
  return tiling_of(1, 1, s.rows, s.channels, 2 * s.columns, 1, C::kTileBlocks, C::kColumns * C::kCluster);
}

// As boxes of 64 channels of so many rows.
CUtensorMap map_of(const void* data, int64_t rows, int64_t stride, const LinearGegluShape& s, int box_rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(s.channels), static_cast<cuuint64_t>(rows), 1};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(rows > 1 ? stride * 2 : 16), 16};
  const cuuint32_t box[3] = {kStepChannels, static_cast<cuuint32_t>(box_rows), 1};
  return encode_map(data, s.dtype, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace

int64_t linear_geglu_workspace(const LinearGegluShape& shape, int tiling, int device) {
  return with_config(shape, tiling, [&](auto config) {
    using C = decltype(config);
    return workspace_for<C>(tiling_for<C>(shape), device);
  });
}

void linear_geglu(const LinearGeglu& call, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const LinearGegluShape& s = call.shape;
  with_config(s, call.tiling, [&](auto config) {
    using C = decltype(config);
    Arguments args{};
    args.left = map_of(call.x, s.rows, call.stride_x, s, kBlockRows);
    args.right = map_of(call.weight, 2 * s.columns, call.stride_weight, s, C::kColumns / 2);
    args.gated = {static_cast<char*>(call.out), static_cast<int>(s.rows), static_cast<int>(s.columns),
                  static_cast<const char*>(call.bias)};
    args.tiling = tiling_for<C>(s);
    with_element(s.dtype, [&](auto element) {
      launch<decltype(element), C, Kind::kGated>(args, call.workspace, device, stream);
    });
  });
}

}  // namespace univid
