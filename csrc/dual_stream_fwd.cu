// dual_stream_attn, forward, for Hopper: the keys and values of both streams stay in shared memory, the queries pass
// by.
//
// A (clip, head) has few keys and many queries. A block takes a range of its tiles of 64 queries (and where the range
// goes on into the next (clip, head), reads keys anew); each of kGroups warpgroups takes every kGroups-th of them and
// fetches its queries itself, two tiles ahead, into room that its last results have left. Keys come in tiles of 88,
// those of the second stream behind those of the first: 257 + 77 keys are 3 + 1 tiles with 18 keys to spare. Only a
// stream's last tile has keys to strike out.
//
// A warpgroup has O += P·V of one tile of keys and S = Q·Kᵀ of the next under way together; what it computes itself
// meanwhile runs beside the products of the other warpgroups. There is one O: a second stream of one tile of keys knows
// its sum before its P·V starts, so the first stream's O is brought to its units, (weight / sum) / (weight / sum), and
// the end result scaled by the second's. The tiles of keys are counted at compile time (C), and a warpgroup's place
// among the queries is counted on: with loops and divisions more than half of the instructions were neither
// exponentials nor products, and warps waited for these, not for the tensor cores.
//
// P = exp2(scale · S - reference), any reference near the row's largest score will do: it is 0, until a tile's sum
// shows that P has outgrown its dtype, or that the first tile of a stream all but vanishes. Then the tile is
// exponentiated again with its maximum as the reference. So there is no search for a maximum as a rule.
//
// Q comes from shared memory, though a product of 64 x 88 then takes 7/8 of its bandwidth: without Q a lane needs few
// enough registers for a fourth warpgroup, which is worth more.
//
// Registers of a lane: 44 scores, 24 of P, 32 of O, of 128. Shared memory: 16 KB of Q and results a warpgroup, 22 KB a
// tile of keys and values: at most 4 tiles, as the backward holds.
//
// Measured 2026-11-30 on one H200 (B = 2, T = 24, D = 64, bfloat16, 77 + 257 keys, replays of a graph; 8192³ product
// 728 TFLOP/s), ms at N/H = 2880/5, 720/10, 180/20, 45/20: 0.120, 0.067, 0.038, 0.015.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "dual_stream.cuh"
#include "hopper/launch.cuh"
#include "hopper/softmax.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace univid {
namespace {

using namespace hopper;

constexpr int kGroups = 4;  // warpgroups
constexpr int kQSlots = 2;  // tiles of Q

struct Arguments {
  TensorMap q, out, k[2], v[2];
  Queries queries;
  Weight weight[2];
  float* logsumexp[2];
  int length[2];
  float scale_log2;
};

template <class C>
struct Shared {
  alignas(1024) char q[kGroups][kQSlots][kTileBytes];  // and, where queries have passed, their results
  alignas(1024) char k[C::kAll][kKeyBytes];
  alignas(1024) char v[C::kAll][kKeyBytes];
  char zeros[8 * kRowBytes];  // P of a tile has 96 columns, the last 8 being zeros: what they meet must be finite
  uint64_t q_filled[kGroups][kQSlots];
  uint64_t k_filled, v_filled;
};

__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two neighbouring elements, scaled.
template <typename Element>
__device__ void scale_packed(uint32_t& pair, float scale) {
  float low, high;
  unpack<Element>(pair, low, high);
  pair = pack<Element>(low * scale, high * scale);
}

// The softmax of a lane's part of 64 rows over the tiles of one stream.
template <typename Element>
class StreamSoftmax {
 public:
  __device__ explicit StreamSoftmax(float scale_log2) : scale_(scale_log2) { restart(); }

  __device__ void restart() {
    reference_[0] = reference_[1] = 0;
    total_[0] = total_[1] = 0;
  }

  // p = exp2(s). Rescales o where a row has outgrown its reference.
  template <bool kStarts>
  __device__ void exponentiate(const float (&s)[kScores], uint32_t (&p)[kPacked], float (&o)[32]) {
    float sums[2];
    exponentiate(s, p, sums);
    const float least = kStarts ? kLeast : 0.f;
    const auto fits = [&](float sum) { return least <= sum && sum <= kMost; };
    if (!__all_sync(~0u, fits(sums[0]) && fits(sums[1]))) {
      float peak[2], factor[2];
      find_peaks(s, peak);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        if (!kStarts) peak[r] = fmaxf(peak[r], reference_[r]);
        factor[r] = kStarts ? 0.f : exp2_fast(reference_[r] - peak[r]);
        reference_[r] = peak[r];
        total_[r] *= factor[r];
      }
      if (!kStarts)
#pragma unroll
        for (int i = 0; i < 32; i++) o[i] *= factor[i / 2 % 2];
      exponentiate(s, p, sums);
    }
    total_[0] += sums[0];
    total_[1] += sums[1];
  }

