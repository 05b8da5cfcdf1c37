// How kernels of pyramid attention that stay with their queries read keys and values: the gather is a coordinate.
//
// The queries of a (clip, head) are `groups` rows of the table with `rows` queries each, taken in tiles. K and V come
// in tiles of kKeys tokens, each made of boxes whose frame coordinate is the table's entry. Frames and tiles are both
// counted in pieces of some tokens, and a tile has one box for every frame that it crosses, of as many pieces as lie in
// both. A piece divides the frame where it can, so that nothing is padded; else the last piece of each frame ends in
// zeros, whose scores are struck out.
#pragma once

#include <cmath>
#include <numeric>

#include "hopper/tma.cuh"
#include "pyramid.h"

namespace univid::hopper {

constexpr int kRowBytes = 128;  // a token's 64 elements

constexpr int kMaxPieces = 8;  // of a tile

struct Gather {
  TensorMap k[kMaxPieces], v[kMaxPieces];  // by boxes of 1, 2, ... pieces
  const int32_t* table;
  int64_t table_stride_b, table_stride_t;
  int num_refs, key_frames;
  int heads, groups, rows;
  int tiles_per_group, num_tiles;  // of queries
  int piece_rows, pieces_per_tile, pieces_per_frame, last_piece_rows;
  int pieces_step;  // pieces_per_tile modulo pieces_per_frame
};

// Tokens of a piece: the most that divide a tile and a frame; or, where those are too few, a multiple of 8 (the columns
// that a lane's scores count in) that divides a tile and wastes least, the largest such.
inline int choose_piece_rows(int64_t tokens, int keys) {
  const int common = static_cast<int>(std::gcd(tokens, int64_t{keys}));
  if (common * kMaxPieces >= keys) return common;
  int best = 0;
  int64_t best_padded = 0;
  for (int rows = keys; rows >= 16; rows -= 8) {
    if (keys % rows != 0) continue;
    const int64_t padded = (tokens + rows - 1) / rows * rows;
    if (best == 0 || padded < best_padded) best = rows, best_padded = padded;
  }
  return best;
}

// Of a PyramidForward or PyramidBackward, for tiles of `tile_rows` queries and `keys` keys.
template <typename Call>
void set_gather(Gather& gather, const Call& call, int tile_rows, int keys) {
  const PyramidShape& shape = call.shape;
  const int64_t groups = call.one_query ? 1 : shape.frames;
  const int64_t rows = shape.frames * shape.tokens / groups;
  const int piece = choose_piece_rows(shape.key_tokens, keys);
  for (int i = 0; i < keys / piece; i++) {
    const auto map = [&](const TensorView& tensor) {
      return tensor_map(tensor, shape.dtype, shape.batch, shape.key_frames, shape.key_tokens, shape.heads,
                        (i + 1) * piece);
    };
    gather.k[i] = map(call.k);
    gather.v[i] = map(call.v);
  }
  gather.table = call.table;
  gather.table_stride_b = call.table_stride_b;
  gather.table_stride_t = call.table_stride_t;
  gather.num_refs = shape.num_refs;
  gather.key_frames = static_cast<int>(shape.key_frames);
  gather.heads = static_cast<int>(shape.heads);
  gather.groups = static_cast<int>(groups);
  gather.rows = static_cast<int>(rows);
  gather.tiles_per_group = static_cast<int>((rows + tile_rows - 1) / tile_rows);
  const int64_t num_tiles = shape.batch * shape.heads * groups * gather.tiles_per_group;
  if (num_tiles > INT32_MAX / 2) throw std::invalid_argument("too many queries");
  gather.num_tiles = static_cast<int>(num_tiles);
  gather.piece_rows = piece;
  gather.pieces_per_tile = keys / piece;
  gather.pieces_per_frame = static_cast<int>((shape.key_tokens + piece - 1) / piece);
  gather.pieces_step = gather.pieces_per_tile % gather.pieces_per_frame;
  gather.last_piece_rows = static_cast<int>(shape.key_tokens - (gather.pieces_per_frame - 1) * int64_t{piece});
}

// Which queries a tile holds.
struct Place {
  int clip, head, group, row;

