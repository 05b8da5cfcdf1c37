// The kernel of pyramid_bwd.cu: dK and dV by blocks that stay with their keys, dQ added up on the way.
//
// A block takes 128 keys of one (clip, head) after another and streams the queries of all frames that read them, 64 at
// a time, from the inverse table. Each of two warpgroups has 64 keys as rows: Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ; Pᵀ and dSᵀ are
// operands of dV += Pᵀ·dO and dK += dSᵀ·Q straight from registers. dSᵀ goes through shared memory to a third warpgroup,
// whose dQ = dS·K is added to a float32 dQ in device memory, kept in the order of its lanes so that each sends 16 bytes
// at a time. The fourth is one thread that feeds. No barrier joins the warpgroups of keys: while one exponentiates, the
// products of others run, and a product is under way from one tile of queries to the next.
//
// Blocks draw their tiles from a counter, longest lists first. What is left of a frame after its tiles of 128, where it
// fits one warpgroup, shares a tile with that of another frame: their lists are merged, and a step says who takes part.
// Where all rows of the table are equal and read about all frames, the key frames are one long one; there and for a
// shared row in general, a key counts as often as the row lists it.
//
// Registers of a lane: 64 of dK and dV, 64 of S and dP, 16 of V, P, dS each, of 208. Shared memory: K twice and V, 48
// KB; 4 stages of Q, dO and statistics, 66 KB; 2 of dS, 32 KB; 16 KB of results: 162 KB of 227.
#pragma once

#include <climits>
#include <cmath>

#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
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
  int lists_per_batch;
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

// A tile of queries as it goes through a block.
struct Step {
  int units;  // a bit for each warpgroup that takes part, and kLast
  int query_tile;
};
constexpr int kBoth = (1 << kUnits) - 1, kLast = 1 << kUnits;

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
  Step steps[C::kStages], ds_steps[2];
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
  // The longest lists first; those of a batch begin with their whole tiles, which fills the card more evenly.
  const int clip_heads = args.clips * args.heads;
  const int rests = args.has_rest ? (args.lists_per_batch + 1) / 2 : 0;
  const int of_batch = (args.lists_per_batch * args.whole_tiles + rests) * clip_heads;
  int rank = index / of_batch * args.lists_per_batch;
  index %= of_batch;
  const int lists = min(args.lists_per_batch, args.lists - rank);
  const int whole = lists * clip_heads * args.whole_tiles;
  const bool is_rest = index >= whole;
  int row = args.whole_tiles * kKeys;
  if (is_rest) {
    index -= whole;
  } else {
    row = index % args.whole_tiles * kKeys;
    index /= args.whole_tiles;
  }
  const int clip = index / args.heads % args.clips;
  tile.head = index % args.heads;
  tile.clip = clip;
  index /= clip_heads;
  const bool is_alone = is_rest && 2 * index + 1 >= lists;
  rank += is_rest ? 2 * index : index;
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
        shared.steps[at.slot] = {units, query_tile};
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

// --- the warpgroup of dQ ---------------------------------------------------------------------------------------------