  // The sum of a row, over its four lanes, and its reference. The next stream may begin.
  __device__ void finish(float (&total)[2], float (&reference)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] = row_sum(total_[r]);
      reference[r] = reference_[r];
    }
    restart();
  }

 private:
  // What a lane's part of a tile may sum to: P keeps its precision, and its products with V stay within float32.
  static constexpr float kMost = std::is_same_v<Element, __half> ? 0x1p14f : 0x1p16f;
  static constexpr float kLeast = std::is_same_v<Element, __half> ? 0x1p-5f : 0x1p-30f;

  __device__ void find_peaks(const float (&s)[kScores], float (&peak)[2]) const {
    peak[0] = peak[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < kScores; i++) peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) peak[r] = row_max(peak[r]) * scale_;
  }

  __device__ void exponentiate(const float (&s)[kScores], uint32_t (&p)[kPacked], float (&sums)[2]) const {
    sums[0] = sums[1] = 0;
#pragma unroll
    for (int i = 0; i < kScores / 2; i++) {
      const float x = exp2_fast(fmaf(s[2 * i], scale_, -reference_[i % 2]));
      const float y = exp2_fast(fmaf(s[2 * i + 1], scale_, -reference_[i % 2]));
      sums[i % 2] += x + y;
      p[i] = pack<Element>(x, y);
    }
  }

  float scale_;
  float reference_[2];
  float total_[2];
};

template <typename Element, class C>
__device__ void attend(const Arguments& args, Shared<C>& shared, int w) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool leader = threadIdx.x % 128 == 0;
  const Queries& queries = args.queries;
  const int begin = static_cast<int>(int64_t{queries.num_tiles} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{queries.num_tiles} * (blockIdx.x + 1) / gridDim.x);
  const uint64_t q_tile = tile_descriptor(shared.q[w]), k_tile = tile_descriptor(shared.k),
                 v_tile = tile_descriptor(shared.v);
  Cursor<kQSlots> q_at;
  StreamSoftmax<Element> softmax(args.scale_log2);
  float s[kScores], o[32];
  uint32_t p[kPacked];
#pragma unroll
  for (int i = 0; i < 32; i++) o[i] = 0;