  __device__ Place(const Gather& args, int tile, int tile_rows) {
    row = tile % args.tiles_per_group * tile_rows;
    tile /= args.tiles_per_group;
    group = tile % args.groups;
    tile /= args.groups;
    head = tile % args.heads;
    clip = tile / args.heads;
  }
};

__device__ inline const int32_t* references(const Gather& args, const Place& place) {
  return args.table + place.clip * args.table_stride_b + place.group * args.table_stride_t;
}

__device__ inline bool exists(int key_frames, int frame) { return 0 <= frame && frame < key_frames; }

// How many entries of a tile's row exist; by a whole warp.
__device__ inline int count_references(const Gather& args, const Place& place) {
  const int32_t* refs = references(args, place);
  int count = 0;
  for (int r = 0; r < args.num_refs; r += 32) {
    const int i = r + threadIdx.x % 32;
    count += __popc(  // a lane has an entry
        __ballot_sync(~0u, i < args.num_refs && exists(args.key_frames, refs[min(i, args.num_refs - 1)])));
  }
  return count;
}

// Reads the entries of a row of the table one after the other, past those that do not exist.
class References {
 public:
  __device__ References(const Gather& args, const Place& place)
      : entry_(references(args, place)), end_(entry_ + args.num_refs), key_frames_(args.key_frames) {
    skip();
  }
  __device__ bool more() const { return entry_ < end_; }
  __device__ int frame() const { return frame_; }
  __device__ void advance() {
    entry_++;
    skip();
  }

 private:
  __device__ void skip() {
    while (entry_ < end_ && !exists(key_frames_, frame_ = *entry_)) entry_++;
  }

  const int32_t *entry_, *end_;
  int key_frames_, frame_ = 0;
};

// Starts the copies of a tile of K or V, once its slot is free, and goes on to what comes after it.
template <int kBytes, int kStages>
__device__ inline void load_keys(const Gather& args, const TensorMap* maps, const Place& place, References& refs,
                                 int& piece, Ring<kStages>& ring, const Cursor<kStages>& at,
                                 char (&tiles)[kStages][kBytes]) {
  uint64_t* filled = &ring.filled[at.slot];
  wait(&ring.free[at.slot], at.round ^ 1);
  expect(filled, kBytes);
  char* to = tiles[at.slot];
  for (int left = args.pieces_per_tile; left > 0;) {
    const int pieces = refs.more() ? min(left, args.pieces_per_frame - piece) : left;
    // What is past the last frame comes as zeros, so that 0 · V is 0.
    load_box(to, maps[pieces - 1],
             {(refs.more() ? piece : args.pieces_per_frame) * args.piece_rows, place.head, refs.frame(), place.clip},
             filled);
    left -= pieces;
    to += pieces * args.piece_rows * kRowBytes;
    piece += pieces;
    if (piece == args.pieces_per_frame && refs.more()) {
      piece = 0;
      refs.advance();
    }
  }
}

// The same for all that a row of the table lists. `shared` has k, v, k_ring and v_ring.
template <int kStages, class Shared>
__device__ inline void load_row(const Gather& args, const Place& place, References& refs, Cursor<kStages>& at,
                                Shared& shared) {
  int piece = 0;
  while (refs.more()) {
    References v_refs = refs;
    int v_piece = piece;
    load_keys(args, args.k, place, refs, piece, shared.k_ring, at, shared.k);
    load_keys(args, args.v, place, v_refs, v_piece, shared.v_ring, at, shared.v);
    at.advance();
  }
}

// Strikes out the scores of keys that do not exist. `first` is the index in its frame of the tile's first piece, `left`
// the number of pieces from it to the row's end.
template <int kScores>
__device__ inline void mask(const Gather& args, int first, int left, float (&s)[kScores]) {
  static_assert(kScores < 64);
  const int column = threadIdx.x % 4 * 2;
  // Of `rows` keys, two bits for this lane's two columns of every eight.
  const auto bits_of = [&](int rows) { return (1u << (rows / 8 * 2 + min(max(rows % 8 - column, 0), 2))) - 1; };
  uint32_t valid = 0;
  if (args.last_piece_rows == args.piece_rows) {
    valid = bits_of(min(left, args.pieces_per_tile) * args.piece_rows);
  } else {
    for (int i = 0; i < min(left, args.pieces_per_tile); i++) {
      const bool last = ++first == args.pieces_per_frame;  // of its frame
      if (last) first = 0;
      valid |= bits_of(last ? args.last_piece_rows : args.piece_rows) << (args.piece_rows / 4 * i);
    }
  }
  // In parts, of which most are whole.
  constexpr int kPart = kScores % 12 == 0 ? 12 : 8;
#pragma unroll
  for (int part = 0; part < kScores; part += kPart) {
    const uint32_t bits = valid >> part / 2, all = (1u << kPart / 2) - 1;
    if (__all_sync(~0u, (bits & all) == all)) continue;
#pragma unroll
    for (int i = 0; i < kPart; i++)
      if (!(bits >> (i / 4 * 2 + i % 2) & 1)) s[part + i] = -INFINITY;
  }
}

}  // namespace univid::hopper
