"""Calls of every op at shapes of UNets, with operands that stay where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels import ops
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.kernels.triton.tile_tables import Tile
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.numerics.formats.int4 import group_count, pack_int4

HALF = torch.float16


@dataclass(frozen=True)
class Call:
    """A call of an op; calling it gives the op's results as a tuple.

    tile: taken instead of the tables' choice.
    backend: that serves it; None for the usual one.
    intermediate: bytes of what one launch leaves for the next, beside partial sums.
    """

    op: str
    arguments: tuple[Any, ...]
    tile: Tile | None = None
    intermediate: int = 0
    backend: str | None = None

    def __call__(self, chooser: tile_choice.Chooser | None = None) -> tuple[Tensor, ...]:
        with tile_choice.chosen_by(chooser or (lambda _op, _problem: self.tile)):
            return self.results()

    def results(self) -> tuple[Tensor, ...]:
        """The op's results, with whatever tile is chosen around this."""
        with dispatch.use_backend(self.backend) if self.backend else contextlib.nullcontext():
            out = getattr(ops, self.op)(*self.arguments)
        return out if isinstance(out, tuple) else (out,)


Maker = Callable[[torch.device], Call]


def int8(device: torch.device, *shape: int) -> Tensor:
    """Uniform over [-127, 127]."""
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def quantized(op: str, device: torch.device, *shape: int) -> Tensor:
    """An activation or a weight in 8 bits, as `op` takes it."""
    return torch.randn(shape, device=device).to(FLOAT8) if "fp8" in op else int8(device, *shape)


def positive(device: torch.device, *shape: int) -> Tensor:
    """Scales around 1e-2."""
    return torch.rand(shape, device=device) * 1e-2 + 1e-3