__device__ void add(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

template <typename Element, class C>
__device__ void add_dq(const Arguments& args, Shared<C>& shared) {
  Cursor<2> tile_at, k_at, at;
  float dq[32];
  while (true) {
    wait(&shared.tile_ring.filled[tile_at.slot], tile_at.round);
    const int state = __shfl_sync(~0u, shared.tiles[tile_at.slot].state, 0);
    arrive_warp(&shared.tile_ring.free[tile_at.slot]);
    tile_at.advance();
    if (state == kEnd) break;
    if (state == kUnread) continue;
    wait(&shared.k_ring.filled[k_at.slot], k_at.round);
    int units = 0;
    while (!(units & kLast)) {
      wait(&shared.ds_ring.filled[at.slot], at.round);
      units = __shfl_sync(~0u, shared.ds_steps[at.slot].units, 0);
      float* to = args.dq + int64_t{shared.ds_steps[at.slot].query_tile} * kTileFloats + threadIdx.x % 128 * 4;
      const auto multiply = [&](auto keys, int first) {
        const int skipped = first * kTileBytes;
        pin(dq);
        wgmma_fence();
        multiply_of_transposed<Element, decltype(keys)::value>(dq, tile_descriptor(shared.ds[at.slot] + skipped),
                                                               tile_descriptor(shared.k[k_at.slot][first]));
        wgmma_commit();
        wgmma_wait<0>();
        pin(dq);
      };
      if ((units & kBoth) == kBoth)
        multiply(std::integral_constant<int, kKeys>{}, 0);
      else
        multiply(std::integral_constant<int, kUnit>{}, units & 1 ? 0 : 1);
      arrive_warp(&shared.ds_ring.free[at.slot]);
      at.advance();
#pragma unroll
      for (int j = 0; j < 8; j++) add(to + 512 * j, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    arrive_warp(&shared.k_ring.free[k_at.slot]);
    k_at.advance();
  }
}

// --- a warpgroup of keys ---------------------------------------------------------------------------------------------

// How often the row that all queries share lists a key.
__device__ float weight_of(const Arguments& args, const Tile& tile, int frame, int row) {
  if (frame < 0 || row >= args.key_rows) return 0;
  if (!args.equal_rows) return 1;
  if (args.lists != args.key_frames) frame = row / args.key_tokens;
  const int32_t* offsets = args.inverse + tile.clip * args.inverse_stride_b + frame;
  return static_cast<float>(__ldg(offsets + 1) - __ldg(offsets));
}

// Zeros in those of a warp's 16 rows of a tile whose weight is 0, by four lanes a row (as they have `weights`).
__device__ void clear_unlisted(char* tile, const float (&weights)[2], int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (weights[i] == 0) {
      uint4* to = reinterpret_cast<uint4*>(tile + (warp * 16 + lane / 4 + 8 * i) * 128 + lane % 4 * 32);
      to[0] = to[1] = uint4{};
    }
}

// Those of a tile's statistics that belong to a lane's columns of an accumulator.
template <int kBegin, int kEnd>
__device__ void load_columns(float2 (&x)[8], const float* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from)) + threadIdx.x % 4 * 8;
#pragma unroll
  for (int j = kBegin; j < kEnd; j++)
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[j].x), "=f"(x[j].y) : "r"(address + 32 * j) : "memory");
}

