// Warpgroup matrix products (wgmma, sm_90a), which <cuda/ptx> lacks.
//
// A product is m64nNk16: 64 rows shared by the four warps of a warpgroup, 16 each. Accumulator d[4j + e] of a lane is
// row lane / 4 + 8 · (e / 2) of its warp, column 8j + 2 · (lane % 4) + e % 2; two neighbouring j, rounded, are the
// operand of a next product: four registers a lane, 64 x 16. Operands in shared memory are tiles of 128-byte rows (64
// elements) in the 128-byte swizzle, or of 64-byte rows in the 64-byte swizzle, aligned to 1024 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace univid::hopper {

// An address in shared memory as descriptors have it, without the rank that begins it in a cluster.
__device__ inline uint32_t described(const void* tile) {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(tile)) & 0x3ffff) >> 4;
}

// A tile in shared memory as wgmma wants it described: address / 16, 1024 bytes from eight rows to the next eight,
// 128-byte swizzle. Adding 2 steps 16 columns right, adding 128 steps 16 rows down.
__device__ inline uint64_t tile_descriptor(const void* tile) {
  return uint64_t{described(tile)} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// A tile of 64-byte rows (32 elements) in the 64-byte swizzle, as operand b by rows: kRows rows of 32 columns, the next
// 32 columns behind them. Adding 64 steps 16 rows down.
template <int kRows>
__device__ inline uint64_t half_tile_descriptor(const void* tile) {
  return uint64_t{described(tile)} | uint64_t{kRows * 64 >> 4} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
}

// Before the first product that reads registers written by ordinary instructions.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of this warp's groups are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads and writes of registers across a wait or a fence.
template <typename T, int kSize>
__device__ inline void pin(T (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i++) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
  }
}

// The numbers and the list of an asm statement's accumulators.
#define UNIVID_D32                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define UNIVID_D44 UNIVID_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43"
#define UNIVID_D48 UNIVID_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define UNIVID_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define UNIVID_F12(d, i) UNIVID_F4(d, i), UNIVID_F4(d, i + 4), UNIVID_F4(d, i + 8)
#define UNIVID_F16(d, i) UNIVID_F4(d, i), UNIVID_F4(d, i + 4), UNIVID_F4(d, i + 8), UNIVID_F4(d, i + 12)

// d = or += a · b, a in registers. BY_ROWS: a row of the tile in shared memory is one element of the sum (b itself),
// else one column of d (b transposed). Whether to accumulate is a predicate, which inline assembly has to make from a
// register.
#define UNIVID_WGMMA(NAME, ELEMENT, TYPE, N, SIZE, BY_ROWS, A0, A1, A2, A3, B, ADD, ...)            \
  template <bool kAdd>                                                                              \
  __device__ inline void NAME(ELEMENT, float (&d)[SIZE], const uint32_t* a, uint64_t b) {           \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD                                          \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" UNIVID_D##SIZE \
                 "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, " BY_ROWS "; }"            \
                 : __VA_ARGS__                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kAdd}));             \
  }
#define UNIVID_WGMMA_32(NAME, ELEMENT, TYPE, BY_ROWS)                                                              \
  UNIVID_WGMMA(NAME, ELEMENT, TYPE, "64", 32, BY_ROWS, "%32", "%33", "%34", "%35", "%36", "%37", UNIVID_F16(d, 0), \
               UNIVID_F16(d, 16))
#define UNIVID_WGMMA_44(NAME, ELEMENT, TYPE, BY_ROWS)                                                              \
  UNIVID_WGMMA(NAME, ELEMENT, TYPE, "88", 44, BY_ROWS, "%44", "%45", "%46", "%47", "%48", "%49", UNIVID_F16(d, 0), \
               UNIVID_F16(d, 16), UNIVID_F12(d, 32))
#define UNIVID_WGMMA_48(NAME, ELEMENT, TYPE, BY_ROWS)                                                              \
  UNIVID_WGMMA(NAME, ELEMENT, TYPE, "96", 48, BY_ROWS, "%48", "%49", "%50", "%51", "%52", "%53", UNIVID_F16(d, 0), \
               UNIVID_F16(d, 16), UNIVID_F16(d, 32))

UNIVID_WGMMA_32(multiply_by_rows, __nv_bfloat16, "bf16", "1")
UNIVID_WGMMA_32(multiply_by_rows, __half, "f16", "1")
UNIVID_WGMMA_32(multiply_by_columns, __nv_bfloat16, "bf16", "0")
UNIVID_WGMMA_32(multiply_by_columns, __half, "f16", "0")
UNIVID_WGMMA_44(multiply_by_columns, __nv_bfloat16, "bf16", "0")
UNIVID_WGMMA_44(multiply_by_columns, __half, "f16", "0")
UNIVID_WGMMA_48(multiply_by_columns, __nv_bfloat16, "bf16", "0")
UNIVID_WGMMA_48(multiply_by_columns, __half, "f16", "0")

