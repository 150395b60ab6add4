"""The one path from an op's operands to the launch of its GEMM kernel.

It checks that TMA can read the operands, chooses the table and the tile, expands the epilogue's operands, makes
room for split-K's partial sums, and reduces them after the launch. An op says what is its own: the name of its
table, its operands, and a function that calls its kernel with what was settled here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ldmq_kernels.kernels.triton.conv2d_gather import gather_conv2d
from ldmq_kernels.kernels.triton.convolution import ConvShape
from ldmq_kernels.kernels.triton.dependent_launch import dependent
from ldmq_kernels.kernels.triton.epilogue import Epilogue, partial_sums
from ldmq_kernels.kernels.triton.launch import accumulator_dtype, on_device, stored_dtype
from ldmq_kernels.kernels.triton.tile_choice import Problem, choose, grid, has_tma
from ldmq_kernels.kernels.triton.tile_tables import TILES, Tile

ALIGNMENT = 16  # bytes, of the start and of each row of what TMA reads


class LinearLaunch(NamedTuple):
    """What a linear's kernel is launched with.

    Attributes:
        tile: the tile that was chosen.
        grid: programs: tiles of the output, and split_k.
        x: (m, k), a descriptor, or a tensor that the kernel reads by pointers.
        weight: (n, k), or (n, bytes) int8 holding int4, in the same way; (2, n, k) where a half of it are gates.
        extra_weight: the same with blocks for the second accumulator, or None.
        epilogue: the epilogue's operands.
        out: (m, n) floating, or (split_k, m, n) of the accumulator.
        sizes: m, n and k.
        options: what every kernel takes by keyword.
    """

    tile: Tile
    grid: tuple[int, int]
    x: Tensor | TensorDescriptor
    weight: Tensor | TensorDescriptor
    extra_weight: Tensor | TensorDescriptor | None
    epilogue: Epilogue
    out: Tensor
    sizes: tuple[int, int, int]
    options: dict[str, Any]


class Conv2dLaunch(NamedTuple):
    """What a convolution's tma_tiled kernel is launched with.

    Attributes:
        tile: the tile that was chosen.
        grid: programs: tiles of the output, and split_k.
        x: a descriptor of the activations.
        epilogue: the epilogue's operands.
        out: (N, K, P, Q) floating, channels_last, or (split_k, N * P * Q, K) of the accumulator.
        sizes: the run-time sizes, from `image_tiles` to `left`.
        options: what every kernel takes by keyword.
    """

    tile: Tile
    grid: tuple[int, int]
    x: TensorDescriptor
    epilogue: Epilogue
    out: Tensor
    sizes: tuple[int, ...]
    options: dict[str, Any]


def linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    launch: Callable[[LinearLaunch], None],
    has_gates: bool = False,
) -> Tensor:
    """Multiply activations by a linear's weight.

    Args:
        op: the table's name.
        x: (..., k) int8, FP8 or floating.
        weight: (n, k) int8 or FP8, or (n, ceil(k / 2)) uint8 holding int4; contiguous.
        epilogue: the epilogue's operands, as the op was given them.
        out_dtype: float16, bfloat16 or float32.
        launch: calls the op's kernel.
        has_gates: whether half of the weight's rows are gates of the others, so that n is half of their number, and
            half of a tile's columns are of each.

    Returns:
        (..., n) of `out_dtype`.

    Raises:
        Unsupported: there are neither one activation scale nor one for each row.
    """
    k, rows = x.shape[-1], weight.shape[0]
    n = rows // 2 if has_gates else rows
    matrix = x.reshape(-1, k).contiguous()
    m = matrix.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=stored_dtype(x, out_dtype), device=x.device)
    epilogue = epilogue.expanded(m, rows, out.shape)
    if out.numel() == 0:
        return out.to(out_dtype)
    table, is_aligned = _linear_table(op, matrix, weight)
    tiled = is_aligned and has_tma(x.device)
    tile = choose(table, Problem(m, rows, k), x.device)
    weight_k = tile.k
    if weight.dtype == torch.uint8:
        weight, weight_k = weight.view(torch.int8), tile.k // 2
    partial = partial_sums(out, tile, m, n, accumulator_dtype(weight))
    call = LinearLaunch(
        tile,
        grid(tile, -(-m // tile.m), rows, x.device),
        _operand(matrix, tile.m, tile.k, tiled),
        _halves(weight, tile.n, weight_k, tiled) if has_gates else _operand(weight, tile.main_n, weight_k, tiled),
        _operand(weight, tile.extra_n, weight_k, tiled) if tile.extra_n else None,
        epilogue,
        partial,
        (m, n, k),
        {"TILED": tiled, **tile.options(), **dependent(x)},
    )
    with on_device(x):
        launch(call)
        epilogue.finish(partial, out, m, n, unit_rows=1)
    return out.to(out_dtype)


def conv2d(
    op: str,
    conv: ConvShape,
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    launch: Callable[[Conv2dLaunch], None],
    multiplier: Tensor | None = None,
) -> Tensor:
    """Convolve activations with a weight: by TMA where it can read both, else by gathered pointers.

    Args:
        op: the name of the table of the tma_tiled kernel.
        conv: the sizes.
        x: (N, C, H, W) int8, FP8 or floating.
        weight: (K, R, S, C / groups) int8 or FP8, or (K, R, S, ceil(C / groups / 2)) int8 holding int4; contiguous.
        epilogue: the epilogue's operands, as the op was given them.
        out_dtype: float16, bfloat16 or float32.
        launch: calls the op's tma_tiled kernel.
        multiplier: (K, R, S, weight groups) uint8, of an int4 weight.

    Returns:
        (N, K, P, Q) of `out_dtype`, channels_last.

    Raises:
        Unsupported: there are neither one activation scale nor one for each sample.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = conv.output(x, stored_dtype(x, out_dtype))
    epilogue = epilogue.expanded(conv.samples, conv.out_channels, conv.out_shape, is_image=True)
    if out.numel() == 0:
        return out.to(out_dtype)
    tma_tiled = has_tma(x.device) and conv.fits_tma_tiles and x.dtype != torch.float32 and _are_aligned(x, weight)
    gather = f"{op} gather float32" if x.dtype == torch.float32 else f"{op} gather"
    tile = choose(op if tma_tiled else gather, conv.problem, x.device)
    partial = partial_sums(out, tile, conv.m, conv.out_channels, accumulator_dtype(weight))
    with on_device(x):
        if tma_tiled:
            image_tile = conv.image_tile(tile.m)
            image_tiles = conv.image_tiles(image_tile)
            programs = grid(tile, image_tiles, conv.out_channels, x.device)
            source = conv.image_descriptor(x, image_tile, tile.k)
            sizes = (image_tiles, *conv.tile_sizes())
            options = {**conv.tile_options(image_tile), **tile.options(), **dependent(x)}
            launch(Conv2dLaunch(tile, programs, source, epilogue, partial, sizes, options))
        else:
            gather_conv2d(conv, tile, x, weight, multiplier, epilogue, partial)
        epilogue.finish(partial, out, conv.m, conv.out_channels, conv.out_size[0] * conv.out_size[1])
    return out.to(out_dtype)