#pragma unroll
  for (int i = kScores / 2; i < kPacked; i++) p[i] = 0;

  const auto load_queries = [&](const Place& place, int slot) {
    expect(&shared.q_filled[w][slot], kTileBytes);
    load_box(shared.q[w][slot], args.q, place.box(), &shared.q_filled[w][slot]);
  };
  const auto load_keys = [&](const Place& place, const TensorMap(&maps)[2], char (&to)[C::kAll][kKeyBytes],
                             uint64_t* filled) {
    expect(filled, sizeof(to));
    for (int i = 0; i < C::kAll; i++)
      load_box(to[i], maps[C::stream(i)], {C::place(i) * kKeys, place.head, 0, place.clip}, filled);
  };
  const auto start_scores = [&](int key_tile) {
    pin(p);  // the former scores have been read
#pragma unroll
    for (int i = 0; i < kScores; i++) s[i] = 0;  // makes no code; without it ptxas keeps the former and serialises
    wgmma_fence();
    multiply_transposed<Element>(s, q_tile + q_at.slot * (kTileBytes / 16), k_tile + key_tile * (kKeyBytes / 16));
    wgmma_commit();
  };
  const auto start_output = [&](int key_tile) {
    pin(o);
    wgmma_fence();
    multiply_maybe_add<Element>(o, p, v_tile + key_tile * (kKeyBytes / 16), key_tile != 0);
    wgmma_commit();
  };
  const auto strike_out = [&](int key_tile) {
    if (C::ends(key_tile)) mask(s, args.length[C::stream(key_tile)] - C::place(key_tile) * kKeys);
  };
  const auto weights = [&](const Place& place, int stream, float (&weight)[2]) {
    const int row = place.row + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) weight[i] = args.weight[stream].at(queries, place, min(row + 8 * i, queries.rows - 1));
  };
  // Writes a stream's logsumexp, in natural units.
  const auto write_logsumexp = [&](const Place& place, int stream, const float (&total)[2],
                                   const float (&reference)[2]) {
    const int row = place.row + warp * 16 + lane / 4;
    float* const to = args.logsumexp[stream] + place.index(queries, row);
    if (lane % 4 == 0 && row < queries.rows) to[0] = (reference[0] + log2_fast(total[0])) * 0.69314718f;
    if (lane % 4 == 0 && row + 8 < queries.rows) to[8] = (reference[1] + log2_fast(total[1])) * 0.69314718f;
  };
  // Of the first stream: writes its logsumexp, makes weight / sum.
  const auto finish_sums = [&](const Place& place, float (&factor)[2]) {
    float total[2], reference[2];
    softmax.finish(total, reference);
    write_logsumexp(place, 0, total, reference);
    weights(place, 0, factor);
#pragma unroll
    for (int i = 0; i < 2; i++) factor[i] *= reciprocal(total[i]);
  };
  const auto store = [&](const Place& place) {
    // The tile of o is free once the former copy from it has been read; the thread that started it says so at the
    // barrier. At the second one, all warps have done with the queries of this tile.
    const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + w) : "memory"); };
    meet();
    store_tile<Element>(shared.q[w][q_at.slot ^ 1], o, warp, lane);
    ptx::fence_proxy_async(ptx::space_shared);
    meet();
    if (leader) {
      store_box(args.out, place.box(), shared.q[w][q_at.slot ^ 1]);
      ptx::cp_async_bulk_commit_group();
    }
  };

  int first = begin;  // tile of queries of a line
  for (uint32_t round = 0; first < end; round ^= 1) {
    const Share share = Share::of<kGroups>(queries, first, end, w);
    int left = share.left;
    Place place = share.place;
    if (first > begin) {
      if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());  // results lie where queries go
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      load_keys(place, args.k, shared.k, &shared.k_filled);
      load_keys(place, args.v, shared.v, &shared.v_filled);
    }
    first = share.stop;
    if (left <= 0) continue;
    if (leader) {
      load_queries(place, q_at.slot);
      if (left > 1) load_queries(place.after(queries, kGroups), q_at.slot ^ 1);
    }
    wait(&shared.k_filled, round);
    wait(&shared.q_filled[w][q_at.slot], q_at.round);
    start_scores(0);
    wgmma_wait<0>();
    pin(s);
    strike_out(0);
    softmax.template exponentiate<true>(s, p, o);
    wait(&shared.v_filled, round);
    for (bool starts = true;; starts = false) {
      // P of the first tile of keys is there.
      const Place next_place = place.after(queries, kGroups);
      if (leader && !starts && left > 1) {
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
        load_queries(next_place, q_at.slot ^ 1);
      }
      float factor[2], common[2], total[2], reference[2];  // the last three of the second stream
      const auto step = [&](auto key_tile) {
        constexpr int kTile = decltype(key_tile)::value;
        constexpr bool kEndsFirst = C::ends(kTile);
        start_scores(kTile + 1);
        start_output(kTile);
        if constexpr (kEndsFirst) {
          finish_sums(place, factor);
          weights(place, 1, common);
        }
        wgmma_wait<0>();
        pin(s);
        pin(o);
        pin(p);
        strike_out(kTile + 1);
        if constexpr (kEndsFirst) {
          softmax.template exponentiate<true>(s, p, o);
          softmax.finish(total, reference);
#pragma unroll
          for (int r = 0; r < 2; r++) common[r] *= reciprocal(total[r]);
          // P stays as it is, and O is brought to its units. Not where weight / sum vanishes beside the first stream's.
          const auto serves = [&](int r) {
            return fabsf(common[r]) > fabsf(factor[r]) * 0x1p-60f && fabsf(common[r]) > 0x1p-100f;
          };
          if (!__all_sync(~0u, serves(0) && serves(1))) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
              if (serves(r)) continue;
              const float unit = fmaxf(fabsf(factor[r]) * 0x1p-60f, 0x1p-100f);
              const float scale = common[r] * reciprocal(unit);
              common[r] = unit;
#pragma unroll
              for (int i = r; i < kScores / 2; i += 2) scale_packed<Element>(p[i], scale);
            }
          }
#pragma unroll
          for (int r = 0; r < 2; r++) factor[r] *= reciprocal(common[r]);
#pragma unroll
          for (int i = 0; i < 32; i++) o[i] *= factor[i / 2 % 2];
        } else {
          softmax.template exponentiate<false>(s, p, o);
        }
      };
      [&]<int... kTile>(std::integer_sequence<int, kTile...>) {
        (step(std::integral_constant<int, kTile>{}), ...);
      }(std::make_integer_sequence<int, C::kAll - 1>{});
      // The last tile of keys, and the next queries' first scores. Where none follow they are made of what lies there,
      // and are not used.
      q_at.advance();
      if (--left > 0) wait(&shared.q_filled[w][q_at.slot], q_at.round);
      start_scores(0);
      start_output(C::kAll - 1);
      if constexpr (C::kSecond == 0)
        finish_sums(place, factor);
      else
        write_logsumexp(place, 1, total, reference);
      wgmma_wait<0>();
      pin(s);
      pin(o);
      pin(p);
