// Intrinsics of sm_90a: mbarriers, the tensor memory accelerator (TMA), warpgroups.
// python_tests/kernels/cuda/emulator has the same functions for a CPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <ptx_sm80.cuh>

#ifdef LDMQ_BARRIER_TIMEOUT
#include <cstdio>
#endif

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster, once their mbarriers are initialized and fenced: it orders nothing else.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// An mbarrier's phase ends when `count` arrivals and all expected bytes have come.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival, and bytes to wait for.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// One arrival at the mbarrier of the same place in a block of the cluster. It orders what was read before it, not what
// was written: a release at the scope of a cluster would cost a fence of the whole GPU in the main loop.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
#ifdef LDMQ_BARRIER_TIMEOUT
// Of a debug build: says who waits for what, once for the lanes that wait, and ends the kernel, which would wait for
// ever.
__device__ __noinline__ void mbarrier_timed_out(uint32_t barrier, uint32_t parity) {
  const unsigned lane = threadIdx.x % 32;
  if ((__activemask() & ((1u << lane) - 1)) == 0) {
    printf("ldmq: block (%u, %u, %u), warpgroup %u, warp %u, lane %u: the mbarrier at %u does not end its phase of "
           "parity %u\n",
           blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x / 128, threadIdx.x / 32, lane, barrier, parity);
  }
  __trap();
}
#endif

// Returns once the phase of this parity has ended; a new mbarrier is in phase 0.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef LDMQ_BARRIER_TIMEOUT
  const long long begin = clock64();
  for (uint32_t done = 0; !done;) {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (!done && clock64() - begin > LDMQ_BARRIER_TIMEOUT) mbarrier_timed_out(shared_address(barrier), parity);
  }
#else
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// A box of a matrix, from column x and row y on, into shared memory.
__device__ __forceinline__ void tma_load_2d(void* target, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(shared_address(target)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}
// The same into the same place of every block of `mask`; each one's own mbarrier counts the bytes.
__device__ __forceinline__ void tma_load_2d_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int x,
                                                      int y, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(mask)
      : "memory");
}
// Pixels of NHWC images in im2col mode: from the base pixel (w, h, n) on, each moved by the tap's offset.
__device__ __forceinline__ void tma_load_im2col(void* target, const CUtensorMap* map, uint64_t* barrier, int c, int w,
                                                int h, int n, uint16_t tap_w, uint16_t tap_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(tap_w), "h"(tap_h)
      : "memory");
}
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Moves registers from the warpgroup that loads to those that multiply.
template <int Count>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// Before the first wgmma on registers that were written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left>  // the newest groups that may still be in flight
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// wgmmas in flight may read or write these registers up to here: nothing else takes their place before, and what
// stands after this is not moved before it.
template <typename T, int N>
__device__ __forceinline__ void keep_registers(T (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(value[i])::"memory");
}
template <int N>
__device__ __forceinline__ void keep_registers(float (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(value[i])::"memory");
}

