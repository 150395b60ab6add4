"""Device functions that the matrix products share: order of tiles, int4 decoding, epilogue.

Epilogue, in float32, rounded once to the output's dtype:

    out = accumulator * x_scale * weight_scale + bias + sample_vector + residual
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS_IN_A_BAND = tl.constexpr(8)


@triton.jit
def tile_of_program(
    rows: tl.tensor, columns: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """This program's row and column indices, (BLOCK_M,) and (BLOCK_N,); bands of tile rows share L2."""
    program = tl.program_id(0)
    tile_columns = tl.cdiv(columns, BLOCK_N)
    band_size = ROWS_IN_A_BAND * tile_columns
    first_row = (program // band_size) * ROWS_IN_A_BAND
    height = min(tl.cdiv(rows, BLOCK_M) - first_row, ROWS_IN_A_BAND)
    tile_row = first_row + (program % band_size) % height
    tile_column = (program % band_size) // height
    return tile_row * BLOCK_M + tl.arange(0, BLOCK_M), tile_column * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def unpack_int4(packed: tl.tensor) -> tl.tensor:
    """(N, K / 2) int8 bytes to (N, K) int8 in [-8, 7]: even indices from the low nibbles."""
    pairs = tl.join((packed << 4) >> 4, packed >> 4)
    return tl.reshape(pairs, (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def store_output(
    accumulator: tl.tensor,  # (BLOCK_M, BLOCK_N) int32 or float32
    x_scale_ptr: tl.tensor,  # one float32, one for each `scale_index`, or None
    scale_index: tl.tensor,  # (BLOCK_M,)
    weight_scale_ptr: tl.tensor,  # (columns,) float32, or None
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    vector_ptr: tl.tensor,  # (samples, columns) floating, or None
    sample: tl.tensor,  # (BLOCK_M,)
    residual_ptr: tl.tensor,  # (rows, columns) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) floating
    row: tl.tensor,  # (BLOCK_M,)
    column: tl.tensor,  # (BLOCK_N,)
    row_mask: tl.tensor,
    column_mask: tl.tensor,
    columns: tl.tensor,
    ONE_SCALE: tl.constexpr,
) -> None:
    """Apply the epilogue to a tile and store it."""
    out = accumulator.to(tl.float32)
    mask = row_mask[:, None] & column_mask[None, :]
    if x_scale_ptr is not None:
        if ONE_SCALE:
            out = out * tl.load(x_scale_ptr)
        else:
            out = out * tl.load(x_scale_ptr + scale_index, mask=row_mask, other=0.0)[:, None]
    if weight_scale_ptr is not None:
        out = out * tl.load(weight_scale_ptr + column, mask=column_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if vector_ptr is not None:
        vector_ptrs = vector_ptr + sample.to(tl.int64)[:, None] * columns + column[None, :]
        out = out + tl.load(vector_ptrs, mask=mask, other=0.0).to(tl.float32)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    if residual_ptr is not None:
        out = out + tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
