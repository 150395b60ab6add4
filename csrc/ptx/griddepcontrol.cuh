// Programmatic dependent launch, an instruction of sm_90 and newer: a kernel is launched while the one before it in the
// stream still runs, and waits for it itself. For older architectures both functions are empty, and ../launch.h launches
// nothing early there. python_tests/kernels/cuda/emulator has the same functions for a CPU.
#pragma once

#include <cuda_runtime.h>

// Returns once all kernels before this one in its stream have ended and what they wrote is seen. Without them, or where
// the kernel was not launched early, it returns at once. Each thread of a kernel that may be launched early calls it
// before it touches global memory: what it reads may not be written yet, and what it writes may still be read. Since all
// kernels of a chain wait, the end of the one before is the end of all before it.
__device__ __forceinline__ void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From the call of each block on, or from its end, the next kernel may be launched, if it is one that waits.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
