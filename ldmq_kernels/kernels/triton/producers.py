"""What quantizations and producers share: tiles over a matrix of tokens or pixels by channels, and their end.

With a calibrated scale every element is on its own, and a tile is 64 channels of many rows: widths of UNets
are multiples of 64, so that no lane idles. A scale of a row's own, or a norm over it, takes whole rows, which
stay in registers between the statistics and the rounding, so that memory is read once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference.producers import no_scale
from ldmq_kernels.kernels.triton.launch import quantized_dtype
from ldmq_kernels.kernels.triton.rounding import absolute_maximum, dynamic_scale, rounded_to

MANY_PROGRAMS = 4 * 132  # four for each multiprocessor of an H100 or H200
CHANNELS = 64  # of an elementwise tile; 128 bytes of a row in 16 bits
MOST_CHANNELS = 16384  # of a row in the registers of one program: 32 to a thread
LOG2_E = tl.constexpr(1.4426950408889634)
# half of the coefficients of erfc(z) = t (a + t (b + ...)) exp(-z^2), t = 1 / (1 + 0.3275911 z), z >= 0, within
# 1.5e-7: Abramowitz and Stegun, 7.1.26. libdevice's erf has two branches, and takes longer than memory does
COEFFICIENTS = tl.constexpr((0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145))
PER_SQRT_2 = tl.constexpr(0.3275911 * 0.7071067811865476)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
SQRT_8_PER_PI = tl.constexpr(1.5957691216057308)


@functools.cache
def elementwise_tile(rows: int, channels: int) -> dict[str, Any]:
    """Launch options for tiles in which no element needs another: 32 to a thread if there are many, else 16."""
    block_c = min(CHANNELS, triton.next_power_of_2(channels))
    elements = 4096 if rows * channels >= 4096 * MANY_PROGRAMS else 2048
    return _options(elements // block_c, block_c, warps=4)


@functools.cache
def row_tile(channels: int) -> dict[str, Any]:
    """Launch options for tiles of one whole row; then vectors over the channels need no exchange between threads.

    Raises:
        Unsupported: a row does not fit into registers.
    """
    if channels > MOST_CHANNELS:
        raise Unsupported(f"rows of {channels} channels; Triton takes at most {MOST_CHANNELS}")
    block_c = triton.next_power_of_2(channels)
    return _options(1, block_c, warps=min(16, max(1, block_c // 512)))


def _options(block_m: int, block_c: int, warps: int) -> dict[str, Any]:
    return {"BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": warps, "enable_fp_fusion": False}


def programs(rows: int, channels: int, tile: dict[str, Any]) -> int:
    """How many tiles cover rows x channels."""
    return triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_C"])


def channel_vector(vector: Tensor | None, channels: int) -> Tensor | None:
    """A contiguous vector over the channels, or None.

    Raises:
        Unsupported: it has another length.
    """
    if vector is None:
        return None
    if vector.shape != (channels,):
        raise Unsupported(f"a vector of shape {tuple(vector.shape)} for {channels} channels")
    return vector.contiguous()


def runs(rows_of_channels: Tensor | None, rows: int, channels: int) -> tuple[Tensor | None, int]:
    """A modulation as (runs, channels), contiguous, and how many rows share one of them; of None, None and 1.

    Raises:
        Unsupported: it has other channels, or its runs do not divide the rows.
    """
    if rows_of_channels is None:
        return None, 1
    count = rows_of_channels.numel() // channels
    if rows_of_channels.shape[-1] != channels or not count or rows % count:
        raise Unsupported(f"a modulation of shape {tuple(rows_of_channels.shape)} for {rows} rows of {channels}")
    return rows_of_channels.reshape(-1, channels).contiguous(), rows // count


def factors(inv_scale: Tensor | None, inv_smooth: Tensor | None, channels: int) -> dict[str, Any]:
    """Keyword arguments of `store_quantized`: the factor is inv_scale where there is one, else inv_smooth or None.

    Raises:
        Unsupported: there are neither one nor `channels` of them.
    """
    if inv_scale is None:
        return {"factor_ptr": channel_vector(inv_smooth, channels), "ONE_FACTOR": False}
    if inv_scale.numel() not in (1, channels):
        raise Unsupported(f"{inv_scale.numel()} inverse scales for {channels} channels")
    return {"factor_ptr": inv_scale.contiguous(), "ONE_FACTOR": inv_scale.numel() == 1}


def token_outputs(
    x: Tensor, channels: int, inv_scale: Tensor | None, q_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Empty results of a producer over the last axis: (..., channels) as a kernel stores it, and the scales or (0,).

    Raises:
        Unsupported: FP8 on a GPU that has none.
    """
    q = torch.empty((*x.shape[:-1], channels), dtype=quantized_dtype(x, q_dtype), device=x.device)
    if inv_scale is not None:
        return q, no_scale(x)
    return q, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