// The same by rows, kAdd being known only at run time.
#define UNIVID_WGMMA_MAYBE_ADD(ELEMENT, TYPE)                                                                \
  __device__ inline void multiply_by_rows(ELEMENT, float (&d)[32], const uint32_t* a, uint64_t b, int add) { \
    asm volatile(                                                                                            \
        "{ .reg .pred add; setp.ne.b32 add, %37, 0;\n"                                                       \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" UNIVID_D32                          \
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"                                                      \
        : UNIVID_F16(d, 0), UNIVID_F16(d, 16)                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                     \
  }

UNIVID_WGMMA_MAYBE_ADD(__nv_bfloat16, "bf16")
UNIVID_WGMMA_MAYBE_ADD(__half, "f16")

// d = or += a · b, both in shared memory. BY_ROWS: a row of either tile is one element of the sum, else one row of a (a
// column of d).
#define UNIVID_WGMMA_SHARED(NAME, ELEMENT, TYPE, N, SIZE, BY_ROWS, A, B, ADD, ...)                  \
  template <bool kAdd>                                                                              \
  __device__ inline void NAME(ELEMENT, float (&d)[SIZE], uint64_t a, uint64_t b) {                  \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD                                          \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" UNIVID_D##SIZE \
                 "}, " A ", " B ", add, 1, 1, " BY_ROWS ", " BY_ROWS "; }"                          \
                 : __VA_ARGS__                                                                      \
                 : "l"(a), "l"(b), "n"(int{kAdd}));                                                 \
  }
#define UNIVID_WGMMA_SHARED_32(NAME, ELEMENT, TYPE, BY_ROWS) \
  UNIVID_WGMMA_SHARED(NAME, ELEMENT, TYPE, "64", 32, BY_ROWS, "%32", "%33", "%34", UNIVID_F16(d, 0), UNIVID_F16(d, 16))
#define UNIVID_WGMMA_SHARED_44(NAME, ELEMENT, TYPE, BY_ROWS)                                         \
  UNIVID_WGMMA_SHARED(NAME, ELEMENT, TYPE, "88", 44, BY_ROWS, "%44", "%45", "%46", UNIVID_F16(d, 0), \
                      UNIVID_F16(d, 16), UNIVID_F12(d, 32))

UNIVID_WGMMA_SHARED_32(multiply_by_rows, __nv_bfloat16, "bf16", "1")
UNIVID_WGMMA_SHARED_32(multiply_by_rows, __half, "f16", "1")
UNIVID_WGMMA_SHARED_32(multiply_by_columns, __nv_bfloat16, "bf16", "0")
UNIVID_WGMMA_SHARED_32(multiply_by_columns, __half, "f16", "0")
UNIVID_WGMMA_SHARED_44(multiply_by_columns, __nv_bfloat16, "bf16", "0")
UNIVID_WGMMA_SHARED_44(multiply_by_columns, __half, "f16", "0")

// d += a · b, both in shared memory, each by rows (see above) or by columns.
#define UNIVID_D64 \
  UNIVID_D48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define UNIVID_D80 \
  UNIVID_D64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define UNIVID_WGMMA_TILES(ELEMENT, TYPE, N, SIZE, A, B, A_BY_ROWS, B_BY_ROWS, ...)          \
  template <bool kAByRows, bool kBByRows>                                                    \
  __device__ inline void multiply_tiles(ELEMENT, float (&d)[SIZE], uint64_t a, uint64_t b) { \
    asm volatile(                                                                            \
        "{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"                                         \
        "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" UNIVID_D##SIZE   \
        "}, " A ", " B ", add, 1, 1, " A_BY_ROWS ", " B_BY_ROWS "; }"                        \
        : __VA_ARGS__                                                                        \
        : "l"(a), "l"(b), "n"(int{kAByRows}), "n"(int{kBByRows}));                           \
  }
#define UNIVID_WGMMA_TILES_64(ELEMENT, TYPE)                                                                    \
  UNIVID_WGMMA_TILES(ELEMENT, TYPE, "128", 64, "%64", "%65", "%66", "%67", UNIVID_F16(d, 0), UNIVID_F16(d, 16), \
                     UNIVID_F16(d, 32), UNIVID_F16(d, 48))
#define UNIVID_WGMMA_TILES_80(ELEMENT, TYPE)                                                                    \
  UNIVID_WGMMA_TILES(ELEMENT, TYPE, "160", 80, "%80", "%81", "%82", "%83", UNIVID_F16(d, 0), UNIVID_F16(d, 16), \
                     UNIVID_F16(d, 32), UNIVID_F16(d, 48), UNIVID_F16(d, 64))
UNIVID_WGMMA_TILES_64(__nv_bfloat16, "bf16")
UNIVID_WGMMA_TILES_64(__half, "f16")
UNIVID_WGMMA_TILES_80(__nv_bfloat16, "bf16")
UNIVID_WGMMA_TILES_80(__half, "f16")

