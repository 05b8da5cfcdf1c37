// temporal_conv and its gradients in x and the weight, for Hopper: implicit matrix products over shifted rows.
//
// x is seen as (B, T·N, C): tap k of a tile of rows is the box of rows (k - K/2) · N further on. Rows outside a clip
// arrive as zeros, which is the padding of frames, so that tiles may cross frames and no row is looked at.
//
// A block computes 256 x 160 of out (up to 4 blocks of 64 rows): one thread feeds, two warpgroups multiply, each every
// second block of rows; or 192 x 160 by three warpgroups, where few products come before each store or rows are few; or
// 256 x 128, where 160 columns leave more of them empty. Two blocks are a cluster of neighbouring columns, where there
// is a neighbour: each loads its own weight and half of the rows (every second block), which are sent to both, 36 KB a
// block and step of 5.2 MFLOP from L2. Steps are of 64 channels of one tap. Which worker (cluster) computes what:
// temporal_conv_plan.h.
//
// The gradient in x is the same product with taps flipped; its weight tile lies with the elements of the sum as rows,
// in boxes of 32 columns, which wgmma reads transposed.
//
// The gradient in the weight sums over rows: 64 rows are a step, whose left operand are up to 256 channels of grad, and
// the right one channels of x, moved by a tap; both lie with the rows as elements of the sum. Its few tiles are cut
// into parts of rows.
//
// Results: a warp takes 16 x 32 at a time, adds bias and residual in float32, and sends it through 1 KB of shared
// memory, of which it has two. The residual is read in units of 16 bytes, which quads of lanes exchange for what the
// accumulators hold.
//
// At 256 x 160: registers of a lane: 160 accumulators of 232; the feeding warpgroup has 40. Shared memory: 52 KB a
// stage, 4 stages, 16 KB of results: 225 KB of 227. A step's products take 1280 cycles, its shared memory 1312: 56 KB
// read by each warpgroup and 52 KB written.
//
// Measured 2026-11-29 (H200, B = 2, a product of 709 TFLOP/s): 649 / 749 / 808 / 671 TFLOP/s at f1, f2, f4, f8, of
// which a cuBLAS product of the same size has 682 / 728 / 744 / 765; with bias and residual 543 / 697 / 758 / 652; both
// gradients 488 / 710 / 755 / 643. The weight's alone, before first results were stored in turn and in another run: 487
// / 703 / 752 / 619.
#pragma once

#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "temporal_conv_gated.cuh"
#include "temporal_conv_plan.h"
#include "temporal_conv_results.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kBlockBytes = kBlockRows * kStepChannels * 2;

template <int kGroups_, int kBlocks_, int kColumns_, int kStages_, int kCluster_, int kSlots_>
struct Config {
  static constexpr int kGroups = kGroups_;    // warpgroups that compute
  static constexpr int kBlocks = kBlocks_;    // of 64 rows, of each
  static constexpr int kColumns = kColumns_;  // of out
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;  // blocks that share rows
  static constexpr int kSlots = kSlots_;      // for parts of results, of a warp
  static constexpr int kTileBlocks = kGroups * kBlocks;
  static constexpr int kRightBytes = kColumns * kStepChannels * 2;
  static constexpr int kParts = kColumns / kPartColumns;
  static constexpr int kSums = kColumns / 2;  // of a lane and block
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRegisters = kGroups == 2 ? 232 : 160, kFeedRegisters = kGroups == 2 ? 40 : 32;
  static constexpr int kPartialBytes = kTileBlocks * kBlockRows * kColumns * 4;  // of a tile in float32
};

enum class Kind { kForward, kInputGradient, kWeightGradient, kGated };  // the last is linear_geglu.cu's

struct Arguments {
  CUtensorMap left, right, out;            // out = left · right
  int left_moves, right_moves, out_moves;  // 1, or 0: one clip, or the same for all
  Addends addends;
  Gated gated;
  float4* partials;
  uint32_t* flags;  // of (worker's part, rank, warpgroup): the partial tile is there
  Tiling tiling;
  Schedule schedule;
};

template <class C>
struct Shared {
  alignas(1024) char left[C::kStages][C::kTileBlocks][kBlockBytes];
  alignas(1024) char right[C::kStages][C::kRightBytes];
  alignas(1024) char out[C::kGroups * 4][C::kSlots][kPartBytes];
  Place places[C::kStages];  // of the tile whose first step a stage holds: its divisions take as long as some products
  Ring<C::kStages> ring;
};

template <class C>
constexpr int kSharedBytes = sizeof(Shared<C>) + 1024;  // to begin at a multiple of 1024

template <class C>
struct Feed {
  const Arguments& args;
  Shared<C>& shared;
  uint64_t* filled;
  int slot;

