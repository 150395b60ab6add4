"""int8 products of `products.c`, exact: by AMX where the processor has it, as 16-bit integers by AVX2 where VNNI lacks.

AMX multiplies int8 by int8 in tiles: with the epilogue in the same pass a multiple of oneDNN's speed. With AVX2 alone,
16-bit integers are about twice float32's speed on half of its memory. Input channels lie in groups of four or two: a
weight whose channels are no multiple of that is multiplied by oneDNN or `widened`, and so is one of several groups.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import compiled, self_check
from ldmq_kernels.kernels.cpu.blocks import finish_rows
from ldmq_kernels.kernels.cpu.compiled import HAS_NAN, NO_MEMORY, Epilogue
from ldmq_kernels.kernels.reference.quantize_static import nan_error

PANEL = 16  # output channels that are multiplied together
TILES, PAIRS = "AMX tiles", "16-bit pairs"
FORMS = {4: TILES, 2: PAIRS}  # by the input channels that lie side by side
GRAIN = {TILES: 1 << 23, PAIRS: 1 << 20}  # products of a call for one thread: a few times what starting it takes


@functools.cache
def _group() -> int:
    """How many input channels lie side by side; 0 where `products.c` was not compiled or multiplies nothing here."""
    library, _ = compiled.load()
    return 0 if library is None else library.ldmq_group_of_weights()


def form() -> str | None:
    """How this processor's weights are held; None where they are not multiplied here."""
    found = FORMS.get(_group())
    return None if found == PAIRS and self_check.is_exact() else found


def serves() -> bool:
    """Whether this file multiplies int8 on this processor."""
    return form() is not None


