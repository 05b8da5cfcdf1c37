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

// Of K or V, what its boxes' coordinates begin with in one (clip, head).
struct Feed {
  const TensorMap* maps;
  int head, clip, moves_t;

  __device__ Feed(const TensorMap* maps, const Place& place)
      : maps(maps), head(place.head * maps->moves_h), clip(place.clip * maps->moves_b), moves_t(maps->moves_t) {}

  // A box of some pieces, from token `token` of `frame` on.
  __device__ void load(void* to, int pieces, int token, int frame, uint64_t* filled) const {
    const int32_t at[5] = {0, token, head, frame * moves_t, clip};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &maps[pieces - 1].map, at, filled);
  }
};

// True in one lane, by a whole warp. The compiler knows that it is one: it repeats no copy for others that may be.
__device__ inline bool elect() {
  uint32_t elected;
  asm volatile("{ .reg .pred one; elect.sync _|one, 0xffffffff; selp.u32 %0, 1, 0, one; }" : "=r"(elected));
  return elected;
}

// Starts the copies of all that a row of the table lists, each tile once its slot is free. `shared` has k, v and a ring
// for both. Few instructions a tile: the warps that compute share their issue slots with this one, and wait for the
// slowest of them.
template <int kStages, class Shared>
__device__ inline void load_row(const Gather& args, const Place& place, References& refs, Cursor<kStages>& at,
                                Shared& shared) {
  const Feed k(args.k, place), v(args.v, place);
  const int last = args.pieces_per_frame - args.pieces_per_tile;  // piece at which a whole tile may begin
  int piece = 0;
  while (refs.more()) {
    uint64_t* filled = &shared.ring.filled[at.slot];
    wait(&shared.ring.free[at.slot], at.round ^ 1);
    expect(filled, 2 * sizeof(shared.k[0]));
    if (piece <= last) {  // in one frame
      const int token = piece * args.piece_rows, frame = refs.frame();
      k.load(shared.k[at.slot], args.pieces_per_tile, token, frame, filled);
      v.load(shared.v[at.slot], args.pieces_per_tile, token, frame, filled);
      piece += args.pieces_per_tile;
      if (piece == args.pieces_per_frame) {
        piece = 0;
        refs.advance();
      }
    } else {
      for (int begin = 0; begin < args.pieces_per_tile;) {
        const int left = args.pieces_per_tile - begin;
        const int pieces = refs.more() ? min(left, args.pieces_per_frame - piece) : left;
        // What is past the last frame comes as zeros, so that 0 · V is 0.
        const int token = (refs.more() ? piece : args.pieces_per_frame) * args.piece_rows;
        const int offset = begin * args.piece_rows * kRowBytes;
        k.load(shared.k[at.slot] + offset, pieces, token, refs.frame(), filled);
        v.load(shared.v[at.slot] + offset, pieces, token, refs.frame(), filled);
        begin += pieces;
        piece += pieces;
        if (piece == args.pieces_per_frame && refs.more()) {
          piece = 0;
          refs.advance();
        }
      }
    }
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