  __device__ void load_left(int b, const int32_t (&box)[3]) const {
    constexpr uint16_t kAll = (1 << C::kCluster) - 1;
    void* const to = shared.left[slot][b];
    if constexpr (C::kCluster > 1)
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &args.left, box, filled, kAll);
    else
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &args.left, box, filled);
  }

  // All columns, or part i of them.
  __device__ void load_right(int i, const int32_t (&box)[3]) const {
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared.right[slot] + i * (kPartColumns * 128),
                              &args.right, box, filled);
  }

  // The half that values are made of, or gates.
  __device__ void load_half(int i, const int32_t (&box)[3]) const {
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared.right[slot] + i * (C::kRightBytes / 2),
                              &args.right, box, filled);
  }
};

// Of out.
template <class C, Kind kKind>
__device__ int first_column(const Place& place, int rank) {
  return (place.column_tile * C::kCluster + rank) * (kKind == Kind::kGated ? C::kColumns / 2 : C::kColumns);
}

// The feeding thread.
template <class C, Kind kKind>
__device__ void produce(const Arguments& args, Shared<C>& shared, int worker, int rank) {
  const Tiling& t = args.tiling;
  Cursor<C::kStages> at;
  Piece piece;
  while (advance(args.schedule, worker, piece)) {
    const Place place(t, piece.tile);
    const int column = first_column<C, kKind>(place, rank), end = min(piece.end, place.steps);
    wait(&shared.ring.free[at.slot], at.round ^ 1);
    shared.places[at.slot] = place;
    int row[C::kTileBlocks], clip[C::kTileBlocks];
#pragma unroll
    for (int b = 0; b < C::kTileBlocks; b++) {
      const Rows rows(t, place.block + b);
      row[b] = rows.row;
      clip[b] = rows.clip * args.left_moves;
    }
    // Of the step: its tap and first channel; of the weight's gradient its clip and first row.
    const int steps_of_outer = kKind == Kind::kWeightGradient ? t.clip_steps() : t.steps_of_tap;
    int outer = piece.begin / steps_of_outer, inner = piece.begin % steps_of_outer * kStepChannels;
    for (int step = piece.begin; step < end; step++) {
      const Feed<C> feed{args, shared, &shared.ring.filled[at.slot], at.slot};
      wait(&shared.ring.free[at.slot], at.round ^ 1);
      expect(feed.filled, place.height * kBlockBytes + C::kRightBytes);
      const int tap = place.first_tap + (kKind == Kind::kWeightGradient ? 0 : outer),
                shift = (tap - t.taps / 2) * t.tokens;
#pragma unroll
      for (int b = 0; b < C::kTileBlocks; b++) {
        if (b >= place.height || b % C::kCluster != rank) continue;
        if constexpr (kKind == Kind::kWeightGradient)
          feed.load_left(b, {row[b], inner, outer * args.left_moves});
        else
          feed.load_left(b, {inner, row[b] + shift, clip[b]});
      }
      if constexpr (kKind == Kind::kForward) {
        feed.load_right(0, {inner, tap, column});
      } else if constexpr (kKind == Kind::kGated) {
        feed.load_half(0, {inner, column, 0});
        feed.load_half(1, {inner, args.gated.columns + column, 0});
      } else {
#pragma unroll
        for (int i = 0; i < C::kParts; i++)
          if constexpr (kKind == Kind::kInputGradient)
            feed.load_right(i, {column + i * kPartColumns, t.taps - 1 - tap, inner});
          else
            feed.load_right(i, {column + i * kPartColumns, inner + shift, outer * args.right_moves});
      }
      at.advance();
      inner += kStepChannels;
      if (inner >= steps_of_outer * kStepChannels) {
        inner = 0;
        outer++;
      }
    }
  }
}

// A warpgroup's sums.
template <typename Element, class C, Kind kKind>
class Consumer {
 public:
  __device__ Consumer(const Arguments& args, Shared<C>& shared) : args_(args), shared_(shared) {}

  __device__ void run() {
    Piece piece;
    while (advance(args_.schedule, worker(), piece)) {
      wait(&shared_.ring.filled[at_.slot], at_.round);
      const Place place = read_place(at_.slot);
      const int blocks = (place.height + C::kGroups - 1 - group()) / C::kGroups,
                steps = min(piece.end, place.steps) - piece.begin;
      const bool is_first = piece.begin == 0, is_whole = is_first && piece.end >= place.steps;
      if (blocks == C::kBlocks)
        multiply<C::kBlocks>(place, is_first, steps);
      else if (C::kBlocks > 1 && blocks == 1)
        multiply<1>(place, is_first, steps);
      else
        multiply<0>(place, is_first, steps);
      const bool takes_turns = piece.tile == worker() && worker() + args_.schedule.workers < args_.schedule.whole;
      if (takes_turns) wait_for_turn();
      if (is_whole || add_pieces(piece.tile, blocks)) store(place, blocks);
      if (takes_turns) pass_turn();
    }
    if (lane() == 0) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
  }