#pragma unroll
      for (int i = 0; i < 32; i++) o[i] *= C::kSecond == 0 ? factor[i / 2 % 2] : common[i / 2 % 2];
      store(place);
      if (left == 0) break;
      place = next_place;
      strike_out(0);
      softmax.template exponentiate<true>(s, p, o);
    }
  }
  if (leader) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
}

template <typename Element, class C>
__global__ void __launch_bounds__(kGroups * 128, 1) forward(const __grid_constant__ Arguments args) {
  extern __shared__ char dynamic[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (auto& slots : shared.q_filled)
      for (uint64_t& barrier : slots) ptx::mbarrier_init(&barrier, 1);
    ptx::mbarrier_init(&shared.k_filled, 1);
    ptx::mbarrier_init(&shared.v_filled, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (const TensorMap* map : {&args.q, &args.k[0], &args.v[0], &args.k[1], &args.v[1], &args.out})
      prefetch_map(*map);
  }
  if (threadIdx.x < sizeof shared.zeros / 16) reinterpret_cast<uint4*>(shared.zeros)[threadIdx.x] = {};
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  take_over();
  attend<Element, C>(args, shared, __shfl_sync(~0u, threadIdx.x / 128, 0));
}

template <typename Element, class C>
void launch(const DualStreamForward& call, const KeyStream (&streams)[2], int device, cudaStream_t stream) {
  const DualStreamShape& shape = call.shape;
  Arguments args{};
  args.queries = Queries(shape, call.one_query);
  const Queries& queries = args.queries;
  const auto query_map = [&](const TensorView& tensor) {
    return tensor_map(tensor, shape.dtype, shape.batch, queries.groups, queries.rows, shape.heads, kRows);
  };
  constexpr int kDim = 64;
  const int64_t stride_n = shape.heads * kDim;
  args.q = query_map(call.q);
  args.out = query_map({call.out, shape.frames * shape.tokens * stride_n, queries.rows * stride_n, stride_n, kDim});
  for (int i = 0; i < 2; i++) {
    const KeyStream& keys = streams[i];
    if (keys.length == 0) continue;
    const auto key_map = [&](const TensorView& tensor) {
      return tensor_map(tensor, shape.dtype, shape.batch, 1, keys.length, shape.heads, kKeys);
    };
    args.k[i] = key_map(keys.k);
    args.v[i] = key_map(keys.v);
    args.weight[i] = Weight(keys);
    args.logsumexp[i] = keys.logsumexp;
    args.length[i] = static_cast<int>(keys.length);
  }
  args.scale_log2 = shape.scale * static_cast<float>(M_LOG2E);

  const auto kernel = forward<Element, C>;
  static OncePerDevice once;
  prepare(once, kernel, device);
  const int blocks =
      count_blocks(shape.batch * shape.heads, queries.tiles_per_line, num_processors(device), kGroups, 2);
  launch_early("dual_stream_attn forward", kernel, blocks, kGroups * 128, sizeof(Shared<C>) + 1024, stream, args);
}

template <typename Element>
void choose(const DualStreamForward& call, int device, cudaStream_t stream) {
  KeyStream streams[2] = {call.streams[0], call.streams[1]};
  if (streams[0].length < streams[1].length) std::swap(streams[0], streams[1]);
  choose_key_tiles(count_key_tiles(streams[0].length), streams[1].length != 0, [&](auto longer, auto has_two) {
    launch<Element, KeyTiles<longer.value, has_two.value>>(call, streams, device, stream);
  });
}

}  // namespace

bool dual_stream_attn_fits(int64_t first_length, int64_t second_length) {
  const int first = count_key_tiles(first_length), second = count_key_tiles(second_length);
  return first + second <= kMaxKeyTiles && std::min(first, second) <= 1;
}

void dual_stream_attn_forward(const DualStreamForward& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (args.shape.dtype == DType::kBFloat16)
    choose<__nv_bfloat16>(args, device, stream);
  else
    choose<__half>(args, device, stream);
}

}  // namespace univid
