"""Device functions that the matrix products share: order of tiles, loading, int4 decoding, epilogue.

Epilogue, in float32, rounded once to the output's dtype:

    out = accumulator * x_scale * weight_scale + bias + sample_bias + residual
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS_IN_A_BAND = tl.constexpr(8)
STORED_COLUMNS = tl.constexpr(64)  # of one slice of a tile in the epilogue


@triton.jit
def tile_of_program(program: tl.tensor, tile_rows: tl.tensor, tile_columns: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of a program's tile; bands of tile rows share the L2 cache."""
    band_size = ROWS_IN_A_BAND * tile_columns
    first_row = (program // band_size) * ROWS_IN_A_BAND
    height = min(tile_rows - first_row, ROWS_IN_A_BAND)
    return first_row + (program % band_size) % height, (program % band_size) // height


@triton.jit
def load_block(
    source: tl.tensor,  # a descriptor of (rows, depth) with blocks of (BLOCK, BLOCK_K), or a pointer to its start
    first_row: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,  # index along the depth
    depth: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,  # whether `source` is a descriptor
) -> tl.tensor:
    """(BLOCK, BLOCK_K) of a row-major matrix, zero outside of it."""
    if TILED:
        block = source.load([first_row, first])
    else:
        row = first_row + tl.arange(0, BLOCK)
        k = first + tl.arange(0, BLOCK_K)
        pointers = source + row.to(tl.int64)[:, None] * depth + k[None, :]
        block = tl.load(pointers, mask=(row < rows)[:, None] & (k < depth)[None, :], other=0)
    return block


@triton.jit
def unpack_int4(packed: tl.tensor) -> tl.tensor:
    """(N, K / 2) int8 bytes to (N, K) int8 in [-8, 7]: even indices from the low nibbles."""
    pairs = tl.join((packed << 4) >> 4, packed >> 4)
    return tl.reshape(pairs, (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def halves(tile: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Left and right half of the columns of a tile; in an accumulator's layout no value moves."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_slice(
    accumulator: tl.tensor,
    terms: tl.tuple,
    out_ptr: tl.tensor,
    row: tl.tensor,
    sample: tl.tensor,
    row_mask: tl.tensor,
    column: tl.tensor,
    column_mask: tl.tensor,
    columns: tl.tensor,
    ONE_SCALE: tl.constexpr,
) -> None:
    """Apply the epilogue to a slice of a tile and store it; arguments as `store_tile`."""
    x_scale_ptr, weight_scale_ptr, bias_ptr, vector_ptr, residual_ptr = terms
    out = accumulator.to(tl.float32)
    mask = row_mask[:, None] & column_mask[None, :]
    if x_scale_ptr is not None:
        if ONE_SCALE:
            out = out * tl.load(x_scale_ptr)
        else:
            out = out * tl.load(x_scale_ptr + sample, mask=row_mask, other=0.0)[:, None]
    if weight_scale_ptr is not None:
        out = out * tl.load(weight_scale_ptr + column, mask=column_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if vector_ptr is not None:
        vector_ptrs = vector_ptr + sample.to(tl.int64)[:, None] * columns + column[None, :]
        out = out + tl.load(vector_ptrs, mask=mask, other=0.0).to(tl.float32)
    offset = row[:, None] * columns + column[None, :]
    if residual_ptr is not None:
        out = out + tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(
    accumulator: tl.tensor,  # (BLOCK_M, any width) int32 or float32
    terms: tl.tuple,  # pointers or None: x_scale (one, or one a sample), weight_scale (columns,), both float32;
    # bias (columns,), sample_bias (samples, columns), residual (rows, columns), floating
    out_ptr: tl.tensor,  # (rows, columns) floating, or (SPLITS, rows, columns) int32
    rows: tl.tensor,
    columns: tl.tensor,
    row: tl.tensor,  # (BLOCK_M,) int64: the rows of this tile, in any order
    sample: tl.tensor,  # (BLOCK_M,): what the scales and vectors of a row are indexed by
    row_mask: tl.tensor,  # (BLOCK_M,)
    first_column: tl.tensor,
    last_column: tl.tensor,  # exclusive: the end of the columns, or of a group's
    ONE_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Store a tile with its epilogue, or one split's share of it, slice by slice: few registers are left for it."""
    if accumulator.shape[1] > STORED_COLUMNS:
        left, right = halves(accumulator)
        second = first_column + right.shape[1]
        store_tile(
            left, terms, out_ptr, rows, columns, row, sample, row_mask, first_column, last_column, ONE_SCALE, SPLITS
        )
        store_tile(right, terms, out_ptr, rows, columns, row, sample, row_mask, second, last_column, ONE_SCALE, SPLITS)
    else:
        column = first_column + tl.arange(0, accumulator.shape[1])
        column_mask = column < last_column
        if SPLITS > 1:
            share = out_ptr + tl.program_id(1).to(tl.int64) * rows * columns
            pointers = share + row[:, None] * columns + column[None, :]
            tl.store(pointers, accumulator, mask=row_mask[:, None] & column_mask[None, :])
        else:
            store_slice(accumulator, terms, out_ptr, row, sample, row_mask, column, column_mask, columns, ONE_SCALE)


@triton.jit
def add_splits(
    share_ptr: tl.tensor,  # (SPLITS, rows, columns) int32
    x_scale_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    vector_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    sample_rows: tl.tensor,
    ONE_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Add the splits' exact int32 shares and apply the epilogue; arguments as `store_tile`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < columns
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row[:, None] * columns + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for split in tl.static_range(SPLITS):
        total += tl.load(share_ptr + split * (rows.to(tl.int64) * columns) + offset, mask=mask, other=0)
    terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, vector_ptr, residual_ptr)
    store_slice(total, terms, out_ptr, row, row // sample_rows, row_mask, column, column_mask, columns, ONE_SCALE)
