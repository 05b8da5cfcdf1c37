// pyramid_st_attn, forward, for Hopper: reference-frame attention with the gather in the copies' coordinates.
//
// A block takes 64 · kGroups queries of one (clip, head, row of the table) after another: one warp feeds it, kGroups
// warpgroups of 64 queries compute. K and V come in tiles of kKeys, as pyramid_gather.cuh tells.
//
// A warpgroup has the product S = Q·Kᵀ of tile j and O += P·V of tile j - 1 under way together, exponentiates half of S
// while the second still runs, and then the rest. The three take turns at starting products, so that one computes
// exponentials while another's products run. Grid: as many blocks as multiprocessors, tile i + k · blocks each; (clip,
// head) slowest, so that the K and V in use stay in L2. What is left for a last round is shared out by warpgroups where
// that gives a block one at the most: alone it takes about two thirds of the time of three (3% of f4, 2026-11-23).
//
// Of three warpgroups, registers of a lane: 48 scores, 24 + 12 of P, 32 of O, 16 of Q, of 160; shared memory: 16 KB of
// Q and 8 KB of O a warpgroup, 24 KB a stage of K and V: 217 KB of 227. Of four, with tiles of 64 keys: 112 registers,
// 16 KB a stage, Q stays in shared memory.
//
// Measured 2026-11-30 on one H200 (B = 2, T = 24, D = 64, bfloat16, replays of a graph; 8192³ product 707), TFLOP/s at
// N/H/R = 2880/5/3, 720/10/6, 180/20/12, 45/20/24: 591, 573, 522, 396 with a row a frame; 598, 600, 572, 393 with a
// shared row; at 1024/8/4 587, 4096/8/2 588, 256/16/16 579.
#include <algorithm>
#include <cmath>

#include "hopper/launch.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "pyramid.h"
#include "pyramid_gather.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kRows = 64;   // queries of a warpgroup
constexpr int kQSlots = 2;  // tiles of Q
constexpr int kTileBytes = kRows * kRowBytes;

template <int kGroups_, int kKeys_, int kStages_, int kRegisters_, bool kQInRegisters_>
struct Config {
  static constexpr int kGroups = kGroups_;  // warpgroups that compute
  static constexpr int kKeys = kKeys_;      // of a tile
  static constexpr int kStages = kStages_;  // tiles of K, and of V, in shared memory
  static constexpr int kTileRows = kGroups * kRows;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kRegisters = kRegisters_;  // of a lane that computes, taken from those that feed; 0: all alike
  static constexpr bool kQInRegisters = kQInRegisters_;
  static constexpr bool kAlternates = kGroups == 3;  // with P's first half twice, a loop of two tiles; of four: C7512
  static constexpr int kThreads = kGroups * 128 + (kRegisters > 0 ? 128 : 32);
};

struct Arguments : Gather {
  TensorMap q, out;
  float* logsumexp;
  int alone_from;  // kShares: tiles from here on are done by blocks of which one warpgroup works
  float scale_log2;
};

template <class C>
struct Shared {
  alignas(1024) char q[kQSlots][C::kGroups][kTileBytes];
  alignas(1024) char o[C::kGroups][kTileBytes];
  alignas(1024) char k[C::kStages][C::kKeyBytes];
  alignas(1024) char v[C::kStages][C::kKeyBytes];
  Ring<kQSlots> q_ring[C::kGroups];
  Ring<C::kStages> ring;  // of K and V
};

// The tile of queries that a block does after `tile` (-1: its first); num_tiles or more: there is none.
template <class C, bool kShares>
__device__ int tile_after(const Arguments& args, int tile) {
  if (!kShares) return tile < 0 ? blockIdx.x : tile + gridDim.x;
  if (tile >= args.alone_from) return args.num_tiles;
  tile = tile < 0 ? blockIdx.x : tile + gridDim.x;
  return tile < args.alone_from ? tile : args.alone_from + blockIdx.x / C::kGroups;
}

