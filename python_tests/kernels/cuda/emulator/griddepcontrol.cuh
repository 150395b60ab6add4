// csrc/ptx/griddepcontrol.cuh on a CPU. Until nothing moves but by this wait, the memory that tests watch holds rubbish
// and what is written there is lost: as before, and while, another kernel writes it and reads it.
#pragma once

#include <cuda_runtime.h>

inline void griddepcontrol_wait() {
  emulator::current->waited = true;
  if (emulator::fault & emulator::kDependencyWait) return;
  while (emulator::is_early_launch) emulator::yield();
}
inline void griddepcontrol_launch_dependents() { emulator::current->triggered = true; }
