// Bulk tensor copies (TMA) and the mbarriers that they complete on, over <cuda/ptx>.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <cuda/ptx>
#include <stdexcept>
#include <string>

#include "../common.h"

namespace univid::hopper {

namespace ptx = cuda::ptx;

// A tensor of 2-byte elements as its copies see it. Sizes and the box count elements, from the contiguous dimension on;
// strides, of the others, count bytes.
template <int kRank>
CUtensorMap encode_map(const void* data, DType dtype, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                       CUtensorMapSwizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint32_t steps[kRank];
  std::fill(steps, steps + kRank, 1);
  CUtensorMap map;
  const CUresult error =
      encode(&map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::invalid_argument("cuTensorMapEncodeTiled refuses a tensor: error " + std::to_string(error));
  return map;
}

// A (B, T, N, H, D) tensor as its copies see it: boxes of `rows` tokens of one head of one frame, 64 elements of 2
// bytes each, 128-byte swizzle. An expanded dimension has one element, which every index means.
struct TensorMap {
  CUtensorMap map;
  int moves_h, moves_t, moves_b;  // 1, or 0: expanded or of size 1
};

inline TensorMap tensor_map(const TensorView& tensor, DType dtype, int64_t batch, int64_t frames, int64_t tokens,
                            int64_t heads, int rows) {
  constexpr cuuint32_t kDim = 64;
  TensorMap result{};
  cuuint64_t sizes[5] = {kDim, static_cast<cuuint64_t>(tokens), 1, 1, 1};
  cuuint64_t strides[4] = {static_cast<cuuint64_t>(tensor.stride_n) * 2, 16, 16, 16};  // bytes; any where the size is 1
  if (tokens == 1) strides[0] = 16;
  const auto add = [&](int axis, int64_t size, int64_t stride, int& moves) {
    moves = size > 1 && stride != 0;
    if (!moves) return;
    sizes[axis] = size;
    strides[axis - 1] = stride * 2;
  };
  add(2, heads, tensor.stride_h, result.moves_h);
  add(3, frames, tensor.stride_t, result.moves_t);
  add(4, batch, tensor.stride_b, result.moves_b);
  const cuuint32_t box[5] = {kDim, static_cast<cuuint32_t>(rows), 1, 1, 1};
  result.map = encode_map(tensor.data, dtype, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
  return result;
}

// Where a box begins. Rows past the last token arrive as zeros and are not written.
struct Box {
  int token, head, frame, clip;
};

__device__ inline void load_box(void* shared, const TensorMap& tensor, const Box& box, uint64_t* barrier) {
  const int32_t at[5] = {0, box.token, box.head * tensor.moves_h, box.frame * tensor.moves_t,
                         box.clip * tensor.moves_b};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared, &tensor.map, at, barrier);
}

__device__ inline void store_box(const TensorMap& tensor, const Box& box, const void* shared) {
  const int32_t at[5] = {0, box.token, box.head * tensor.moves_h, box.frame * tensor.moves_t,
                         box.clip * tensor.moves_b};
  ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &tensor.map, at, shared);
}

__device__ inline void prefetch_map(const TensorMap& tensor) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&tensor.map) : "memory");
}

__device__ inline void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Before the copies that a barrier counts for its writer; it says how many bytes they bring.
__device__ inline void expect(uint64_t* barrier, uint32_t bytes) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier, bytes);
}

// By whole warps: a barrier counts one of each.
__device__ inline void arrive_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// At the barrier that lies where this one does, in another block of the cluster or in this one.
__device__ inline void arrive_in(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(rank)
      : "memory");
}

// The `filled` and `free` barriers of a ring of tiles, and how they are walked: tile i lies in slot i % kSlots.
template <int kSlots>
struct Ring {
  uint64_t filled[kSlots], free[kSlots];

  __device__ void init(uint32_t readers, uint32_t writers = 1) {
    for (int i = 0; i < kSlots; i++) {
      ptx::mbarrier_init(&filled[i], writers);
      ptx::mbarrier_init(&free[i], readers);
    }
  }
};

// A position in a ring. `round` is the parity of its turns.
template <int kSlots>
struct Cursor {
  int slot = 0;
  uint32_t round = 0;

  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      round ^= 1;
    }
  }
};

}  // namespace univid::hopper
