// How temporal_conv's tiles lie and who computes them: integer arithmetic that the host plans with and the kernel
// walks.
//
// The rows (t, n) of a clip are counted through in blocks of 64, and the blocks of all clips one after the other. A
// tile of rows is `tile_blocks` neighbouring blocks or a few less, so that no tile is nearly empty; it may hold blocks
// of two clips. A tile takes a step for each tap that meets its clip and each 64 channels.
//
// The weight's gradient is tiled alike: its rows are C_out, its columns C for each tap, and a step is 64 rows of a
// clip.
//
// Workers (clusters of blocks) take whole tiles in turn, in the order in which neighbours share rows and weight. Where
// this would leave most of them idle in the end, the last one or two rounds of tiles are laid out as one line of steps
// and cut into equal parts: the workers of a tile add up their pieces through the workspace.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define UNIVID_BOTH __host__ __device__
#else
#define UNIVID_BOTH
#endif

namespace univid {

constexpr int kBlockRows = 64, kStepChannels = 64;

struct Tiling {
  int rows, tokens, taps;          // of a clip: T·N, N; K
  int steps_of_tap;                // each of 64 channels
  int clip_blocks, blocks;         // of a clip; of all clips
  int row_tiles, column_tiles;     // a column tile being a worker's
  int least_blocks, higher_tiles;  // of a row tile; the first so many have one block more
  int tap_columns, sum_rows;       // of the weight's gradient: column tiles of a tap; T·N. Else 0

  UNIVID_BOTH int tiles() const { return row_tiles * column_tiles; }
  UNIVID_BOTH bool of_weight() const { return tap_columns > 0; }
  UNIVID_BOTH int clip_steps() const { return (sum_rows + kBlockRows - 1) / kBlockRows; }  // of the weight's gradient
  UNIVID_BOTH int steps() const { return of_weight() ? steps_of_tap : taps * steps_of_tap; }  // of a tile, at most
};

inline int tiles_of(int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); }

inline void set_row_tiles(Tiling& t, int tile_blocks) {
  t.row_tiles = tiles_of(t.blocks, tile_blocks);
  t.least_blocks = t.blocks / t.row_tiles;
  t.higher_tiles = t.blocks % t.row_tiles;
}

inline Tiling tiling_of(int64_t clips, int64_t frames, int64_t tokens, int64_t channels, int64_t columns, int64_t taps,
                        int tile_blocks, int worker_columns) {
  Tiling t{};
  t.rows = static_cast<int>(frames * tokens);
  t.tokens = static_cast<int>(tokens);
  t.taps = static_cast<int>(taps);
  t.steps_of_tap = tiles_of(channels, kStepChannels);
  t.clip_blocks = tiles_of(t.rows, kBlockRows);
  t.blocks = static_cast<int>(clips * t.clip_blocks);
  set_row_tiles(t, tile_blocks);
  t.column_tiles = tiles_of(columns, worker_columns);
  return t;
}

// Of the weight's gradient (C_out, C, K).
inline Tiling weight_tiling_of(int64_t clips, int64_t frames, int64_t tokens, int64_t channels, int64_t channels_out,
                               int64_t taps, int tile_blocks, int worker_columns) {
  Tiling t{};
  t.rows = static_cast<int>(channels_out);
  t.tokens = static_cast<int>(tokens);
  t.taps = static_cast<int>(taps);
  t.sum_rows = static_cast<int>(frames * tokens);
  t.steps_of_tap = static_cast<int>(clips * t.clip_steps());
  t.clip_blocks = t.blocks = tiles_of(channels_out, kBlockRows);
  set_row_tiles(t, tile_blocks);
  t.tap_columns = tiles_of(channels, worker_columns);
  t.column_tiles = t.taps * t.tap_columns;
  return t;
}

struct Place {
  int block, height;     // its first block of rows, and how many
  int column_tile;       // of the weight's gradient: of its tap
  int first_tap, steps;  // of the taps that meet its clip; of the weight's gradient: its tap

  Place() = default;
#ifdef __CUDACC__
  // That of a lane, in all of the warp.
  __device__ Place from_lane(int lane) const {
    Place place;
    place.block = __shfl_sync(~0u, block, lane);
    place.height = __shfl_sync(~0u, height, lane);
    place.column_tile = __shfl_sync(~0u, column_tile, lane);
    place.first_tap = __shfl_sync(~0u, first_tap, lane);
    place.steps = __shfl_sync(~0u, steps, lane);
    return place;
  }
#endif

  UNIVID_BOTH Place(const Tiling& t, int tile) {
    const int row_tile = tile / t.column_tiles;
    column_tile = tile - row_tile * t.column_tiles;
    block = row_tile * t.least_blocks + (row_tile < t.higher_tiles ? row_tile : t.higher_tiles);
    height = t.least_blocks + (row_tile < t.higher_tiles ? 1 : 0);
    if (t.of_weight()) {
      first_tap = column_tile / t.tap_columns;
      column_tile -= first_tap * t.tap_columns;
      steps = t.steps();
      return;
    }
    if (t.taps == 1) {  // it meets every frame: no division is needed to say so
      first_tap = 0;
      steps = t.steps_of_tap;
      return;
    }
    const int in_clip = block % t.clip_blocks, half = t.taps / 2;
    first_tap = 0;
    int end_tap = t.taps;
    if (in_clip + height <= t.clip_blocks) {  // of one clip
      const int row = in_clip * kBlockRows, end = row + height * kBlockRows;
      const int frames_before = ((end < t.rows ? end : t.rows) - 1) / t.tokens,
                frames_after = (t.rows - 1 - row) / t.tokens;
      if (frames_before < half) first_tap = half - frames_before;
      if (frames_after < half) end_tap = half + frames_after + 1;
    }
    steps = (end_tap - first_tap) * t.steps_of_tap;
  }
};