 private:
  // Made anew wherever they are needed: registers are scarce.
  __device__ static int worker() { return blockIdx.x / C::kCluster; }
  __device__ static int rank() { return blockIdx.x % C::kCluster; }
  __device__ static int group() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }
  __device__ static int warp() { return threadIdx.x / 32 % 4; }
  __device__ static int lane() { return threadIdx.x % 32; }

  // Read by the lane that arrives on the slot's `free` barrier: racecheck takes reads by the others for races.
  __device__ Place read_place(int slot) const {
    Place place{};
    if (lane() == (C::kCluster > 1 ? rank() : 0)) place = shared_.places[slot];
    return place.from_lane((C::kCluster > 1 ? rank() : 0));
  }

  // Of two whole tiles or more, warpgroups store their first ones one after the other, so that they begin the next ones
  // apart: measured, not explained (docs/kernel-notes.md).
  __device__ static void wait_for_turn() {
    if (group() > 0) asm volatile("bar.sync %0, 256;" ::"r"(C::kGroups + group()) : "memory");
  }

  __device__ static void pass_turn() {
    if (group() + 1 < C::kGroups) asm volatile("bar.arrive %0, 256;" ::"r"(C::kGroups + group() + 1) : "memory");
  }

  // is_first: no piece of the tile lies before.
  template <int kActive>
  __device__ void begin(const Place& place, bool is_first) {
    if constexpr (kKind == Kind::kGated)
      if (is_first && args_.gated.bias != nullptr) {
        const int column = first_column<C, kKind>(place, rank());
        begin_with_bias<Element, C::kColumns, kActive>(args_.gated, column, sums_, lane());
        return;
      }
#pragma unroll
    for (int b = 0; b < kActive; b++)
#pragma unroll
      for (int i = 0; i < C::kSums; i++) sums_[b][i] = 0;
  }

  // Products of one stage are under way while the next are started.
  template <int kActive>
  __device__ void multiply(const Place& place, bool is_first, int steps) {
    constexpr bool kLeftByRows = kKind == Kind::kWeightGradient,
                   kRightByRows = kKind == Kind::kInputGradient || kKind == Kind::kWeightGradient;
    const uint64_t first_left = tile_descriptor(shared_.left[0][group()]);
    const uint64_t first_right =
        kRightByRows ? half_tile_descriptor<kStepChannels>(shared_.right[0]) : tile_descriptor(shared_.right[0]);
    int former = 0;
    begin<kActive>(place, is_first);
#pragma unroll
    for (int b = 0; b < kActive; b++) pin(sums_[b]);
    for (int step = 0; step < steps; step++) {
      wait(&shared_.ring.filled[at_.slot], at_.round);
      if constexpr (kActive > 0) {
        const uint64_t left = first_left + at_.slot * (sizeof(shared_.left[0]) / 16);
        const uint64_t right = first_right + at_.slot * (C::kRightBytes / 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kStepChannels / 16; i++) {
#pragma unroll
          for (int b = 0; b < kActive; b++)
            multiply_tiles<kLeftByRows, kRightByRows>(
                Element{}, sums_[b], left + b * (C::kGroups * kBlockBytes / 16) + (kLeftByRows ? 128 : 2) * i,
                right + (kRightByRows ? 64 : 2) * i);
        }
        wgmma_commit();
        wgmma_wait<1>();
      }
      if (step > 0) release(former);
      former = at_.slot;
      at_.advance();
    }
    if constexpr (kActive > 0) wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kActive; b++) pin(sums_[b]);
    release(former);
  }

  __device__ void release(int slot) {
    __syncwarp();
    if (C::kCluster > 1) {
      if (lane() < C::kCluster) arrive_in(&shared_.ring.free[slot], lane());
    } else if (lane() == 0) {
      ptx::mbarrier_arrive(&shared_.ring.free[slot]);
    }
  }

  // Adds the pieces behind this one, as the tree has it. True: that is the whole tile; else it was left for another.
  __device__ bool add_pieces(int tile, int blocks) {
    const int part = part_of(args_.schedule, worker()), index = piece_of(args_.schedule, part, tile);
    for (int distance = 1;; distance *= 2) {
      if (index & distance) {
        leave(part, blocks);
        return false;
      }
      const int other = part_after(args_.schedule, part, tile, distance);
      if (other >= 0)
        take(other, blocks);
      else if (index == 0)
        return true;
    }
  }

  __device__ int place_of(int part) const { return (part * C::kCluster + rank()) * C::kGroups + group(); }

  __device__ float4* partial(int part) const {
    return args_.partials + place_of(part) * (C::kBlocks * C::kSums / 4 * 128) + threadIdx.x % 128;
  }

  // Leaves sums in the workspace.
  __device__ void leave(int part, int blocks) {
    float4* const to = partial(part);
    uint32_t* const flag = args_.flags + place_of(part);
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++)
      if (b < blocks)