def takes(weight: Tensor) -> bool:
    """Whether this file multiplies a weight of int8, (N, K) or (K, R, S, C / groups)."""
    return serves() and weight.numel() > 0 and weight.shape[-1] % _group() == 0


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is one that `pack` packed."""
    return weight.dim() == 6 and weight.dtype in (torch.int8, torch.int16)


def pack(weight: Tensor) -> Tensor:
    """(N, K) or (K, R, S, C) int8 to (panels, R, S, C / group, 16, group): groups of channels of 16 outputs in turn.

    R = S = 1 for a linear. Tiles are int8 in groups of 4, pairs int16 in groups of 2.
    """
    if weight.dim() == 2:
        weight = weight[:, None, None]
    outputs, group = weight.shape[0], _group()
    dtype = torch.int8 if form() == TILES else torch.int16
    packed = weight.new_zeros(
        -(-outputs // PANEL), *weight.shape[1:-1], weight.shape[-1] // group, PANEL, group, dtype=dtype
    )
    whole = outputs // PANEL * PANEL
    places = packed.movedim(-2, 1)
    places[: whole // PANEL] = weight[:whole].unflatten(0, (-1, PANEL)).unflatten(-1, (-1, group))
    if whole < outputs:
        places[-1, : outputs - whole] = weight[whole:].unflatten(-1, (-1, group))
    return packed


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """The (N, R, S, C) int8 that `pack` packed; `outputs` is N."""
    weight = packed.movedim(-2, 1).flatten(-2).flatten(0, 1)[:outputs]
    return weight.to(torch.int8, memory_format=torch.contiguous_format)


class Gating(NamedTuple):
    """GEGLU in the epilogue: outputs are values, then as many gates.

    Attributes:
        inv_scale: (1,) or (outputs / 2,) float32, by which the result is rounded to int8; None where it is floating.
    """

    inv_scale: Tensor | None


def gates(packed: Tensor, outputs: int) -> bool:
    """Whether products of a packed linear weight can be gated: tiles can whose values and gates are whole panels."""
    return form() == TILES and is_packed(packed) and outputs % (2 * PANEL) == 0


def linear(
    x_q: Tensor,
    packed: Tensor,
    epilogue: Epilogue,
    outputs: int,
    out_dtype: torch.dtype,
    gating: Gating | None = None,
    *,
    floating: bool = False,
) -> Tensor:
    """x_q (..., K) int8 by a packed weight; (..., N) of `out_dtype`: exact sums and their epilogue.

    With gates, for which `gates` holds, the epilogue has scales and bias alone, and the result is (..., N / 2). Where
    x_q and the weight are bytes of bfloat16 they are multiplied as such, if `floating` says so; see `float_products`.

    Raises:
        Unsupported: input, weight and epilogue do not fit together.
        ValueError: there is NaN in what is rounded to int8.
        MemoryError: there is none left.
    """
    x_q = x_q.contiguous()
    *leading, channels = x_q.shape
    out = x_q.new_empty((*leading, outputs if gating is None else outputs // 2), dtype=out_dtype)
    rows = math.prod(leading)
    if rows:
        sizes = (1, rows, 1, channels)
        geometry = (1, 1, 0, 0, 1, 1)
        _multiply(x_q, sizes, packed, geometry, (rows, 1), epilogue, outputs, out, gating, floating=floating)
    return out


def conv2d(
    x_q: Tensor,
    packed: Tensor,
    epilogue: Epilogue,
    outputs: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out_dtype: torch.dtype,
    *,
    floating: bool = False,
) -> Tensor:
    """x_q (N, C, H, W) int8, channels_last, by a packed weight; `out_dtype`, channels_last: sums and their epilogue.

    Args:
        floating: as of `linear`.

    Raises:
        Unsupported, MemoryError: as `linear`.
    """
    samples, channels, height, width = x_q.shape
    _, taps_y, taps_x, *_ = packed.shape
    geometry = (*stride, *padding, *dilation)
    step_y, step_x, pad_y, pad_x, apart_y, apart_x = geometry
    out_height = (height + 2 * pad_y - apart_y * (taps_y - 1) - 1) // step_y + 1
    out_width = (width + 2 * pad_x - apart_x * (taps_x - 1) - 1) // step_x + 1
    if out_height < 1 or out_width < 1:
        raise Unsupported(f"the windows of {(taps_y, taps_x)} do not fit into the input of {height}x{width}")
    shape = (samples, out_height, out_width, outputs)
    out = x_q.new_empty(shape, dtype=out_dtype)
    sizes = (samples, height, width, channels)
    out_size = (out_height, out_width)
    _multiply(x_q, sizes, packed, geometry, out_size, epilogue, outputs, out, floating=floating)
    return out.permute(0, 3, 1, 2)


def _multiply(
    x_q: Tensor,
    sizes: tuple[int, int, int, int],
    packed: Tensor,
    geometry: tuple[int, ...],
    out_size: tuple[int, int],
    epilogue: Epilogue,
    outputs: int,
    out: Tensor,
    gating: Gating | None = None,
    *,
    floating: bool,
) -> None:
    """Write the product of x_q, in memory of `sizes` (samples, height, width, channels), and its epilogue into `out`.

    Args:
        geometry: stride, padding and dilation, (vertical, horizontal) each.
        out_size: height and width of the output.
        out: (..., outputs), or half as many columns with gates, contiguous.
    """
    panels, taps_y, taps_x, groups, _, group = packed.shape
    channels = sizes[3]
    if channels != groups * group or -(-outputs // PANEL) != panels:
        held = f"{groups * group} channels for up to {PANEL * panels} outputs"
        raise Unsupported(f"the input has {channels} channels for {outputs} outputs, the weight {held}")
    rows, depth = sizes[0] * out_size[0] * out_size[1], taps_y * taps_x * channels
    inverse = None if gating is None or gating.inv_scale is None else compiled.in_float32(gating.inv_scale)
    is_written = inverse is not None or compiled.takes(epilogue.residual, out)
    written = out if is_written else torch.empty_like(out, dtype=torch.float32)
    is_finished = is_written or gating is not None
    kept = epilogue.fitted(rows, outputs) if is_finished else Epilogue(compiled.ONE)
    threads = max(1, min(torch.get_num_threads(), rows * outputs * depth // GRAIN[FORMS[group]]))
    status = compiled.call(
        "ldmq_multiply",
        threads,
        *(x_q.data_ptr(), *sizes, *geometry, taps_y, taps_x, *out_size, packed.data_ptr(), outputs),
        *kept.operands(written, outputs),
        *(gating is not None, compiled.address(inverse), 0 if inverse is None else inverse.numel(), floating),
    )
    if status & NO_MEMORY:
        raise MemoryError(f"no memory is left to multiply {rows} x {depth} by {depth} x {outputs}")
    if status & HAS_NAN:
        raise nan_error()
    if not is_finished:
        finish_rows(written.view(rows, outputs), epilogue, out.view(rows, outputs))
    elif not is_written:
        out.copy_(written)
