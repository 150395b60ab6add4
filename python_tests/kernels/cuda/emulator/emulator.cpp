// What tests set of the emulator, through ctypes.
#include "cuda_runtime.h"

// Whether asynchronous copies and wgmmas happen when they are issued, or as late as they may.
extern "C" void emulator_set_eager(int eager) { emulator::eager = eager != 0; }

// Which warp of every warpgroup runs only when nothing else moves; -1 for none.
extern "C" void emulator_set_slow_warp(int warp) { emulator::slow_warp = warp; }

// From which seed the order of blocks, warps, lanes and copies follows; 0 for the same order always.
extern "C" void emulator_set_seed(unsigned seed) { emulator::seed = seed * 0x9e3779b97f4a7c15u; }

// What kernels are made to leave out: bits of emulator::Fault; 0 for nothing.
extern "C" void emulator_set_fault(unsigned fault) { emulator::fault = fault; }

// Which of 64 threads has the turn at a place of a round.
extern "C" int emulator_turn(unsigned place) { return static_cast<int>(emulator::round(64, true)[place]); }

// Makes a device current as the runtime may remember it, without a context in this thread.
extern "C" void emulator_set_device(int device) { emulator::device = device, emulator::has_context = false; }
extern "C" int emulator_get_device() { return emulator::device; }

extern "C" int emulator_launched_on() { return emulator::launched_on; }

// What the driver answers when it encodes a tensor map; 0 for success.
extern "C" void emulator_set_encode_error(int error) { emulator::encode_error = error; }

// How often a kernel was allowed its shared memory.
extern "C" int emulator_told_shared() { return emulator::told_shared; }

// Memory that the kernel before a launch is taken to work with, until the launched one waits for it; forgets all of it.
extern "C" void emulator_watch(char* data, uint64_t bytes) {
  emulator::watched.push_back({data, std::vector<char>(bytes)});
}
extern "C" void emulator_forget_watched() { emulator::watched.clear(); }

// How many kernels were launched before the one in front of them had ended, and how many let the next one begin.
extern "C" int emulator_early_launches() { return emulator::early_launches; }
extern "C" int emulator_triggered() { return emulator::triggered; }
