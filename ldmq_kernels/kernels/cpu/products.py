"""int8 products of a processor with AVX2 and without VNNI, exact, by `products.c`: 16-bit integers, 32-bit sums.

About twice the products of float32 for each instruction, on half of the memory. Input channels come in pairs: a weight
with an odd number of them, or with one for each of its groups, is multiplied by `widened`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import compiled
from ldmq_kernels.kernels.cpu.blocks import finish_rows
from ldmq_kernels.kernels.cpu.compiled import Epilogue

PANEL = 16  # output channels that are multiplied together
DEPTH = 1024  # integers of a row up to which products.c keeps the sums in registers
GRAIN = 1 << 20  # products of a call for one thread: a fraction of a millisecond


def serves() -> bool:
    """Whether `products.c` was compiled here, on a processor whose float32 products take no wider vectors."""
    library, _ = compiled.load()
    has_them = library is not None and hasattr(library, "ldmq_multiply")
    return has_them and torch.backends.cpu.get_cpu_capability() == "AVX2"


def takes(weight: Tensor) -> bool:
    """Whether this file multiplies a weight of int8, (N, K) or (K, R, S, C / groups)."""
    return serves() and weight.numel() > 0 and weight.shape[-1] % 2 == 0


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is one that `pack` packed."""
    return weight.dtype == torch.int16 and weight.shape[-2:] == (PANEL, 2)


def pack(weight: Tensor) -> Tensor:
    """(N, ..., C) int8 to (panels, ..., C / 2, 16, 2) int16: pairs of input channels of 16 outputs side by side."""
    outputs = weight.shape[0]
    panels = weight.new_zeros(-(-outputs // PANEL) * PANEL, *weight.shape[1:], dtype=torch.int16)
    panels[:outputs] = weight
    return panels.unflatten(0, (-1, PANEL)).unflatten(-1, (-1, 2)).movedim(1, -2).contiguous()


def unpack(packed: Tensor, outputs: int) -> Tensor:
    """The (N, ..., C) int8 that `pack` packed; `outputs` is N."""
    weight = packed.movedim(-2, 1).flatten(-2).flatten(0, 1)[:outputs]
    return weight.to(torch.int8, memory_format=torch.contiguous_format)


def linear(x_q: Tensor, packed: Tensor, epilogue: Epilogue, outputs: int, out_dtype: torch.dtype) -> Tensor:
    """x_q (M, K) int8, contiguous, by a packed weight; (M, N) of `out_dtype`: exact sums and their epilogue."""
    rows, channels = x_q.shape
    geometry = ((1, 1), (0, 0), (1, 1))
    return _multiply(x_q, (1, rows, 1, channels), packed, (1, 1), geometry, (rows, 1), epilogue, outputs, out_dtype)


def conv2d(
    x_q: Tensor,
    packed: Tensor,
    epilogue: Epilogue,
    outputs: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out_dtype: torch.dtype,
) -> Tensor:
    """x_q (N, C, H, W) int8, channels_last, by a packed weight; `out_dtype`, channels_last: sums and their epilogue."""
    samples, channels, height, width = x_q.shape
    window = packed.shape[1:3]
    out_size = tuple(
        (size + 2 * pad - apart * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, apart in zip((height, width), window, stride, padding, dilation, strict=True)
    )
    sizes, geometry = (samples, height, width, channels), (stride, padding, dilation)
    out = _multiply(x_q, sizes, packed, window, geometry, out_size, epilogue, outputs, out_dtype)
    return out.view(samples, *out_size, outputs).permute(0, 3, 1, 2)


def _multiply(
    x_q: Tensor,
    sizes: tuple[int, int, int, int],
    packed: Tensor,
    window: tuple[int, ...],
    geometry: tuple[tuple[int, int], ...],
    out_size: tuple[int, ...],
    epilogue: Epilogue,
    outputs: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """(rows, outputs) of `out_dtype`.

    Raises:
        Unsupported: input, weight and epilogue do not fit together.
        MemoryError: there is none left.
    """
    library, _ = compiled.load()
    assert library is not None
    if sizes[3] != 2 * packed.shape[-3] or -(-outputs // PANEL) != packed.shape[0]:
        held = f"{2 * packed.shape[-3]} channels for up to {PANEL * packed.shape[0]} outputs"
        raise Unsupported(f"the input has {sizes[3]} channels for {outputs} outputs, the weight {held}")
    if min(out_size) < 1:
        raise Unsupported(f"the windows of {tuple(window)} do not fit into the input of {sizes[1]}x{sizes[2]}")
    rows, depth = sizes[0] * out_size[0] * out_size[1], window[0] * window[1] * sizes[3]
    out = x_q.new_empty(rows, outputs, dtype=out_dtype)
    is_finished = compiled.takes(epilogue.residual, out)
    sums = x_q.new_empty(rows, outputs, dtype=torch.int32) if depth > DEPTH else None
    finished = out if is_finished else torch.empty_like(out, dtype=torch.float32)
    epilogue.check(rows, outputs)
    kept = epilogue.for_library() if is_finished else Epilogue(torch.ones(1))
    threads = max(1, min(torch.get_num_threads(), rows * outputs * depth // GRAIN))
    failed = library.ldmq_multiply(
        *(x_q.data_ptr(), *sizes, *window, *(length for pair in geometry for length in pair), *out_size),
        *(packed.data_ptr(), outputs, None if sums is None else sums.data_ptr(), *kept.arguments(finished), threads),
    )
    if failed:
        raise MemoryError(f"no memory is left to multiply {rows} x {depth} by {depth} x {outputs}")
    if not is_finished:
        finish_rows(finished, epilogue, out)
    return out