@triton.jit
def tile_start(channels: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First row (int64) and first channel of this program's tile; tiles of the same rows follow each other."""
    column_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    return (program // column_blocks).to(tl.int64) * BLOCK_M, (program % column_blocks) * BLOCK_C


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x * sigmoid(x), within a few units in the last place; a division would take as long as the rest of a kernel."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return x * root * root


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x * (1 + erf(x / sqrt(2))) / 2, within float32's rounding of the sum in brackets."""
    magnitude = tl.abs(x)
    one = tl.full(x.shape, 1.0, tl.float32)
    root = tl.rsqrt(tl.fma(magnitude, tl.full(x.shape, PER_SQRT_2, tl.float32), one))
    t = root * root
    tail = tl.full(x.shape, COEFFICIENTS[4], tl.float32)
    for i in tl.static_range(4):
        tail = tl.fma(tail, t, tl.full(x.shape, COEFFICIENTS[3 - i], tl.float32))
    tail = tail * t * tl.exp2(x * x * -HALF_LOG2_E)
    return tl.fma(-magnitude, tail, tl.maximum(x, 0.0))


@triton.jit
def gelu_by_tanh(x: tl.tensor) -> tl.tensor:
    """x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    twice = SQRT_8_PER_PI * (x + 0.044715 * x * x * x)
    root = tl.rsqrt(1.0 + tl.exp2(twice * -LOG2_E))
    return x * root * root


@triton.jit
def scaled(
    y: tl.tensor,  # (BLOCK_M, BLOCK_C) float32
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32, or None
    channel: tl.tensor,  # (1, BLOCK_C)
    channel_mask: tl.tensor,
    ONE_FACTOR: tl.constexpr,
) -> tl.tensor:
    """y times inv_scale, or inv_smooth."""
    if factor_ptr is not None:
        if ONE_FACTOR:
            y = y * tl.load(factor_ptr)
        else:
            y = y * tl.load(factor_ptr + channel, mask=channel_mask, other=0.0)
    return y


@triton.jit
def store_quantized(
    y: tl.tensor,  # (BLOCK_M, BLOCK_C) float32, zero outside of the matrix's channels
    factor_ptr: tl.tensor,  # (1,) or (channels,) float32, or None
    out_ptr: tl.tensor,  # to the tile's first row, int8 or FP8
    scale_ptr: tl.tensor,  # to the tile's first row, float32, or None with a calibrated scale
    row: tl.tensor,  # (BLOCK_M, 1), from the tile's first
    channel: tl.tensor,  # (1, BLOCK_C)
    row_mask: tl.tensor,
    channel_mask: tl.tensor,
    channels: tl.tensor,
    ONE_FACTOR: tl.constexpr,
    DYNAMIC: tl.constexpr,  # whether each row has its own scale, and the tile whole rows
) -> None:
    """Quantize a tile and store it, with the scales that it measures."""
    y = scaled(y, factor_ptr, channel, channel_mask, ONE_FACTOR)
    if DYNAMIC:
        scale = dynamic_scale(tl.expand_dims(absolute_maximum(y, 1), 1), out_ptr.dtype.element_ty)
        tl.store(scale_ptr + row, scale, mask=row_mask)
        y = y * tl.div_rn(1.0, scale)
    q = rounded_to(y, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * channels + channel, q, mask=row_mask & channel_mask)