// wgmma_m64k32<N>(d, a, b, accumulate): d (64, N) = a (64, 32) * b (N, 32)^T, plus d where it accumulates; of int8 in
// int32, or of e4m3 in float32. a and b are descriptors of shared memory, or a, of int8, is four registers as of
// mma_m16n8k32; warp w of the warpgroup has rows 16 w to 16 w + 15, and a lane holds of every 8 columns what it holds
// of mma_m16n8k32's d.
template <int N>
__device__ __forceinline__ void wgmma_m64k32(int (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);
template <int N>
__device__ __forceinline__ void wgmma_m64k32(int (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);
template <int N>
__device__ __forceinline__ void wgmma_m64k32(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

// Ten registers in the text of the instruction, and registers as its operands: "+r" of int32, "+f" of float32.
#define LDMQ_FIVE(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, "
#define LDMQ_TEN(t) LDMQ_FIVE(t) "%" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define LDMQ_TWO(r, i) r(d[i]), r(d[i + 1])
#define LDMQ_EIGHT(r, i) LDMQ_TWO(r, i), LDMQ_TWO(r, i + 2), LDMQ_TWO(r, i + 4), LDMQ_TWO(r, i + 6)
#define LDMQ_32(r, i) LDMQ_EIGHT(r, i), LDMQ_EIGHT(r, i + 8), LDMQ_EIGHT(r, i + 16), LDMQ_EIGHT(r, i + 24)

#define LDMQ_TEXT_64 LDMQ_TEN() LDMQ_TEN(1) LDMQ_TEN(2) "%30, %31"
#define LDMQ_TEXT_128 LDMQ_TEN() LDMQ_TEN(1) LDMQ_TEN(2) LDMQ_TEN(3) LDMQ_TEN(4) LDMQ_TEN(5) "%60, %61, %62, %63"
#define LDMQ_TEXT_160                                                                                     \
  LDMQ_TEN() LDMQ_TEN(1) LDMQ_TEN(2) LDMQ_TEN(3) LDMQ_TEN(4) LDMQ_TEN(5) LDMQ_TEN(6) "%70, %71, %72, %73, " \
  "%74, %75, %76, %77, %78, %79"
#define LDMQ_TEXT_256                                                                                          \
  LDMQ_TEN() LDMQ_TEN(1) LDMQ_TEN(2) LDMQ_TEN(3) LDMQ_TEN(4) LDMQ_TEN(5) LDMQ_TEN(6) LDMQ_TEN(7) LDMQ_TEN(8) \
  LDMQ_TEN(9) LDMQ_TEN(10) LDMQ_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define LDMQ_LIST_64(r) LDMQ_32(r, 0)
#define LDMQ_LIST_128(r) LDMQ_32(r, 0), LDMQ_32(r, 32)
#define LDMQ_LIST_160(r) LDMQ_32(r, 0), LDMQ_32(r, 32), LDMQ_EIGHT(r, 64), LDMQ_EIGHT(r, 72)
#define LDMQ_LIST_256(r) LDMQ_32(r, 0), LDMQ_32(r, 32), LDMQ_32(r, 64), LDMQ_32(r, 96)

// r0 to r2 are the numbers of the operands after the N / 2 registers of d; `signs` is what a float type has after them.
#define LDMQ_WGMMA_OF_SHARED(N, Sum, type, r, signs, r0, r1, r2)                                                 \
  template <>                                                                                                    \
  __device__ __forceinline__ void wgmma_m64k32<N>(Sum(&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #r2 ", 0;\n"                                           \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32." type " {" LDMQ_TEXT_##N "}, %" #r0 ", %" #r1      \
                 ", add" signs ";\n}"                                                                            \
                 : LDMQ_LIST_##N(r)                                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                           \
  }
#define LDMQ_WGMMA_OF_REGISTERS(N, r0, r1, r2, r3, r4, r5)                                                         \
  template <>                                                                                                      \
  __device__ __forceinline__ void wgmma_m64k32<N>(int (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,             \
                                                  bool accumulate) {                                               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #r5 ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" LDMQ_TEXT_##N "}, {%" #r0 ", %" #r1      \
                 ", %" #r2 ", %" #r3 "}, %" #r4 ", add;\n}"                                                        \
                 : LDMQ_LIST_##N("+r")                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));         \
  }
#define LDMQ_WGMMA(N, r0, r1, r2, r3, r4, r5)                                      \
  LDMQ_WGMMA_OF_SHARED(N, int, "s32.s8.s8", "+r", "", r0, r1, r2)                  \
  LDMQ_WGMMA_OF_SHARED(N, float, "f32.e4m3.e4m3", "+f", ", 1, 1", r0, r1, r2)      \
  LDMQ_WGMMA_OF_REGISTERS(N, r0, r1, r2, r3, r4, r5)

LDMQ_WGMMA(64, 32, 33, 34, 35, 36, 37)
LDMQ_WGMMA(128, 64, 65, 66, 67, 68, 69)
LDMQ_WGMMA(160, 80, 81, 82, 83, 84, 85)
LDMQ_WGMMA(256, 128, 129, 130, 131, 132, 133)
