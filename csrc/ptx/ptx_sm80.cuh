// Intrinsics of sm_80 and newer, and that of e4m3 of sm_89 and newer: PTX instructions under their own names.
// python_tests/kernels/cuda/emulator has the same functions for a CPU; a kernel that uses these alone is proved there
// without a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Every thread of a cooperative grid waits for all others, and sees what they wrote before.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// 16 bytes from global to shared memory, or 16 zeros; both aligned to 16.
__device__ __forceinline__ void cp_async_16(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>  // the newest groups that may still be in flight
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8, and gets of each
// matrix the bytes 4 (i % 4) to 4 (i % 4) + 3 of row i / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&value)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16, 8) int32 += a (16, 32) * b (8, 32)^T of int8. A lane holds of a row lane / 4 (registers 0 and 2) and the row
// 8 below (1 and 3), bytes 4 (lane % 4) on and, in the second pair, 16 further; of b the same of row lane / 4; of d
// the columns 2 (lane % 4) and the next, of both rows.
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of e4m3, d float32, for sm_89 and newer.
__device__ __forceinline__ void mma_m16n8k32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
