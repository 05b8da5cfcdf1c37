// The kernel of pyramid_bwd_keys.cuh: what it is given, what its warpgroups share, and the thread that feeds them.
#pragma once

#include <climits>

#include "hopper/tma.cuh"
#include "pyramid_bwd.cuh"
#include "pyramid_bwd_split.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kUnits = kKeyUnits;  // warpgroups of keys
constexpr int kKeys = kUnits * kUnit;

struct Arguments {
  TensorMap q, grad, k, v, dk, dv;
  const int32_t* inverse;
  int64_t inverse_stride_b;
  const float* statistics;
  float* dq;
  int* counters;  // the next tile; for the warpgroups of tiles that are split, how many parts are there
  int clips, heads;
  int key_frames, key_tokens;                 // Tk, Nk
  int lists, key_rows;                        // Tk and Nk, or 1 and Tk · Nk
  int query_groups, query_rows, query_tiles;  // the last of a group
  int whole_tiles;                            // of a list: with keys for both warpgroups
  bool has_rest;                              // and keys for one more
  int first_lists, next_lists;                // of the first batch, and of each one behind it
  int num_tiles;
  Split split;
  float* parts;  // of tiles that are split
  bool equal_rows;
  float scale, scale_log2;
};

// The keys of a block: for each warpgroup the frame and its first token.
struct Tile {
  int clip, head;
  int frame[kUnits];  // -1: none
  int row[kUnits];
  int state;
  int part, split;  // of a tile that is split: which part of the queries; which of those tiles, -1: none
  int begin, end;   // tiles of queries of a group
};
enum State { kEnd, kUnread, kRead };  // there are no more tiles; zeros; queries follow

// A tile of queries as it goes through a block, a step, is one number: the tile (QueryTiles leaves room), and below it
// kLast and a bit for each warpgroup that takes part.
constexpr int kBoth = (1 << kUnits) - 1, kLast = 1 << kUnits, kStepBits = kUnits + 1;
static_assert(kStepBits == 3);  // as QueryTiles counts on

// Of which gradients, and so of which products, there are.
template <bool kDQ_, bool kDK_, bool kDV_>
struct Config {
  static constexpr bool kDQ = kDQ_, kDK = kDK_, kDV = kDV_;
  static constexpr bool kDS = kDQ || kDK;
  // ptxas 13.0 lets the operands of dV or dK overwrite a V that stays in registers where it sees no third warpgroup.
  static constexpr bool kVInRegisters = kDQ;
  static constexpr int kVSlots = kVInRegisters ? 1 : 2;
  static constexpr int kStages = kDQ ? 4 : 6;
  static constexpr int kThreads = kDQ ? 512 : 384;
  static constexpr int kRegisters = kDQ ? 208 : 232, kFeedRegisters = kDQ ? 32 : 40;
};

// The groups of queries that read a frame, ascending.
class Readers {
 public:
  __device__ void start(const Arguments& args, int clip, int frame) {
    const int32_t* offsets = args.inverse + clip * args.inverse_stride_b;
    at_ = __ldg(offsets + frame);
    end_ = __ldg(offsets + frame + 1);
    if (args.equal_rows) end_ = end_ > at_ ? args.query_groups : 0, at_ = 0;
    read(args, clip);
  }
  __device__ void clear() { next_ = INT_MAX; }
  __device__ int next() const { return next_; }  // INT_MAX: there is none
  __device__ void advance(const Arguments& args, int clip) {
    at_++;
    read(args, clip);
  }

 private:
  __device__ void read(const Arguments& args, int clip) {
    next_ = at_;
    if (at_ >= end_)
      next_ = INT_MAX;
    else if (!args.equal_rows)
      next_ = __ldg(args.inverse + clip * args.inverse_stride_b + 2 * args.key_frames + 1 + at_);
  }

  int at_, end_, next_;
};

template <class C>
struct Shared {
  alignas(1024) char k[2][kUnits][kTileBytes];
  alignas(1024) char v[C::kVSlots][kUnits][kTileBytes];
  alignas(1024) char q[C::kStages][kTileBytes];
  alignas(1024) char grad[C::kStages][kTileBytes];
  alignas(1024) char ds[2][C::kDQ ? kUnits * kTileBytes : 16];
  alignas(1024) char out[kUnits][kTileBytes];
  alignas(16) float statistics[C::kStages][kStatistics];
  int steps[C::kStages], ds_steps[2];
  Tile tiles[2];
  int arrived[kUnits];
  Readers readers[kUnits];  // of the tile being fed: the feeding thread is short of registers
  Ring<2> tile_ring, k_ring, ds_ring;
  Ring<C::kVSlots> v_ring;
  Ring<C::kStages> q_ring;
};

// --- the feeding thread ----------------------------------------------------------------------------------------------