def normal(device: torch.device, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Normally distributed values; channels_last where there are four axes."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def weights(op: str, device: torch.device, *shape: int) -> tuple[Tensor, ...]:
    """A weight as `op` takes it, before its scales: 8 bits, or packed int4 and the multipliers of a two-level one."""
    if "w4" not in op:
        return (quantized(op, device, *shape),)
    packed = pack_int4(torch.randint(-7, 8, shape, dtype=torch.int8, device=device))
    if op.endswith("a16"):
        return (packed,)
    return packed, torch.randint(1, 19, (*shape[:-1], group_count(shape[-1])), dtype=torch.uint8, device=device)


def linear(
    op: str,
    rows: int,
    depth: int,
    columns: int,
    device: torch.device,
    *,
    tile: Tile | None = None,
    exact: bool = False,
    dtype: torch.dtype = HALF,
) -> Call:
    """A linear; where `exact`, its output is the accumulator in float32, else it has all terms of an epilogue."""
    weight = weights(op, device, columns, depth)
    ones, one = torch.ones(columns, device=device), torch.ones(1, device=device)
    scale = ones if exact else positive(device, columns)
    bias, residual = normal(device, columns, dtype=dtype), normal(device, rows, columns, dtype=dtype)
    terms = (None, None) if exact else (bias, residual)
    if op.endswith("a16"):
        scale = positive(device, columns, group_count(depth)) if "w4" in op else scale
        return Call(op, (normal(device, rows, depth, dtype=dtype), *weight, scale, bias), tile)
    x = quantized(op, device, rows, depth)
    if op == "linear_static_w8a8":
        inputs = (x.float(), one, one) if exact else (normal(device, rows, depth, dtype=dtype), 30 * one, one / 30)
        return Call(op, (*inputs, *weight, scale, *terms), tile, intermediate=x.numel() if columns > 640 else 0)
    x_scale = one if exact else positive(device, rows)
    if "geglu" in op:
        inv_scale = torch.full((columns // 2,), 500 / depth, device=device)
        return Call(op, (x, x_scale, *weight, scale, bias, inv_scale, x.dtype), tile)
    return Call(op, (x, x_scale, *weight, scale, *terms, torch.float32 if exact else dtype), tile)


def conv2d(
    op: str,
    shape: tuple[int, int, int, int],
    out_channels: int,
    geometry: tuple[Any, ...],
    device: torch.device,
    *,
    tile: Tile | None = None,
    exact: bool = False,
    dtype: torch.dtype = HALF,
) -> Call:
    """A convolution of x (N, C, H, W); `exact` as for `linear`."""
    samples, channels, height, width = shape
    kernel, stride, (top, bottom, left, right), dilation, groups, upsample = geometry
    weight = weights(op, device, out_channels, *kernel, channels // groups)
    scale = torch.ones(out_channels, device=device) if exact else positive(device, out_channels)
    bias = normal(device, out_channels, dtype=dtype)
    if op == "conv2d_w8a16":
        return Call(op, (normal(device, *shape, dtype=dtype), *weight, scale, bias, *geometry), tile)
    x = quantized(op, device, samples, height, width, channels).permute(0, 3, 1, 2)
    sides = (upsample * height + top + bottom, upsample * width + left + right)
    out = [(side - d * (k - 1) - 1) // s + 1 for side, k, s, d in zip(sides, kernel, stride, dilation, strict=True)]
    vector = normal(device, samples, out_channels, dtype=dtype)
    residual = normal(device, samples, out_channels, *out, dtype=dtype)
    if exact:
        terms, x_scale = (None, None, None), torch.ones(1, device=device)
    else:
        terms, x_scale = (bias, vector, residual), positive(device, samples)
    arguments = (x, x_scale, *weight, scale, *terms, *geometry, torch.float32 if exact else dtype)
    return Call(op, arguments, tile)


def norm(
    shape: tuple[int, int, int, int], groups: int, mode: str, device: torch.device, dtype: torch.dtype = HALF
) -> Call:
    """GroupNorm and SiLU; `mode` is "static", "sample" or "token"."""
    channels = shape[1]
    parameters = normal(device, channels, dtype=dtype), normal(device, channels, dtype=dtype)
    vector = positive(device, channels) * 1e3
    factors = (vector, None) if mode == "static" else (None, vector)
    x = normal(device, *shape, dtype=dtype)
    return Call("group_norm_silu_quantize", (x, *parameters, groups, 1e-5, True, *factors, mode == "token"))


def producer(op: str, shape: tuple[int, ...], mode: str, device: torch.device, dtype: torch.dtype = HALF) -> Call:
    """Another producer or quantization; `mode` is "static" or "measured"."""
    x = normal(device, *shape, dtype=dtype)
    channels = shape[1] if len(shape) == 4 else shape[-1] // (2 if op == "geglu_quantize" else 1)
    vector = positive(device, channels) * 1e3
    if op == "quantize_static":
        return Call(op, (x, vector, 1 if len(shape) == 4 else -1))
    if "quantize_per" in op:
        return Call(op, (x, vector))
    parameters: tuple[Any, ...] = (True,) if op == "gelu_quantize" else ()
    if op == "layer_norm_quantize":
        parameters = (normal(device, channels, dtype=dtype), normal(device, channels, dtype=dtype), 1e-5)
    return Call(op, (x, *parameters, *((vector, None) if mode == "static" else (None, vector))))


SAME = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)
STRIDED = ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, 1)
FAR = ((3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1, 1)
UPSAMPLED = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 2)
GROUPED = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 1)
PICTURE = (2, 320, 32, 32)

# by name, of which the first word is the op: what `linear` takes, and a tile where it is not to be chosen
LINEARS: dict[str, tuple[tuple[int, int, int], Tile | None]] = {
    "linear_w8a8": ((2048, 640, 1280), None),
    "linear_w8a8 unaligned": ((154, 100, 320), None),
    "linear_w8a8 persistent": ((4097, 320, 640), Tile(128, 160, 128, 8, 4, persistent=True)),
    "linear_w8a8 split": ((130, 1280, 640), Tile(64, 64, 128, 4, 4, split_k=4)),
    "linear_static_w8a8": ((2048, 640, 640), None),
    "linear_static_w8a8 in two launches": ((2048, 640, 1280), None),
    "linear_static_w8a8 unaligned": ((154, 100, 320), None),
    "linear_geglu_w8a8": ((2048, 640, 1280), None),
    "linear_geglu_w8a8 unaligned": ((154, 100, 320), None),
    "linear_fp8": ((2048, 640, 1280), None),
    "linear_fp8 unaligned": ((154, 100, 320), None),
    "linear_geglu_fp8": ((2048, 640, 1280), None),
    "linear_w4a8": ((2048, 640, 1280), None),
    "linear_w4a8 unaligned": ((154, 100, 320), None),
    "linear_w4a8 split": ((130, 1280, 640), Tile(64, 64, 64, 4, 4, split_k=4)),
    "linear_w8a16": ((2048, 640, 1280), None),
    "linear_w4a16": ((2048, 640, 1280), None),
}
CONVOLUTIONS: dict[str, tuple[tuple[int, int, int, int], int, tuple[Any, ...], Tile | None]] = {
    "conv2d_w8a8": (PICTURE, 320, SAME, None),
    "conv2d_w8a8 stride 2": (PICTURE, 320, STRIDED, None),
    "conv2d_w8a8 padded at the far sides": (PICTURE, 320, FAR, None),
    "conv2d_w8a8 upsampled": ((2, 320, 16, 16), 320, UPSAMPLED, None),
    "conv2d_w8a8 8x8": ((2, 640, 8, 8), 320, SAME, Tile(64, 64, 128, 4, 4, split_k=4)),
    "conv2d_w8a8 persistent": (PICTURE, 320, SAME, Tile(128, 160, 128, 8, 4, persistent=True)),
    "conv2d_w8a8 transposed": (PICTURE, 320, SAME, Tile(128, 128, 128, 8, 4, transposed=True)),
    "conv2d_w8a8 odd extent": ((2, 320, 15, 17), 320, STRIDED, None),
    "conv2d_w8a8 4 channels": ((2, 4, 32, 32), 320, SAME, None),
    "conv2d_w8a8 groups": ((2, 128, 16, 16), 192, GROUPED, None),
    "conv2d_fp8": (PICTURE, 320, SAME, None),
    "conv2d_fp8 odd extent": ((2, 320, 15, 17), 320, STRIDED, None),
    "conv2d_w4a8": (PICTURE, 320, SAME, None),
    "conv2d_w4a8 stride 2": (PICTURE, 320, STRIDED, None),
    "conv2d_w4a8 odd extent": ((2, 320, 15, 17), 320, STRIDED, None),
    "conv2d_w8a16": (PICTURE, 320, SAME, None),
    "conv2d_w8a16 odd extent": ((2, 320, 15, 17), 320, STRIDED, None),
}


def product(name: str, device: torch.device, exact: bool = False) -> Call:
    """A call of LINEARS or CONVOLUTIONS."""
    op = name.split()[0]
    if name in LINEARS:
        sizes, tile = LINEARS[name]
        return linear(op, *sizes, device, tile=tile, exact=exact)
    shape, out_channels, geometry, tile = CONVOLUTIONS[name]
    return conv2d(op, shape, out_channels, geometry, device, tile=tile, exact=exact)


TOKENS, PAIRS = (2, 1024, 640), (2, 1024, 1280)
CALLS: dict[str, Maker] = {
    "quantize_static": partial(producer, "quantize_static", PICTURE, "static"),
    "quantize_per_token": partial(producer, "quantize_per_token", TOKENS, "measured"),
    "quantize_per_sample": partial(producer, "quantize_per_sample", PICTURE, "measured"),
    "rotate_quantize_per_token": partial(producer, "rotate_quantize_per_token", TOKENS, "measured"),
    "rotate_quantize_per_sample": partial(producer, "rotate_quantize_per_sample", PICTURE, "measured"),
    "group_norm_silu_quantize": partial(norm, PICTURE, 32, "sample"),
    "group_norm_silu_quantize static": partial(norm, PICTURE, 32, "static"),
    "group_norm_silu_quantize per token": partial(norm, PICTURE, 32, "token"),
    "group_norm_silu_quantize 8x8": partial(norm, (2, 1280, 8, 8), 32, "sample"),
    "group_norm_silu_quantize 8x8 static": partial(norm, (2, 1280, 8, 8), 32, "static"),
    "layer_norm_quantize": partial(producer, "layer_norm_quantize", TOKENS, "measured"),
    "geglu_quantize": partial(producer, "geglu_quantize", PAIRS, "measured"),
    "geglu_quantize static": partial(producer, "geglu_quantize", PAIRS, "static"),
    "gelu_quantize": partial(producer, "gelu_quantize", PAIRS, "measured"),
    "gelu_quantize static": partial(producer, "gelu_quantize", PAIRS, "static"),
    "silu_quantize": partial(producer, "silu_quantize", (2, 1280), "measured"),
    **{name: partial(product, name) for name in (*LINEARS, *CONVOLUTIONS)},
}
IN_CUDA = (  # what the CUDA backend takes of these
    "linear_w8a8",
    "linear_static_w8a8",
    "linear_geglu_w8a8",
    "linear_fp8",
    "linear_geglu_fp8",
    "linear_w4a8",
    "conv2d_w8a8",
    "conv2d_w8a8 stride 2",
    "conv2d_w8a8 padded at the far sides",
    "conv2d_w8a8 upsampled",
    "conv2d_w8a8 odd extent",
    "conv2d_fp8",
    "conv2d_fp8 odd extent",
    "quantize_static",
    "quantize_per_token",
    "quantize_per_sample",
    "group_norm_silu_quantize",
    "group_norm_silu_quantize static",
    "group_norm_silu_quantize per token",
    "group_norm_silu_quantize 8x8",
    "geglu_quantize",
    "geglu_quantize static",
)


def by_cuda(name: str, device: torch.device) -> Call:
    """A call of CALLS by the CUDA backend; its static linear is in two launches."""
    call = CALLS[name](device)
    first = call.arguments[0].numel() if call.op == "linear_static_w8a8" else call.intermediate
    return replace(call, backend="cuda", intermediate=first)


CALLS |= {f"{name} by CUDA": partial(by_cuda, name) for name in IN_CUDA}
EXACT = tuple(name for name in (*LINEARS, *CONVOLUTIONS) if "a8" in name.split()[0] and "geglu" not in name)