#pragma unroll
        for (int i = 0; i < C::kSums; i += 4)
          __stcg(to + (b * C::kSums + i) * 32, float4{sums_[b][i], sums_[b][i + 1], sums_[b][i + 2], sums_[b][i + 3]});
    __threadfence();
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group()) : "memory");
    if (threadIdx.x % 128 == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
  }

  __device__ void take(int part, int blocks) {
    const uint32_t* const flag = args_.flags + place_of(part);
    uint32_t there = 0;
    while (there == 0) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
    const float4* const from = partial(part);
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++)
      if (b < blocks)
#pragma unroll
        for (int i = 0; i < C::kSums; i += 4) {
          const float4 more = __ldcg(from + (b * C::kSums + i) * 32);
          sums_[b][i] += more.x;
          sums_[b][i + 1] += more.y;
          sums_[b][i + 2] += more.z;
          sums_[b][i + 3] += more.w;
          if (i % 20 == 16) __syncwarp();  // or more registers go into loads than there are
        }
  }

  __device__ void store(const Place& place, int blocks) {
    const int column = first_column<C, kKind>(place, rank());
    if constexpr (kKind == Kind::kGated)
      store_gated(place, blocks, column);
    else
      store_parts(place, blocks, column);
  }

  __device__ void store_gated(const Place& place, int blocks, int column) {
    constexpr int kPart = kGatedPartColumns<C::kColumns>;
    static_assert(16 * kPart * 2 <= C::kSlots * kPartBytes);
    char* const slot = shared_.out[group() * 4 + warp()][0];
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++) {
      if (b >= blocks) break;
      const int row = (place.block + group() + b * C::kGroups) * kBlockRows + warp() * 16;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t words[C::kColumns / 16];
        finish_gated<Element, C::kColumns>(sums_[b], i, words);
        write_gated(args_.gated, row, column + i * kPart, words, slot, lane());
      }
    }
  }

  __device__ void store_parts(const Place& place, int blocks, int column) {
    constexpr int kAhead = 2;  // parts whose residual is under way
    uint4 residual[kAhead][2];
    if (lane() == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());  // all slots are free
#pragma unroll
    for (int b = 0; b < C::kBlocks; b++) {
      if (b >= blocks) break;
      const Target target(args_.tiling, args_.addends, place.block + group() + b * C::kGroups, warp(), lane());
#pragma unroll
      for (int i = 0; i < kAhead; i++) target.load(args_.addends, column + i * kPartColumns, lane(), residual[i]);
#pragma unroll
      for (int i = 0; i < C::kParts; i++) {
        char* const slot = shared_.out[group() * 4 + warp()][(b * C::kParts + i) % C::kSlots];
        if (lane() == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<C::kSlots - 1>());
        __syncwarp();
        finish_part<Element>(args_.addends, target, column + i * kPartColumns, residual[i % kAhead], sums_[b] + i * 16,
                             slot, lane());
        if (i + kAhead < C::kParts)
          target.load(args_.addends, column + (i + kAhead) * kPartColumns, lane(), residual[i % kAhead]);
        ptx::fence_proxy_async(ptx::space_shared);
        __syncwarp();
        if (lane() == 0) {
          const int layer = kKind == Kind::kWeightGradient ? place.first_tap : target.clip * args_.out_moves;
          const int32_t box[3] = {column + i * kPartColumns, target.row, layer};
          if (box[0] < args_.addends.columns && target.row < args_.tiling.rows)
            ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &args_.out, box, slot);
          ptx::cp_async_bulk_commit_group();
        }
      }
    }
  }

  const Arguments& args_;
  Shared<C>& shared_;
  Cursor<C::kStages> at_;
  float sums_[C::kBlocks][C::kSums];
};

template <int kCluster>
__device__ void meet() {
  if constexpr (kCluster > 1) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  } else {
    __syncthreads();
  }
}

template <typename Element, class C, Kind kKind>
__global__ void __launch_bounds__(C::kThreads, 1) convolve(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    shared.ring.init(4 * C::kGroups * C::kCluster);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  meet<C::kCluster>();
  const int worker = blockIdx.x / C::kCluster, rank = blockIdx.x % C::kCluster;
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (w == C::kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kFeedRegisters));
    if (threadIdx.x == C::kGroups * 128) produce<C, kKind>(args, shared, worker, rank);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    Consumer<Element, C, kKind>(args, shared).run();
  }
  if constexpr (C::kCluster > 1) meet<C::kCluster>();  // the other block may still write here
}

}  // namespace
}  // namespace univid