// The tile of an index, and who reads it: of a tile that two frames share the readers of each, else of both together.
__device__ void find_tile(const Arguments& args, int index, Tile& tile, Readers (&readers)[kUnits]) {
  tile.state = kEnd;
  tile.split = -1;
  tile.part = 0;
  if (index >= args.split.from && args.split.count > 0) {
    const int past = index - args.split.from;
    if (past < args.split.count * args.split.parts) {
      tile.split = past / args.split.parts;
      tile.part = past % args.split.parts;
      index = args.split.from + tile.split;
    } else {
      index -= args.split.count * (args.split.parts - 1);
    }
  }
  if (index >= args.num_tiles) return;
  // One (clip, head) after the other, so that its queries and dQ stay in L2; in batches of lists, the longest first, so
  // that the last tiles are short ones.
  const auto rests_of = [&](int lists) { return args.has_rest ? (lists + 1) / 2 : 0; };
  const auto tiles_of = [&](int lists) { return lists * args.whole_tiles + rests_of(lists); };
  int rank = 0, lists = args.first_lists;
  while (index >= tiles_of(lists) * args.clips * args.heads) {
    index -= tiles_of(lists) * args.clips * args.heads;
    rank += lists;
    lists = min(args.next_lists, args.lists - rank);
  }
  const int clip_head = index / tiles_of(lists), clip = clip_head / args.heads;
  index -= clip_head * tiles_of(lists);
  tile.head = clip_head - clip * args.heads;
  tile.clip = clip;
  const bool is_rest = index < rests_of(lists);  // their lists are the longest
  const bool is_alone = is_rest && 2 * index + 1 >= lists;
  int row = args.whole_tiles * kKeys;
  if (is_rest) {
    rank += 2 * index;
  } else {
    index -= rests_of(lists);
    row = index % args.whole_tiles * kKeys;
    rank += index / args.whole_tiles;
  }
  tile.row[0] = row;
  tile.row[1] = is_rest ? row : row + kUnit;
  readers[1].clear();
  if (args.lists == args.key_frames) {
    const int32_t* order = args.inverse + clip * args.inverse_stride_b + args.key_frames + 1 + rank;
    const int frame = __ldg(order);
    readers[0].start(args, clip, frame);
    tile.frame[0] = frame;
    tile.frame[1] = is_alone ? -1 : frame;
    if (is_rest && !is_alone) {
      tile.frame[1] = __ldg(order + 1);
      readers[1].start(args, clip, tile.frame[1]);
    }
  } else {
    tile.frame[0] = 0;
    tile.frame[1] = is_alone ? -1 : 0;
    const int last = (min(row + kKeys, args.key_rows) - 1) / args.key_tokens;
    readers[0].clear();
    for (int frame = row / args.key_tokens; frame <= last && readers[0].next() == INT_MAX; frame++)
      readers[0].start(args, clip, frame);
  }
  tile.state = min(readers[0].next(), readers[1].next()) == INT_MAX ? kUnread : kRead;
  if (tile.state == kUnread) tile.split = -1;
  tile.begin = 0;
  tile.end = args.query_tiles;
  if (tile.split >= 0) {
    tile.begin = static_cast<int>(int64_t{tile.part} * args.query_tiles / args.split.parts);
    tile.end = static_cast<int>(int64_t{tile.part + 1} * args.query_tiles / args.split.parts);
  }
}

template <class C>
__device__ void feed(const Arguments& args, Shared<C>& shared) {
  Cursor<2> tile_at, k_at;
  Cursor<C::kVSlots> v_at;
  Cursor<C::kStages> at;
  Readers(&readers)[kUnits] = shared.readers;
  const auto load_keys = [&](const TensorMap& map, const Tile& tile, char (&to)[kUnits][kTileBytes], uint64_t* filled) {
    expect(filled, kUnits * kTileBytes);
    for (int w = 0; w < kUnits; w++)  // rows that do not exist come as zeros
      load_box(to[w], map,
               {tile.frame[w] < 0 ? args.key_rows : tile.row[w], tile.head, max(tile.frame[w], 0), tile.clip}, filled);
  };
  while (true) {
    wait(&shared.tile_ring.free[tile_at.slot], tile_at.round ^ 1);
    Tile& tile = shared.tiles[tile_at.slot];
    do {
      find_tile(args, atomicAdd(args.counters, 1), tile, readers);
    } while (tile.state == kUnread && tile.part > 0);
    ptx::mbarrier_arrive(&shared.tile_ring.filled[tile_at.slot]);
    tile_at.advance();
    if (tile.state == kEnd) break;
    if (tile.state == kUnread) continue;
    wait(&shared.k_ring.free[k_at.slot], k_at.round ^ 1);
    load_keys(args.k, tile, shared.k[k_at.slot], &shared.k_ring.filled[k_at.slot]);
    k_at.advance();
    wait(&shared.v_ring.free[v_at.slot], v_at.round ^ 1);
    load_keys(args.v, tile, shared.v[v_at.slot], &shared.v_ring.filled[v_at.slot]);
    v_at.advance();
    // Who takes part where the first list, and where the second, has a group.
    const int first_units = tile.frame[1] < 0 || tile.row[0] == tile.row[1] ? 1 : kBoth;
    int units = 0;
    while (!(units & kLast)) {
      const int group = min(readers[0].next(), readers[1].next());
      units = 0;
      if (readers[0].next() == group) units = first_units, readers[0].advance(args, tile.clip);
      if (readers[1].next() == group) units |= 2, readers[1].advance(args, tile.clip);
      const bool is_last = min(readers[0].next(), readers[1].next()) == INT_MAX;
      const int line = ((tile.clip * args.heads + tile.head) * args.query_groups + group) * args.query_tiles;
      for (int i = tile.begin; i < tile.end; i++) {
        if (is_last && i + 1 == tile.end) units |= kLast;
        const int query_tile = line + i;
        uint64_t* filled = &shared.q_ring.filled[at.slot];
        wait(&shared.q_ring.free[at.slot], at.round ^ 1);
        shared.steps[at.slot] = query_tile << kStepBits | units;
        expect(filled, 2 * kTileBytes + kStatistics * 4);
        const Box box{i * kUnit, tile.head, group, tile.clip};
        load_box(shared.q[at.slot], args.q, box, filled);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, shared.statistics[at.slot],
                           args.statistics + int64_t{query_tile} * kStatistics, kStatistics * 4, filled);
        load_box(shared.grad[at.slot], args.grad, box, filled);
        at.advance();
      }
    }
  }
}

}  // namespace
}  // namespace univid
