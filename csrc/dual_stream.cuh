// What the kernels of dual-stream attention share: which queries a tile holds, weights, and tiles of keys.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "dual_stream.h"
#include "hopper/tma.cuh"

namespace univid {

constexpr int kRows = 64;  // queries of a tile
constexpr int kKeys = 88;  // keys of a tile where they are the columns
constexpr int kRowBytes = 128;
constexpr int kTileBytes = kRows * kRowBytes;
constexpr int kKeyBytes = kKeys * kRowBytes;
constexpr int kScores = kKeys / 2;              // of a lane
constexpr int kPacked = (kKeys + 15) / 16 * 4;  // registers of an operand, in which columns past the tile are zeros
constexpr int kMaxKeyTiles = 4;                 // of both streams; where there are two, one has one

inline int count_key_tiles(int64_t length) { return static_cast<int>((length + kKeys - 1) / kKeys); }

// How many tiles of keys the two streams have (none of a second: 0), known to the compiler, so that loops over them are
// straight code.
template <int kFirst_, int kSecond_>
struct KeyTiles {
  static constexpr int kFirst = kFirst_, kSecond = kSecond_, kAll = kFirst + kSecond;

  __host__ __device__ static constexpr int stream(int tile) { return tile >= kFirst; }
  __host__ __device__ static constexpr int of_stream(int stream) { return stream == 0 ? kFirst : kSecond; }
  // Where in its stream a tile is.
  __host__ __device__ static constexpr int place(int tile) { return tile - stream(tile) * kFirst; }
  __host__ __device__ static constexpr bool starts(int tile) { return place(tile) == 0; }
  __host__ __device__ static constexpr bool ends(int tile) { return place(tile) + 1 == of_stream(stream(tile)); }
};

// Calls `run` with how many tiles the longer stream has, and whether there is a second one, known to the compiler.
template <typename Run>
void choose_key_tiles(int longer, bool has_two, Run run) {
  const auto among = [&]<int... kBefore>(auto two, std::integer_sequence<int, kBefore...>) {
    ((longer == kBefore + 1 && (run(std::integral_constant<int, kBefore + 1>{}, two), true)) || ...);
  };
  if (has_two)
    among(std::true_type{}, std::make_integer_sequence<int, kMaxKeyTiles - 1>{});
  else
    among(std::false_type{}, std::make_integer_sequence<int, kMaxKeyTiles>{});
}

// The queries of all (clip, head), a line each, in tiles. A group is a frame, or all frames as one long query.
struct Queries {
  int heads, tokens;  // H, N
  int groups, rows;   // of a line: groups, and queries of each
  int tiles_per_group, tiles_per_line, num_tiles;

  Queries() = default;
  Queries(const DualStreamShape& shape, bool one_query) {
    const int64_t lines = shape.batch * shape.heads;
    const int64_t in_frames = one_query ? 1 : shape.frames, in_group = shape.frames * shape.tokens / in_frames;
    const int64_t per_line = in_frames * ((in_group + kRows - 1) / kRows);
    if (lines * per_line > INT32_MAX / 2) throw std::invalid_argument("too many queries");
    heads = static_cast<int>(shape.heads);
    tokens = static_cast<int>(shape.tokens);
    groups = static_cast<int>(in_frames);
    rows = static_cast<int>(in_group);
    tiles_per_group = static_cast<int>(per_line / in_frames);
    tiles_per_line = static_cast<int>(per_line);
    num_tiles = static_cast<int>(lines * per_line);
  }
};

// Which queries a tile holds.
struct Place {
  int line, clip, head, group, row;

  __device__ Place(const Queries& queries, int tile) {
    line = tile / queries.tiles_per_line;
    tile -= line * queries.tiles_per_line;
    group = tile / queries.tiles_per_group;
    row = (tile - group * queries.tiles_per_group) * kRows;
    clip = line / queries.heads;
    head = line - clip * queries.heads;
  }
  // That of the tile `tiles` later in the line.
  __device__ Place after(const Queries& queries, int tiles) const {
    Place later = *this;
    const int in_group = queries.tiles_per_group * kRows;
    for (later.row += tiles * kRows; later.row >= in_group; later.row -= in_group) later.group++;
    return later;
  }
  __device__ hopper::Box box() const { return {row, head, group, clip}; }
  // Among the tiles of all lines.
  __device__ int tile(const Queries& queries) const {
    return line * queries.tiles_per_line + group * queries.tiles_per_group + row / kRows;
  }
  // Of a query of the tile in a (B, H, T, N) tensor.
  __device__ int64_t index(const Queries& queries, int query) const {
    return (static_cast<int64_t>(line) * queries.groups + group) * queries.rows + query;
  }
};

// Of a block's range of tiles, from `first` on, those that lie in one line; a warpgroup takes every kGroups-th of them.
struct Share {
  int stop;     // where the line ends, or the range
  int left;     // tiles of warpgroup w
  Place place;  // of its first

  template <int kGroups>
  __device__ static Share of(const Queries& queries, int first, int end, int w) {
    const int stop = min(end, (first / queries.tiles_per_line + 1) * queries.tiles_per_line);
    return {stop, (stop - first - w + kGroups - 1) / kGroups, Place(queries, first + w)};
  }
};

struct Weight {
  WeightType type;
  float number;
  const void* data;
  int64_t stride_b, stride_t, stride_n;

  Weight() = default;
  explicit Weight(const KeyStream& stream)
      : type(stream.weight_type),
        number(stream.number),
        data(stream.weight),
        stride_b(stream.weight_stride_b),
        stride_t(stream.weight_stride_t),
        stride_n(stream.weight_stride_n) {}

  // At a query of a tile.
  __device__ float at(const Queries& queries, const Place& place, int query) const {
    if (type == WeightType::kNumber) return number;
    const unsigned m = place.group * queries.rows + query;
    const unsigned frame = m / static_cast<unsigned>(queries.tokens);
    const int64_t i = place.clip * stride_b + frame * stride_t + (m - frame * queries.tokens) * stride_n;
    if (type == WeightType::kFloat32) return static_cast<const float*>(data)[i];
    const uint32_t bits = static_cast<const unsigned short*>(data)[i];
    if (type == WeightType::kBFloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

// Strikes out the scores of a tile's keys past the first `valid`, by groups of 8 keys.
__device__ inline void mask(float (&s)[kScores], int valid) {
  const int column = threadIdx.x % 4 * 2;
  const auto strike = [&](int group) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (8 * group + column + e % 2 >= valid) s[4 * group + e] = -INFINITY;
  };
  constexpr int kEasy = kKeys / 8 - 2;
  if (valid < 8 * kEasy)
#pragma unroll
    for (int group = 0; group < kEasy; group++) strike(group);
  strike(kEasy);
  strike(kEasy + 1);
}

// How many blocks share `units` of work in contiguous ranges, where each line of them costs a block `fixed` more, in
// units, of which a block does `together` at once. Blocks that never cross a line are taken where they cost no more.
inline int count_blocks(int64_t lines, int64_t units_per_line, int processors, int together, int fixed) {
  const int64_t units = lines * units_per_line;
  const auto cost = [&](int64_t blocks) {
    const int64_t share = (units + blocks - 1) / blocks;
    const int64_t crossed = blocks % lines == 0 ? 1 : 2 + (share - 1) / units_per_line;
    return (share + together - 1) / together * together + crossed * fixed;
  };
  const int64_t all = std::min<int64_t>(units, processors);
  const int64_t aligned = all / lines * lines;
  return static_cast<int>(aligned > 0 && cost(aligned) <= cost(all) ? aligned : all);
}

}  // namespace univid
