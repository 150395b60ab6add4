// AMX's tiles, all of 16 rows of 64 bytes, for as long as a part of a call needs them.
#pragma once

#ifdef __AMX_TILE__
#include <immintrin.h>
#include <stdint.h>

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) TileSizes;

// GCC's tile loads do not say that they read memory, nor its configuration all that it reads and writes: what is
// written before this is there for them, and what they have written is read anew.
#define MEMORY_IS_WRITTEN() __asm__ volatile("" ::: "memory")

// Take the tiles; what they were set to before, which oneDNN keeps between its calls.
static inline TileSizes take_tiles(void) {
  TileSizes before, own = {.palette = 1};
  for (int tile = 0; tile < 8; ++tile) {
    own.row_bytes[tile] = 64;
    own.rows[tile] = 16;
  }
  _tile_storeconfig(&before);
  MEMORY_IS_WRITTEN();
  _tile_loadconfig(&own);
  return before;
}

static inline void give_tiles_back(const TileSizes *before) {
  MEMORY_IS_WRITTEN();
  if (before->palette) {
    _tile_loadconfig(before);
  } else {
    _tile_release();
  }
}
#endif