template <typename Element, class C>
__device__ void consume(const Arguments& args, Shared<C>& shared, int w) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
  Cursor<2> tile_at, k_at, ds_at;
  Cursor<C::kVSlots> v_at;
  Cursor<C::kStages> at;
  float dk[32], dv[32], s[32], dp[32];
  uint32_t v[16], p[16], ds[16];

  const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + w) : "memory"); };
  const auto store = [&](const float (&d)[32], const TensorMap& map, const Tile& tile) {
    if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    meet();
    store_tile<Element>(shared.out[w], d, warp, lane);
    ptx::fence_proxy_async(ptx::space_shared);
    meet();
    if (leader) {
      store_box(map, {tile.row[w], tile.head, tile.frame[w], tile.clip}, shared.out[w]);
      ptx::cp_async_bulk_commit_group();
    }
  };

  // Whether dK and dV are all there; of a tile that is split, they are once this is its last part to be done.
  const auto is_complete = [&](const Tile& tile) {
    const int split = __shfl_sync(~0u, tile.split, 0);
    if (split < 0) return true;
    float* parts = args.parts + int64_t{split} * args.split.parts * kPartFloats + w * 2 * kTileFloats;
    write_part<C::kDK, C::kDV>(parts + int64_t{tile.part} * kPartFloats, dk, dv);
    __threadfence();
    meet();
    if (leader) shared.arrived[w] = atomicAdd(args.counters + 1 + split * kUnits + w, 1);
    meet();
    if (__shfl_sync(~0u, shared.arrived[w], 0) + 1 < args.split.parts) return false;
    __threadfence();
    add_parts<C::kDK, C::kDV>(parts, args.split.parts, dk, dv);
    return true;
  };

  while (true) {
    wait(&shared.tile_ring.filled[tile_at.slot], tile_at.round);
    const Tile& tile = shared.tiles[tile_at.slot];
    const int state = __shfl_sync(~0u, tile.state, 0);
    if (state == kEnd) break;
#pragma unroll
    for (int i = 0; i < 32; i++) dk[i] = dv[i] = 0;
    if (state == kRead) {
      const int row = tile.row[w] + warp * 16 + lane / 4;
      const float weights[2] = {weight_of(args, tile, tile.frame[w], row),
                                weight_of(args, tile, tile.frame[w], row + 8)};
      const bool plain = __all_sync(~0u, weights[0] == 1 && weights[1] == 1);
      wait(&shared.k_ring.filled[k_at.slot], k_at.round);
      wait(&shared.v_ring.filled[v_at.slot], v_at.round);
      if (args.equal_rows && args.lists != args.key_frames) {
        // Tiles across frames have keys that are not listed, and 0 times what is not finite would not be 0.
        clear_unlisted(shared.k[k_at.slot][w], weights, warp, lane);
        clear_unlisted(shared.v[v_at.slot][w], weights, warp, lane);
        ptx::fence_proxy_async(ptx::space_shared);
        meet();
      }
      const uint64_t k_tile = tile_descriptor(shared.k[k_at.slot][w]);
      const uint64_t v_tile = tile_descriptor(shared.v[v_at.slot][w]);
      if constexpr (C::kVInRegisters) {
        load_tile(shared.v[v_at.slot][w], v, warp, lane);
        arrive_warp(&shared.v_ring.free[v_at.slot]);
      }
      int held = -1;  // the stage that the products under way still read
      int units = 0;
      const auto finish = [&] {
        wgmma_wait<0>();
        pin(p);
        pin(ds);
        if (held >= 0) arrive_warp(&shared.q_ring.free[held]);
        held = -1;
      };
      // Goes to the next step that this warpgroup takes part in. False: there is none.
      const auto next_step = [&] {
        while (!(units & kLast)) {
          wait(&shared.q_ring.filled[at.slot], at.round);
          units = __shfl_sync(~0u, shared.steps[at.slot].units, 0);
          if (C::kDQ) {
            wait(&shared.ds_ring.free[ds_at.slot], ds_at.round ^ 1);
            if (threadIdx.x == 0) shared.ds_steps[ds_at.slot] = shared.steps[at.slot];
          }
          if (units >> w & 1) return true;
          if (held >= 0) finish();
          arrive_warp(&shared.q_ring.free[at.slot]);
          at.advance();
          if (C::kDQ) {
            arrive_warp(&shared.ds_ring.filled[ds_at.slot]);
            ds_at.advance();
          }
        }
        return false;
      };
      while (next_step()) {
        const uint64_t q_tile = tile_descriptor(shared.q[at.slot]), grad_tile = tile_descriptor(shared.grad[at.slot]);
        pin(s);
        wgmma_fence();
        multiply_transposed<Element>(s, k_tile, q_tile);
        wgmma_commit();
        if constexpr (C::kDS) {
          pin(dp);
          if constexpr (C::kVInRegisters) {
            pin(v);
            multiply_transposed<Element>(dp, v, grad_tile);
          } else {
            multiply_transposed<Element>(dp, v_tile, grad_tile);
          }
          wgmma_commit();
        }
        float2 logsumexp[8], delta[8];
        load_columns<0, 8>(logsumexp, shared.statistics[at.slot]);
        wgmma_wait<C::kDS ? 1 : 0>();
        pin(s);
        pin(ds);
        if (held >= 0) arrive_warp(&shared.q_ring.free[held]);
#pragma unroll
        for (int i = 0; i < 32; i++) {
          const float2 x = logsumexp[i / 4];
          s[i] = exp2_fast(fmaf(s[i], args.scale_log2, i % 2 == 0 ? -x.x : -x.y));
        }
        if (!plain) {
#pragma unroll
          for (int i = 0; i < 32; i++) s[i] = weights[i / 2 % 2] > 0 ? s[i] * weights[i / 2 % 2] : 0;
        }
        if constexpr (C::kDV) {
#pragma unroll
          for (int i = 0; i < 16; i++) p[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
          pin(p);
          wgmma_fence();
          multiply_add<Element>(dv, p, grad_tile);
          wgmma_commit();
        }
        if constexpr (C::kDS) {
          load_columns<0, 4>(delta, shared.statistics[at.slot] + kUnit);
          wgmma_wait<C::kDV ? 1 : 0>();
          pin(dp);
          load_columns<4, 8>(delta, shared.statistics[at.slot] + kUnit);
#pragma unroll
          for (int i = 0; i < 16; i++) {
            const float2 x = delta[i / 2];
            ds[i] = pack<Element>(s[2 * i] * (dp[2 * i] - x.x), s[2 * i + 1] * (dp[2 * i + 1] - x.y));
          }
        }
        if constexpr (C::kDQ) {
          store_tile(shared.ds[ds_at.slot] + w * kTileBytes, ds, warp, lane);
          ptx::fence_proxy_async(ptx::space_shared);
          arrive_warp(&shared.ds_ring.filled[ds_at.slot]);
          ds_at.advance();
        }
        if constexpr (C::kDK) {
          pin(ds);
          wgmma_fence();
          multiply_add<Element>(dk, ds, q_tile);
          wgmma_commit();
        }
        if constexpr (C::kDV) {
          wgmma_wait<C::kDK ? 1 : 0>();
          pin(p);
        }
        held = at.slot;
        at.advance();
      }
      finish();
      pin(dk);
      pin(dv);
      if (!C::kVInRegisters) arrive_warp(&shared.v_ring.free[v_at.slot]);
      v_at.advance();
      arrive_warp(&shared.k_ring.free[k_at.slot]);
      k_at.advance();
    }
    if (__shfl_sync(~0u, tile.frame[w], 0) >= 0 && is_complete(tile)) {
      if constexpr (C::kDV) store(dv, args.dv, tile);
      if constexpr (C::kDK) {
#pragma unroll
        for (int i = 0; i < 32; i++) dk[i] *= args.scale;
        store(dk, args.dk, tile);
      }
    }
    arrive_warp(&shared.tile_ring.free[tile_at.slot]);
    tile_at.advance();
  }
  if (leader) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
}

template <typename Element, class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  constexpr int kKeyWarps = 4 * kUnits, kDQWarps = 4;
  if (threadIdx.x == 0) {
    const int all = kKeyWarps + (C::kDQ ? kDQWarps : 0);
    shared.tile_ring.init(all);
    shared.k_ring.init(all);
    shared.v_ring.init(kKeyWarps);
    shared.q_ring.init(kKeyWarps);
    shared.ds_ring.init(kDQWarps, kKeyWarps);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (const TensorMap* map : {&args.q, &args.grad, &args.k, &args.v}) prefetch_map(*map);
    let_next_begin();
  }
  __syncthreads();
  wait_for_former();
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (w == kUnits) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kFeedRegisters));
    if (threadIdx.x == kUnits * 128) feed<C>(args, shared);
  } else if (w > kUnits) {
    if constexpr (C::kDQ) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(64));
      add_dq<Element, C>(args, shared);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    consume<Element, C>(args, shared, w);
  }
}

}  // namespace
}  // namespace univid
