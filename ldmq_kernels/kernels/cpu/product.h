// One product of int8, a linear or a convolution, as the files that multiply see it: products.c says which of them does.
//
// Of bfloat16 pairs, which tiles multiply too, two bytes are one value: "channels" are twice as many, and sums float32.
// The left operand is gathered from the input block by block; there is no im2col in memory.
#pragma once

#include <stdint.h>
#include <string.h>

#include "epilogue.h"
#include "parts.h"
#include "producers.h"

enum {
  PANEL = 16,        // output channels whose weights lie side by side
  TILED_ROWS = 256,  // of a part at most: gathered 784 KiB, of a second cache of 2 MiB
  PAIRED_ROWS = 96   // gathered 198 KiB
};

// Members up to the last of which Python tells take eight bytes each.
typedef struct {
  const int8_t *x;  // (samples, height, width, channels)
  int64_t samples, height, width, channels, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t taps_y, taps_x, out_height, out_width;
  const void *weight;  // [panels][taps][channels / group][PANEL][group], zeros where there are fewer outputs
  int64_t outputs;
  Epilogue epilogue;
  int64_t is_gated;  // outputs are values, then as many gates: what is written is value * gelu(gate), half as wide
  const float *maybe_inverse;  // of the scale of what is written, one or one for each column: it is int8
  int64_t inverse_count;
  int64_t is_bfloat16;
  int64_t block, column_parts;  // rows of a part, and parts of a block of rows: found here, with what follows
  int *status;                  // see producers.h
} Product;

// What a part multiplies: rows of the output from `first_row` on, and the panels from `first_panel` to `end_panel`,
// of values where there are gates.
typedef struct {
  int64_t all_rows, depth, first_row, rows, first_panel, end_panel;
} Share;

static inline int64_t panels_of(const Product *p) {
  return ((p->is_gated ? p->outputs / 2 : p->outputs) + PANEL - 1) / PANEL;
}

static inline Share share_of(const Product *p, int64_t part) {
  const int64_t panels = panels_of(p), column = part % p->column_parts;
  Share own = {p->samples * p->out_height * p->out_width, p->taps_y * p->taps_x * p->channels,
               part / p->column_parts * p->block, 0, panels * column / p->column_parts,
               panels * (column + 1) / p->column_parts};
  own.rows = smaller(p->block, own.all_rows - own.first_row);
  return own;
}

// Defines a function that writes the integers from `first` to `end` of one row of the left operand as TYPE.
#define GATHER(TYPE)                                                                                            \
  static void gather(const Product *p, int64_t row, int64_t first, int64_t end, TYPE *restrict to) {             \
    const int64_t ox = row % p->out_width, oy = row / p->out_width % p->out_height;                              \
    const int64_t sample = row / p->out_width / p->out_height;                                                   \
    for (int64_t k = first; k < end;) {                                                                          \
      const int64_t tap = k / p->channels, channel = k - tap * p->channels;                                      \
      const int64_t count = smaller(p->channels - channel, end - k);                                             \
      const int64_t y = oy * p->stride_y - p->pad_y + tap / p->taps_x * p->dilation_y;                           \
      const int64_t x = ox * p->stride_x - p->pad_x + tap % p->taps_x * p->dilation_x;                           \
      if (y < 0 || y >= p->height || x < 0 || x >= p->width) {                                                   \
        memset(to, 0, (size_t)count * sizeof *to);                                                               \
      } else {                                                                                                   \
        const int8_t *from = p->x + ((sample * p->height + y) * p->width + x) * p->channels + channel;           \
        for (int64_t c = 0; c < count; ++c) to[c] = from[c];                                                     \
      }                                                                                                          \
      to += count;                                                                                               \
      k += count;                                                                                                \
    }                                                                                                            \
  }

// Work on a part of a product; parts are blocks of rows times column parts.
typedef void PartOfProduct(const void *product, int64_t part, int64_t parts);
PartOfProduct ldmq_multiply_pairs;  // pairs.c
PartOfProduct ldmq_multiply_tiles;  // tiles.c