// A block of rows.
struct Rows {
  int clip, row;  // its first

  UNIVID_BOTH Rows(const Tiling& t, int block) : clip(block / t.clip_blocks) {
    row = (block - clip * t.clip_blocks) * kBlockRows;
  }
};

struct Start {
  int tile, step;

  UNIVID_BOTH bool operator==(const Start& other) const { return tile == other.tile && step == other.step; }
};

constexpr int kMaxWorkers = 160;

struct Schedule {
  int workers;
  int whole;                      // tiles below this are taken in turn
  Start starts[kMaxWorkers + 1];  // of the parts of the line that the others make

  bool cuts() const { return starts[0].tile == whole && starts[1].tile < starts[workers].tile; }
};

// Steps [begin, end) of a tile; `end` may be past its last.
struct Piece {
  int tile = -1, begin = 0, end = 0;
};

// Which part of the line a worker has: later workers have earlier ones, so that a worker waits only for what blocks of
// smaller numbers compute. Those run already: a card starts a launch's blocks in the order of their numbers. It waits
// behind its last piece: one that ends a tile takes none.
UNIVID_BOTH inline int part_of(const Schedule& schedule, int worker) { return schedule.workers - 1 - worker; }

// The piece that a worker computes after `piece`. False: there is none.
UNIVID_BOTH inline bool advance(const Schedule& schedule, int worker, Piece& piece) {
  const int part = part_of(schedule, worker);
  const bool is_first = piece.tile < 0, was_whole = piece.tile < schedule.whole;
  piece.tile = is_first ? worker : was_whole ? piece.tile + schedule.workers : piece.tile + 1;
  piece.begin = 0;
  piece.end = INT_MAX;
  if (piece.tile < schedule.whole) return true;
  if (was_whole) {
    piece.tile = schedule.starts[part].tile;
    piece.begin = schedule.starts[part].step;
  }
  const Start stop = schedule.starts[part + 1];
  if (piece.tile == stop.tile) piece.end = stop.step;
  return piece.tile <= stop.tile && piece.begin < piece.end;
}

// The pieces of a tile are added up in pairs, as a tree: piece i takes i + 1, then what i + 2 has taken, i + 4, ...,
// and is left for piece i - d at the first d, a power of two, that is a bit of i. Which piece of a tile a part holds:
UNIVID_BOTH inline int piece_of(const Schedule& schedule, int part, int tile) {
  int index = 0;
  for (; schedule.starts[part].tile == tile && schedule.starts[part].step > 0; part--)
    index += !(schedule.starts[part - 1] == schedule.starts[part]);
  return index;
}

// The part that holds the piece `distance` after the one that `part` holds; -1: there is none.
UNIVID_BOTH inline int part_after(const Schedule& schedule, int part, int tile, int distance) {
  while (distance > 0) {
    part++;
    if (part >= schedule.workers || schedule.starts[part].tile != tile) return -1;
    distance -= !(schedule.starts[part] == schedule.starts[part + 1]);
  }
  return part;
}

// A step costs as many units as its tile has blocks of rows, and one for its weight. A cut costs kTake for the flags to
// be cleared, and at the most as much for each part of a tile but one, so that a tile of few steps is not cut into
// many.
inline Schedule share_out(const Tiling& t, int max_workers) {
  constexpr int64_t kTake = 20;
  constexpr int kLeast = 4;  // steps of a piece
  const int tiles = t.tiles();
  int most_parts = 1;  // of a tile: n steps in p parts take at the most about 5n/p + kTake·(p - 1)
  while ((most_parts + 1) * (most_parts + 1) * 4 <= t.steps()) most_parts++;
  Schedule s{};
  s.workers = static_cast<int>(std::min<int64_t>(std::min(max_workers, kMaxWorkers), int64_t{tiles} * most_parts));
  const int64_t of_cuts = kTake * (1 + (s.workers + tiles - 1) / tiles);
  const auto weight = [](const Place& place) { return int64_t{place.height} + 1; };
  const auto cost = [&](const Place& place) { return place.steps * weight(place); };
  std::vector<int64_t> in_turn(s.workers), of_whole(s.workers);
  const int first_cut = std::max(tiles / s.workers - 1, 0) * s.workers;
  int64_t total = 0;
  for (int tile = 0; tile < tiles; tile++) {
    const int64_t of_tile = cost(Place(t, tile));
    total += of_tile;
    in_turn[tile % s.workers] += of_tile;
    if (tile < first_cut) of_whole[tile % s.workers] += of_tile;
  }
  const int64_t share = (total + s.workers - 1) / s.workers;
  if (tiles % s.workers == 0 || share + of_cuts >= *std::max_element(in_turn.begin(), in_turn.end())) {
    s.workers = std::min(s.workers, tiles);
    s.whole = tiles;
    std::fill(s.starts, s.starts + s.workers + 1, Start{tiles, 0});
    return s;
  }
  s.whole = first_cut;
  int tile = first_cut;
  int64_t before = 0, target = 0;  // costs along the line
  for (int part = 0; part < s.workers; part++) {
    while (tile < tiles && before + cost(Place(t, tile)) <= target) before += cost(Place(t, tile++));
    s.starts[part] = {tile, 0};
    if (tile < tiles) {
      const Place place(t, tile);
      const int step = static_cast<int>((target - before) / weight(place));
      if (place.steps - step < kLeast && step > 0)
        s.starts[part] = {tile + 1, 0};
      else if (step >= kLeast)
        s.starts[part].step = step;
    }
    target += std::max<int64_t>(share - of_whole[part_of(s, part)], 0);  // part_of is its own inverse
  }
  s.starts[s.workers] = {tiles, 0};
  return s;
}

}  // namespace univid
