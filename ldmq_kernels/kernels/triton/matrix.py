"""Device functions that the GEMM kernels share: order of tiles, loading, int4 decoding, epilogue.

Epilogue, in float32, rounded once to the output's dtype:

    out = (accumulator * x_scale * weight_scale + bias + sample_bias) * gate + residual
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmq_kernels.kernels.triton.dependent_launch import begin

ROWS_IN_A_BAND = tl.constexpr(8)
STORED_COLUMNS = tl.constexpr(64)  # of one slice of a tile in the epilogue
GATED_COLUMNS = tl.constexpr(32)  # the same with a gate, whose values take registers beside the residual's


@triton.jit
def tile_of_program(program: tl.tensor, tile_rows: tl.tensor, tile_columns: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of a program's tile; bands of tile rows share the L2 cache."""
    band_size = ROWS_IN_A_BAND * tile_columns
    first_row = (program // band_size) * ROWS_IN_A_BAND
    height = min(tile_rows - first_row, ROWS_IN_A_BAND)
    return first_row + (program % band_size) % height, (program % band_size) // height


@triton.jit
def added_product(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """accumulator + a @ b, of int8 in exact int32, of FP8 in float32.

    Hopper keeps about 14 bits of a sum of FP8 products. Adding it to float32 now and then (`max_num_imprecise_acc`)
    makes the next product wait for the registers, and gains little: what is cut off is far below e4m3's own rounding.
    """
    return tl.dot(a, b, accumulator, out_dtype=accumulator.dtype)


@triton.jit
def load_block(
    source: tl.tensor,  # a descriptor of (rows, k) with blocks of (BLOCK, BLOCK_K), or a pointer to its start
    first_row: tl.tensor,
    rows: tl.tensor,
    first_k: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,  # whether `source` is a descriptor
) -> tl.tensor:
    """(BLOCK, BLOCK_K) of a row-major matrix, zero outside of it."""
    if TILED:
        block = source.load([first_row, first_k])
    else:
        row = first_row + tl.arange(0, BLOCK)
        column = first_k + tl.arange(0, BLOCK_K)
        pointers = source + row.to(tl.int64)[:, None] * k + column[None, :]
        block = tl.load(pointers, mask=(row < rows)[:, None] & (column < k)[None, :], other=0.0)
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
    n: tl.tensor,
    gate_ptr: tl.tensor,
    gate_rows: tl.tensor,
    ONE_SCALE: tl.constexpr,
) -> None:
    """Apply the epilogue to a slice of a tile and store it; arguments as `store_tile`."""
    x_scale_ptr, weight_scale_ptr, bias_ptr, sample_bias_ptr, residual_ptr = terms
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
    if sample_bias_ptr is not None:
        sample_bias_ptrs = sample_bias_ptr + sample.to(tl.int64)[:, None] * n + column[None, :]
        out = out + tl.load(sample_bias_ptrs, mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = (row.to(tl.int32) // gate_rows).to(tl.int64)  # a division of int64 takes a dozen registers
        gate_ptrs = gate_ptr + gate[:, None] * n + column[None, :]
        out = out * tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    offset = row[:, None] * n + column[None, :]
    if residual_ptr is not None:
        out = out + tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(
    accumulator: tl.tensor,  # (BLOCK_M, any width) int32 or float32
    terms: tl.tuple,  # pointers or None: x_scale (one, or one a sample), weight_scale (n,), both float32;
    # bias (n,), sample_bias (samples, n), residual (m, n), floating
    out_ptr: tl.tensor,  # (m, n) floating, or (SPLIT_K, m, n) of the accumulator
    m: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,  # (BLOCK_M,) int64: the rows of this tile, in any order
    sample: tl.tensor,  # (BLOCK_M,): what the scale and sample_bias of a row are indexed by
    row_mask: tl.tensor,  # (BLOCK_M,)
    first_column: tl.tensor,
    last_column: tl.tensor,  # exclusive: the end of the output, or of a group's
    ONE_SCALE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    gate_ptr: tl.tensor = None,  # (gates, n) floating, or None
    gate_rows: tl.tensor = 1,  # that share a row of the gate
) -> None:
    """Store a tile with its epilogue, or split-K's partial sums, slice by slice: few registers are left for it."""
    if accumulator.shape[1] > (STORED_COLUMNS if gate_ptr is None else GATED_COLUMNS):
        left, right = halves(accumulator)
        second = first_column + right.shape[1]
        store_tile(
            left,
            terms,
            out_ptr,
            m,
            n,
            row,
            sample,
            row_mask,
            first_column,
            last_column,
            ONE_SCALE,
            SPLIT_K,
            gate_ptr,
            gate_rows,
        )
        store_tile(
            right,
            terms,
            out_ptr,
            m,
            n,
            row,
            sample,
            row_mask,
            second,
            last_column,
            ONE_SCALE,
            SPLIT_K,
            gate_ptr,
            gate_rows,
        )
    else:
        column = first_column + tl.arange(0, accumulator.shape[1])
        column_mask = column < last_column
        if SPLIT_K > 1:
            partial = out_ptr + tl.program_id(1).to(tl.int64) * m * n
            pointers = partial + row[:, None] * n + column[None, :]
            tl.store(pointers, accumulator, mask=row_mask[:, None] & column_mask[None, :])
        else:
            store_slice(
                accumulator,
                terms,
                out_ptr,
                row,
                sample,
                row_mask,
                column,
                column_mask,
                n,
                gate_ptr,
                gate_rows,
                ONE_SCALE,
            )


@triton.jit
def reduce_split_k(
    partial_ptr: tl.tensor,  # (SPLIT_K, m, n) int32 or float32
    x_scale_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sample_bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    unit_rows: tl.tensor,
    gate_rows: tl.tensor,
    ONE_SCALE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Add split-K's partial sums, always in the same order, and apply the epilogue; arguments as `store_tile`."""
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < m, column < n
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row[:, None] * n + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial_ptr + split * (m.to(tl.int64) * n) + offset, mask=mask, other=0)
    terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, sample_bias_ptr, residual_ptr)
    sample = row // unit_rows
    store_slice(total, terms, out_ptr, row, sample, row_mask, column, column_mask, n, gate_ptr, gate_rows, ONE_SCALE)
