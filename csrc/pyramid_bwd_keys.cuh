// The kernel of pyramid_bwd.cu: dK and dV by blocks that stay with their keys, dQ added up on the way.
//
// A block takes 128 keys of one (clip, head) after another and streams the queries of all frames that read them, 64 at
// a time, from the inverse table. Each of two warpgroups has 64 keys as rows: Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ; Pᵀ and dSᵀ are
// operands of dV += Pᵀ·dO and dK += dSᵀ·Q straight from registers. dSᵀ goes through shared memory to a third warpgroup,
// whose dQ = dS·K is added to a float32 dQ in device memory, kept in the order of its lanes so that each sends 16 bytes
// at a time. The fourth is one thread that feeds. No barrier joins the warpgroups of keys: while one exponentiates, the
// products of others run, and a product is under way from one tile of queries to the next.
//
// Blocks draw their tiles from a counter (find_tile: in which order). What is left of a frame after its tiles of 128,
// where it fits one warpgroup, shares a tile with that of another frame: their lists are merged, and a step says who
// takes part. Where all rows of the table are equal and read about all frames, the key frames are one long one; there
// and for a shared row in general, a key counts as often as the row lists it.
//
// Registers of a lane: 64 of dK and dV, 64 of S and dP, 16 of V, P, dS and logsumexps (then deltas) each, of 208.
// Shared memory: K twice and V, 48 KB; 4 stages of Q, dO and statistics, 66 KB; 2 of dS, 32 KB; 16 KB of results: 162
// KB of 227.
#pragma once

#include <cmath>

#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "pyramid_bwd_feed.cuh"

namespace univid {
namespace {

// In the first lane a number in shared memory where `there` holds; else, and in the other lanes, -1. It is the one that
// arrives on its slot's `free` barrier: racecheck takes reads by the others for races.
__device__ inline int read_first(const int& number, bool there = true) {
  int value = -1;
  asm volatile("{ .reg .pred first; setp.eq.u32 first, %2, 0;\n@first ld.shared.u32 %0, [%1]; }"
               : "+r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&number))), "r"(there ? threadIdx.x % 32 : 1)
               : "memory");
  return value;
}

// What the first lane has, for a whole warp.
__device__ inline int of_first(int value) { return __shfl_sync(~0u, value, 0); }

__device__ inline int read(const int& number) { return of_first(read_first(number)); }

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
    const int state = read(shared.tiles[tile_at.slot].state);
    arrive_warp(&shared.tile_ring.free[tile_at.slot]);
    tile_at.advance();
    if (state == kEnd) break;
    if (state == kUnread) continue;
    wait(&shared.k_ring.filled[k_at.slot], k_at.round);
    int step = 0;
    while (!(step & kLast)) {
      wait(&shared.ds_ring.filled[at.slot], at.round);
      step = read(shared.ds_steps[at.slot]);
      float* to = args.dq + int64_t{step >> kStepBits} * kTileFloats + threadIdx.x % 128 * 4;
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
      if ((step & kBoth) == kBoth)
        multiply(std::integral_constant<int, kKeys>{}, 0);
      else
        multiply(std::integral_constant<int, kUnit>{}, step & 1 ? 0 : 1);
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
__device__ float weight_of(const Arguments& args, int clip, int frame, int row) {
  if (frame < 0 || row >= args.key_rows) return 0;
  if (!args.equal_rows) return 1;
  if (args.lists != args.key_frames) frame = row / args.key_tokens;
  const int32_t* offsets = args.inverse + clip * args.inverse_stride_b + frame;
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
    const int split = read(tile.split);
    if (split < 0) return true;
    float* parts = args.parts + int64_t{split} * args.split.parts * kPartFloats + w * 2 * kTileFloats;
    write_part<C::kDK, C::kDV>(parts + int64_t{read(tile.part)} * kPartFloats, dk, dv);
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
    const int state = read(tile.state);
    if (state == kEnd) break;
#pragma unroll
    for (int i = 0; i < 32; i++) dk[i] = dv[i] = 0;
    if (state == kRead) {
      const int clip = read(tile.clip), frame = read(tile.frame[w]);
      const int row = read(tile.row[w]) + warp * 16 + lane / 4;
      const float weights[2] = {weight_of(args, clip, frame, row), weight_of(args, clip, frame, row + 8)};
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
      int step = 0;
      int ahead = -1;  // the step after it, where that was there when looked for: the answer takes 200 clocks
      const auto finish = [&] {
        wgmma_wait<0>();
        pin(p);
        pin(ds);
        if (held >= 0) arrive_warp(&shared.q_ring.free[held]);
        held = -1;
      };
      const auto begin_ds = [&] {
        wait(&shared.ds_ring.free[ds_at.slot], ds_at.round ^ 1);
        if (threadIdx.x == 0) shared.ds_steps[ds_at.slot] = step;
      };
      // Goes to the next step that this warpgroup takes part in. False: there is none.
      const auto next_step = [&] {
        while (!(step & kLast)) {
          step = ahead;
          if (step < 0) {
            wait(&shared.q_ring.filled[at.slot], at.round);
            step = read(shared.steps[at.slot]);
          }
          ahead = -1;
          if (step >> w & 1) return true;
          if (held >= 0) finish();
          arrive_warp(&shared.q_ring.free[at.slot]);
          at.advance();
          if (C::kDQ) {
            begin_ds();
            arrive_warp(&shared.ds_ring.filled[ds_at.slot]);
            ds_at.advance();
          }
        }
        return false;
      };
      while (next_step()) {
        const uint64_t q_tile = tile_descriptor(shared.q[at.slot]), grad_tile = tile_descriptor(shared.grad[at.slot]);
        float2 logsumexp[8], delta[8];
        load_columns<0, 8>(logsumexp, shared.statistics[at.slot]);  // before products keep shared memory busy
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
        Cursor<C::kStages> next = at;
        next.advance();
        const bool next_is_there = ptx::mbarrier_test_wait_parity(&shared.q_ring.filled[next.slot], next.round);
        wgmma_wait<C::kDS ? 1 : 0>();
        pin(s);
        pin(ds);
        if (held >= 0) arrive_warp(&shared.q_ring.free[held]);
#pragma unroll
        for (int i = 0; i < 32; i++) {
          const float2 x = logsumexp[i / 4];
          s[i] = exp2_fast(fmaf(s[i], args.scale_log2, i % 2 == 0 ? -x.x : -x.y));
        }
        if constexpr (C::kDS) load_columns<0, 8>(delta, shared.statistics[at.slot] + kUnit);
        ahead = read_first(shared.steps[next.slot], __all_sync(~0u, next_is_there));
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
        ahead = of_first(ahead);
        if constexpr (C::kDS) {
          wgmma_wait<C::kDV ? 1 : 0>();
          pin(dp);
#pragma unroll
          for (int i = 0; i < 16; i++) {
            const float2 x = delta[i / 2];
            ds[i] = pack<Element>(s[2 * i] * (dp[2 * i] - x.x), s[2 * i + 1] * (dp[2 * i + 1] - x.y));
          }
        }
        if constexpr (C::kDQ) {
          begin_ds();
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
    if (read(tile.frame[w]) >= 0 && is_complete(tile)) {
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
  if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
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
  }
  __syncthreads();
  take_over();
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