def _linear_table(op: str, x: Tensor, weight: Tensor) -> tuple[str, bool]:
    """The table of tiles for these operands, and whether they can be read by TMA, or 16 bytes at a time."""
    if x.dtype == torch.float32 and f"{op} float32" in TILES:
        return f"{op} float32", False
    is_aligned = _are_aligned(x, weight)
    return (f"{op} unaligned" if not is_aligned and f"{op} unaligned" in TILES else op), is_aligned


def _are_aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the rows and the start of both are multiples of 16 bytes; rows are the channels of a position."""
    x_row, weight_row = x.shape[1] * x.element_size(), weight.shape[-1] * weight.element_size()
    starts = x.data_ptr() % ALIGNMENT == 0 and weight.data_ptr() % ALIGNMENT == 0
    return starts and x_row % ALIGNMENT == 0 and weight_row % ALIGNMENT == 0


def _operand(matrix: Tensor, rows: int, k: int, tiled: bool) -> Tensor | TensorDescriptor:
    """A matrix as a kernel takes it: a descriptor with blocks of (rows, k), or the tensor that is read by pointers."""
    if not tiled:
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, k])


def _halves(weight: Tensor, rows: int, k: int, tiled: bool) -> Tensor | TensorDescriptor:
    """A weight of two halves in the same way: blocks have `rows` // 2 rows of each, those of one after the other."""
    if not tiled:
        return weight
    pair = weight.view(2, -1, weight.shape[1])
    return TensorDescriptor(pair, list(pair.shape), list(pair.stride()), [2, rows // 2, k])