template <class C, bool kShares>
__device__ bool takes_part(const Arguments& args, int tile, int w) {
  return !kShares || tile < args.alone_from || blockIdx.x % C::kGroups == w;
}

// The feeding thread.
template <class C, bool kShares>
__device__ void produce(const Arguments& args, Shared<C>& shared) {
  Cursor<kQSlots> q_at;
  Cursor<C::kStages> at;
  for (int tile = tile_after<C, kShares>(args, -1); tile < args.num_tiles; tile = tile_after<C, kShares>(args, tile)) {
    const Place place(args, tile, C::kTileRows);
    References refs(args, place);
    if (!refs.more()) continue;
    for (int w = 0; w < C::kGroups; w++) {
      if (!takes_part<C, kShares>(args, tile, w)) continue;
      Ring<kQSlots>& ring = shared.q_ring[w];
      wait(&ring.free[q_at.slot], q_at.round ^ 1);
      expect(&ring.filled[q_at.slot], kTileBytes);
      load_box(shared.q[q_at.slot][w], args.q, {place.row + w * kRows, place.head, place.group, place.clip},
               &ring.filled[q_at.slot]);
    }
    q_at.advance();
    load_row(args, place, refs, at, shared);
  }
}

// A warpgroup of queries.
template <typename Element, class C, bool kShares>
__device__ void consume(const Arguments& args, Shared<C>& shared, int w) {
  constexpr int kPacked = C::kKeys / 4, kHalf = kPacked / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int pieces = args.pieces_per_tile;
  const bool whole_frames = args.last_piece_rows == args.piece_rows;
  const uint32_t zero = args.num_tiles < 0;  // but the compiler does not know
  Cursor<kQSlots> q_at;
  int q_slot = -1;
  // Of the tile of keys that comes next, and of the last one, whose V is yet to be read: where it lies, and its K as
  // the low half of a descriptor.
  struct Keys {
    Cursor<C::kStages> at;
    uint32_t tile;
  };
  static_assert(sizeof(shared.k) % 1024 == 0);
  constexpr uint32_t kToV = sizeof(shared.k) / 16;  // it follows K
  const uint64_t first_descriptor = tile_descriptor(shared.k);
  const uint32_t first_tile = static_cast<uint32_t>(first_descriptor);
  const auto descriptor = [&](uint32_t tile) { return first_descriptor >> 32 << 32 | tile; };
  Keys next{{}, first_tile}, last{{}, first_tile};
  Softmax<Element, C::kKeys> softmax(args.scale_log2);
  float s[C::kKeys / 2], o[32];
  // P. Its first half is written while products read the last tile's, to the other array: the two change places, or it
  // is copied back.
  uint32_t p_even[kHalf], p_odd[kHalf], p_rest[kHalf], q[16];
  int tile = tile_after<C, kShares>(args, -1);  // the tile of queries whose keys are being read
  int first = 0;                                // of the pieces of a frame, the next tile's first
  int left = 0;                                 // pieces yet to be read for this tile of queries

  const auto is_alone = [&](int tile) { return kShares && tile >= args.alone_from; };
  // Of a tile of K and V; who is alone does it for the others too.
  const auto release = [&](uint64_t* barrier, int tile) {
    if (lane < (is_alone(tile) ? C::kGroups : 1)) ptx::mbarrier_arrive(barrier);
  };
  // Barriers of the turns. Kept in registers, or else they are reckoned anew for every tile.
  int own = 1 + w, other = w + 1 == C::kGroups ? 1 : 2 + w;
  asm volatile("" : "+r"(own), "+r"(other));
  const auto take_turn = [&] { asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory"); };
  const auto give_turn = [&](int to) { asm volatile("bar.arrive %0, 256;" ::"r"(to) : "memory"); };
  const auto start_scores = [&] {
    pin(s);
    if constexpr (C::kQInRegisters) {
      pin(q);
      wgmma_fence();
      multiply_transposed<Element>(s, q, descriptor(next.tile));
    } else {
      wgmma_fence();
      multiply_transposed<Element>(s, tile_descriptor(shared.q[q_slot][w]), descriptor(next.tile));
    }
    wgmma_commit();
  };
  const auto start_output = [&](uint32_t (&p_first)[kHalf]) {
    pin(o);
    pin(p_first);
    pin(p_rest);
    wgmma_fence();
    multiply_add<Element>(o, p_first, descriptor(last.tile + kToV));
    multiply_add<Element>(o, p_rest, descriptor(last.tile + kToV + kHalf / 4 * 128));
    wgmma_commit();
  };
  // Of the tile of keys that comes next: whether some are to be masked. Reckoned a tile ahead, so that nothing waits
  // for it once the scores are there.
  bool masks = false;
  const auto look_ahead = [&] { masks = left < pieces || (!whole_frames && first + pieces >= args.pieces_per_frame); };
  // The branch stands before the wait, whose time it takes.
  const auto finish_scores = [&](auto pending) {
    if (__builtin_expect(masks, false)) {
      asm volatile("// masked");  // so that the branches have no beginning in common
      wgmma_wait<decltype(pending)::value>();
      pin(s);
      mask(args, first, left, s);
    } else {
      wgmma_wait<decltype(pending)::value>();
      pin(s);
    }
  };
  const auto finish_output = [&](uint32_t (&p_first)[kHalf], int tile, int slot) {
    pin(o);
    pin(p_first);
    pin(p_rest);
    release(&shared.ring.free[slot], tile);
  };
  const auto advance = [&] {
    last = next;
    next.at.advance();
    next.tile = next.at.slot == 0 ? first_tile : next.tile + C::kKeyBytes / 16;
    left -= pieces;
    first += args.pieces_step;
    if (first >= args.pieces_per_frame) first -= args.pieces_per_frame;
    look_ahead();
  };
  // Whether the next tile of keys is there: asked ahead, since the answer takes 40 clocks.
  uint32_t is_there = 0;
  const auto look_for_keys = [&] {
    is_there = ptx::mbarrier_test_wait_parity(&shared.ring.filled[next.at.slot], next.at.round);
  };
  const auto wait_for_keys = [&] {
    if (is_there == 0) wait(&shared.ring.filled[next.at.slot], next.at.round);
    is_there = 0;
  };

  // Writes o, and the logsumexp of its rows.
  const auto store = [&](int tile, const float (&o)[32], const float (&logsumexp)[2]) {
    const Place place(args, tile, C::kTileRows);
    const int row = place.row + w * kRows;
    const int64_t line = (static_cast<int64_t>(place.clip) * args.heads + place.head) * args.groups + place.group;
    if (lane % 4 == 0)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = row + warp * 16 + lane / 4 + 8 * half;
        if (r < args.rows) args.logsumexp[line * args.rows + r] = logsumexp[half];
      }
    // The tile of o is free once the former copy from it has been read; the thread that started it says so at the
    // barrier.
    const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(5 + w) : "memory"); };
    const bool leader = threadIdx.x % 128 == 0;
    if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    meet();
    store_tile<Element>(shared.o[w], o, warp, lane);
    ptx::fence_proxy_async(ptx::space_shared);
    meet();
    if (leader) {
      if (row < args.rows) store_box(args.out, {row, place.head, place.group, place.clip}, shared.o[w]);
      ptx::cp_async_bulk_commit_group();
    }
  };
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < 32; i++) o[i] = 0;
  };
  // Goes to the next tile of queries that has keys. False: there is none.
  bool skipped = false;
  const auto next_tile = [&] {
    for (; tile < args.num_tiles; tile = tile_after<C, kShares>(args, tile)) {
      if (!takes_part<C, kShares>(args, tile, w)) continue;
      left = count_references(args, Place(args, tile, C::kTileRows)) * args.pieces_per_frame;
      if (left > 0) {
        first = 0;
        look_ahead();
        wait(&shared.q_ring[w].filled[q_at.slot], q_at.round);
        if constexpr (C::kQInRegisters) {
          load_tile(shared.q[q_at.slot][w], q, warp, lane);
          if (lane == 0) ptx::mbarrier_arrive(&shared.q_ring[w].free[q_at.slot]);
        } else {
          if (lane == 0 && q_slot >= 0) ptx::mbarrier_arrive(&shared.q_ring[w].free[q_slot]);
          q_slot = q_at.slot;
        }
        q_at.advance();
        return true;
      }
      skipped = true;
    }
    return false;
  };

  if (w == 0) give_turn(own);
  clear();
  if (next_tile()) {
    wait_for_keys();
    start_scores();
    finish_scores(std::integral_constant<int, 0>{});
    advance();
    const auto start_rows = [&](uint32_t (&p_first)[kHalf]) {
      uint32_t p[kPacked];
      softmax.start(s, p);
#pragma unroll
      for (int i = 0; i < kHalf; i++) p_first[i] = p[i], p_rest[i] = p[kHalf + i];
    };
    start_rows(p_even);
    float sums[2] = {0, 0};  // of the tile of keys that is to be settled
    bool fits = true;
    const auto settle = [&](uint32_t (&p_first)[kHalf]) {
      if (__builtin_expect(!fits, false)) {
        uint32_t p[kPacked];
        softmax.repeat(s, p, sums, o);
#pragma unroll
        for (int i = 0; i < kHalf; i++) p_first[i] = p[i], p_rest[i] = p[kHalf + i];
      }
      softmax.add(sums);
    };
    // Starts S of the next tile of keys, and O of the last.
    const auto start_both = [&](uint32_t (&p_first)[kHalf]) {
      wait_for_keys();
      if (!is_alone(tile)) take_turn();
      settle(p_first);  // here, where its vote has had the time that the waits take
      start_scores();
      start_output(p_first);
      if (!is_alone(tile)) give_turn(other);
      finish_scores(std::integral_constant<int, 1>{});
      sums[0] = sums[1] = 0;
    };
    // A tile of keys, the first half of whose P goes to p_next.
    const auto step = [&](uint32_t (&p_last)[kHalf], uint32_t (&p_next)[kHalf]) {
      start_both(p_last);
      softmax.template exponentiate<0, kHalf>(s, p_next, sums, zero);
      pin(p_next);
      const int slot = last.at.slot;
      advance();
      // A branch between the halves, or else ptxas waits for the output before the first.
      if (zero == 0) {
        wgmma_wait<0>();
        finish_output(p_last, tile, slot);
        look_for_keys();
        softmax.template exponentiate<kHalf, kPacked>(s, p_rest, sums, zero);
      } else {
        asm volatile("// never");  // so that the branches have no beginning in common
        wgmma_wait<0>();           // and nothing of single lanes, behind which the warp would have to meet
        pin(o);
        pin(p_last);
        pin(p_rest);
        sums[0] = INFINITY;
      }
      fits = softmax.fits(sums);
    };
    while (true) {
      while (left > 0) {
        step(p_even, p_odd);
        if (C::kAlternates && left > 0) {
          step(p_odd, p_even);
        } else {
#pragma unroll
          for (int i = 0; i < kHalf; i++)
            p_even[i] = p_odd[i] | zero;  // a plain move would be merged away, into p_even
        }
      }
      const int former = tile;
      tile = tile_after<C, kShares>(args, tile);
      if (!next_tile()) {
        tile = former;
        break;
      }
      start_both(p_even);
      wgmma_wait<0>();
      finish_output(p_even, former, last.at.slot);
      advance();
      float result[32], logsumexp[2];
      softmax.divide(o, result, logsumexp);
      store(former, result, logsumexp);
      clear();
      start_rows(p_even);
      fits = true;
    }
    settle(p_even);
    start_output(p_even);
    wgmma_wait<0>();
    finish_output(p_even, tile, last.at.slot);
    float result[32], logsumexp[2];
    softmax.divide(o, result, logsumexp);
    store(tile, result, logsumexp);
  }
  if (skipped) {
    clear();
    for (tile = tile_after<C, kShares>(args, -1); tile < args.num_tiles; tile = tile_after<C, kShares>(args, tile))
      if (takes_part<C, kShares>(args, tile, w) && count_references(args, Place(args, tile, C::kTileRows)) == 0)
        store(tile, o, {-INFINITY, -INFINITY});
  }
  if (threadIdx.x % 128 == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
}

