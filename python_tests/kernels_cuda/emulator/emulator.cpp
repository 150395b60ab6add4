// What tests set of the emulator, through ctypes.
#include "fibers.h"

// Whether asynchronous copies and products happen when they are issued, or as late as they may.
extern "C" void emulator_set_eager(int eager) { emulator::eager = eager != 0; }

// Which warp of every warpgroup runs only when nothing else moves; -1 for none.
extern "C" void emulator_set_slow_warp(int warp) { emulator::slow_warp = warp; }
