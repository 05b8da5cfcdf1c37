// One warp's instructions on 16-bit elements (sm_80 and later): asynchronous copies, matrix fragments, matrix products.
//
// A fragment is a 16 x 16 block of 16-bit elements in the registers of a warp, four to a lane, each holding two
// elements of an 8 x 8 quarter: [0] rows 0-7, columns 0-7; [1] rows 8-15, columns 0-7; [2] rows 0-7, columns 8-15; [3]
// rows 8-15, columns 8-15. In a quarter, lane 4r + c holds row r, columns 2c and 2c + 1. An accumulator is a 16 x 8
// block of floats: [0], [1] in row r and [2], [3] in row r + 8, so that two neighbouring accumulators, rounded, are a
// fragment.
#pragma once

#include <cstdint>

#include "row.cuh"

namespace univid {

struct BFloat16 {};
struct Half {};

using Fragment = uint32_t[4];
using Accumulator = float[4];

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past L1.
__device__ inline void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this lane's copies are under way, then for the other lanes.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncwarp();
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 d;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "r"(address)
               : "memory");
  return d;
}

__device__ inline void store_shared(uint32_t address, uint4 a) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w)
               : "memory");
}

__device__ inline void store_shared(uint32_t address, uint32_t a) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(a) : "memory");
}

// Loads a fragment. Lane l gives the address of 16 bytes: row l % 16, columns 8 · (l / 16) to 8 · (l / 16) + 7.
__device__ inline void load_fragment(Fragment& d, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The same with each quarter transposed.
__device__ inline void load_fragment_transposed(Fragment& d, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

__device__ inline uint32_t transpose_quarter(uint32_t a) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// d += a · b, b being 16 x 8: rows 0-7 in b0, rows 8-15 in b1, each quarter transposed.
template <typename Element>
__device__ inline void multiply(Accumulator& d, const Fragment& a, uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply<BFloat16>(Accumulator& d, const Fragment& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply<Half>(Accumulator& d, const Fragment& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to neighbouring elements, `low` at the lower address.
template <typename Element>
__device__ inline uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

}  // namespace univid