template <typename Element, class C, bool kShares>
__global__ void __launch_bounds__(C::kThreads, 1) forward(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (auto& ring : shared.q_ring) ring.init(4);
    shared.ring.init(4 * C::kGroups);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    prefetch_map(args.q);
    prefetch_map(args.out);
  } else if (threadIdx.x <= args.pieces_per_tile) {
    prefetch_map(args.k[threadIdx.x - 1]);
    prefetch_map(args.v[threadIdx.x - 1]);
  }
  __syncthreads();
  take_over();
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (w == C::kGroups) {
    if constexpr (C::kRegisters > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(32));
    if (threadIdx.x / 32 % 4 == 0 && elect()) produce<C, kShares>(args, shared);
  } else {
    if constexpr (C::kRegisters > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    consume<Element, C, kShares>(args, shared, w);
  }
}

template <typename Element, class C>
void launch(const PyramidForward& call, int device, cudaStream_t stream) {
  const PyramidShape& shape = call.shape;
  Arguments args;
  set_gather(args, call, C::kTileRows, C::kKeys);
  const auto map = [&](const TensorView& tensor) {
    return tensor_map(tensor, shape.dtype, shape.batch, args.groups, args.rows, shape.heads, kRows);
  };
  const int64_t stride_n = shape.heads * shape.head_dim;
  args.q = map(call.q);
  args.out = map({call.out, shape.frames * shape.tokens * stride_n, args.rows * stride_n, stride_n, shape.head_dim});
  args.logsumexp = call.logsumexp;
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const int blocks = std::min(args.num_tiles * C::kGroups, num_processors(device)), rest = args.num_tiles % blocks;
  const bool shares = rest > 0 && rest * C::kGroups <= blocks;
  args.alone_from = args.num_tiles - rest;
  const auto kernel = shares ? forward<Element, C, true> : forward<Element, C, false>;
  static OncePerDevice once[2];
  prepare(once[shares], kernel, device);
  launch_early("pyramid_st_attn forward", kernel, shares ? blocks : std::min(args.num_tiles, blocks), C::kThreads,
               sizeof(Shared<C>) + 1024, stream, args);
}

// Rows that tiles of `warpgroups` warpgroups compute for those of one group.
int64_t padded_rows(const PyramidShape& shape, bool one_query, int warpgroups) {
  const int64_t rows = one_query ? shape.frames * shape.tokens : shape.tokens, tile = warpgroups * kRows;
  return (rows + tile - 1) / tile * tile;
}

// Four warpgroups have fewer registers each and read Q from shared memory: 0.95 of the rate, where neither leaves rows
// empty. They are taken where three compute 2.5% more rows.
template <typename Element>
void choose(const PyramidForward& call, int device, cudaStream_t stream) {
  if (40 * padded_rows(call.shape, call.one_query, 4) < 39 * padded_rows(call.shape, call.one_query, 3))
    launch<Element, Config<4, 64, 7, 112, false>>(call, device, stream);
  else
    launch<Element, Config<3, 96, 6, 160, true>>(call, device, stream);
}

}  // namespace

void pyramid_st_attn_forward(const PyramidForward& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (args.shape.dtype == DType::kBFloat16)
    choose<__nv_bfloat16>(args, device, stream);
  else
    choose<__half>(args, device, stream);
}

}  // namespace univid