#undef UNIVID_WGMMA_TILES_80
#undef UNIVID_WGMMA_TILES_64
#undef UNIVID_WGMMA_TILES
#undef UNIVID_D80
#undef UNIVID_D64
#undef UNIVID_WGMMA_SHARED_44
#undef UNIVID_WGMMA_SHARED_32
#undef UNIVID_WGMMA_SHARED
#undef UNIVID_WGMMA_MAYBE_ADD
#undef UNIVID_WGMMA_48
#undef UNIVID_WGMMA_44
#undef UNIVID_WGMMA_32
#undef UNIVID_WGMMA
#undef UNIVID_F16
#undef UNIVID_F12
#undef UNIVID_F4
#undef UNIVID_D48
#undef UNIVID_D44
#undef UNIVID_D32

// d (64 x 64, 88 or 96) = a (64 x 64, 16 registers) · tileᵀ: starts the products.
template <typename Element, int kSize>
__device__ inline void multiply_transposed(float (&d)[kSize], const uint32_t (&a)[16], uint64_t tile) {
  multiply_by_columns<false>(Element{}, d, a, tile);
#pragma unroll
  for (int i = 1; i < 4; i++) multiply_by_columns<true>(Element{}, d, a + 4 * i, tile + 2 * i);
}

// d (64 x 64 or 64 x 88) = a (a tile) · tileᵀ: starts the products.
template <typename Element, int kSize>
__device__ inline void multiply_transposed(float (&d)[kSize], uint64_t a, uint64_t tile) {
  multiply_by_columns<false>(Element{}, d, a, tile);
#pragma unroll
  for (int i = 1; i < 4; i++) multiply_by_columns<true>(Element{}, d, a + 2 * i, tile + 2 * i);
}

// d (64 x 64) = aᵀ · tile, both of kRows rows: starts the products.
template <typename Element, int kRows>
__device__ inline void multiply_of_transposed(float (&d)[32], uint64_t a, uint64_t tile) {
  multiply_by_rows<false>(Element{}, d, a, tile);
#pragma unroll
  for (int i = 1; i < kRows / 16; i++) multiply_by_rows<true>(Element{}, d, a + 128 * i, tile + 128 * i);
}

// d (64 x 64) += a (64 x K, K / 4 registers) · tile: starts the products.
template <typename Element, int kRegisters>
__device__ inline void multiply_add(float (&d)[32], const uint32_t (&a)[kRegisters], uint64_t tile) {
#pragma unroll
  for (int i = 0; i < kRegisters / 4; i++) multiply_by_rows<true>(Element{}, d, a + 4 * i, tile + 128 * i);
}

// d (64 x 64) = or += a (64 x K, K / 4 registers) · tile: starts the products.
template <typename Element, int kRegisters>
__device__ inline void multiply_maybe_add(float (&d)[32], const uint32_t (&a)[kRegisters], uint64_t tile, bool add) {
  multiply_by_rows(Element{}, d, a, tile, add);
#pragma unroll
  for (int i = 1; i < kRegisters / 4; i++) multiply_by_rows<true>(Element{}, d, a + 4 * i, tile + 128 * i);
}

// Two floats rounded to neighbouring elements, `low` at the lower address.
template <typename Element>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t d;
  if constexpr (std::is_same_v<Element, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Two neighbouring elements as floats.
template <typename Element>
__device__ inline void unpack(uint32_t pair, float& low, float& high) {
  if constexpr (std::is_same_v<Element, __half>) {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  } else {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000);
  }
}

// The address of a lane's 16 bytes where a warp moves 16 columns, from 16 · i, of its rows of a swizzled 64 x 64 tile.
__device__ inline uint32_t tile_address(const void* tile, int i, int warp, int lane) {
  const int row = warp * 16 + lane % 16;
  return static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + row * 128 + (((2 * i + lane / 16) ^ (row % 8)) << 4);
}

// Reads a warp's 16 rows of a 64 x 64 tile as an operand.
__device__ inline void load_tile(const void* tile, uint32_t (&a)[16], int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[4 * i]), "=r"(a[4 * i + 1]), "=r"(a[4 * i + 2]), "=r"(a[4 * i + 3])
                 : "r"(tile_address(tile, i, warp, lane))
                 : "memory");
}

// Writes a warp's 16 rows of a 64 x 64 tile, an operand.
__device__ inline void store_tile(void* tile, const uint32_t (&a)[16], int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(tile_address(tile, i, warp, lane)),
        "r"(a[4 * i]), "r"(a[4 * i + 1]), "r"(a[4 * i + 2]), "r"(a[4 * i + 3])
        : "memory");
}

// The same of an accumulator, rounded.
template <typename Element>
__device__ inline void store_tile(void* tile, const float (&d)[32], int warp, int lane) {
  uint32_t a[16];
#pragma unroll
  for (int i = 0; i < 16; i++) a[i] = pack<Element>(d[2 * i], d[2 * i + 1]);
  store_tile(tile, a, warp, lane);
}

// Those of 64 numbers in shared memory that belong to a lane's columns of an accumulator.
template <int kBegin, int kEnd>
__device__ void load_columns(float2 (&x)[8], const float* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from)) + threadIdx.x % 4 * 8;
#pragma unroll
  for (int j = kBegin; j < kEnd; j++)
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[j].x), "=f"(x[j].y) : "r"(address + 32 * j) : "memory");
}

}  // namespace univid::hopper
