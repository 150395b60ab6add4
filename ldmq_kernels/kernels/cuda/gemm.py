"""The launch of a GEMM of int8 or FP8: operands checked and contiguous, a tile chosen; csrc/gemm.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.geometry import conv2d_output_size
from ldmq_kernels.kernels.operands import plain, quantized

_OUT_DTYPES = {**extension.DTYPES, torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}


class ConvShape(NamedTuple):
    """The shape of a convolution; padding is at the top and on the left, the output's size says the rest."""

    samples: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    dilation_height: int
    dilation_width: int
    pad_top: int
    pad_left: int
    upsample: int

    @property
    def m(self) -> int:
        """The rows of the implicit GEMM: pixels of the output, of all samples."""
        return self.samples * self.out_height * self.out_width


class Epilogue(NamedTuple):
    """What becomes of the accumulators, as the op was given it.

    Attributes:
        x_scale: float32: one, or one for each row or sample.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: the output's shape and dtype.
        sample_bias: (samples, N) of the output's dtype.
        out_inv_scale: (1,) or (N,) float32, the inverse scale of an int8 output.
        gate: (G, ..., N) of the output's dtype, of a linear: a row for each of G equal runs of rows.
    """

    x_scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    sample_bias: Tensor | None = None
    out_inv_scale: Tensor | None = None
    gate: Tensor | None = None

    def checked(self, op: str, x: Tensor, out: Tensor, units: int, n: int) -> Epilogue:
        """The same operands beside x, of the dtypes that the kernels take, contiguous in the output's order.

        Args:
            op: named in the refusals.
            x: the activations.
            out: what is written.
            units: rows or samples that may have a scale of their own.
            n: columns of the output, or its channels; with GEGLU the product has twice as many.

        Raises:
            Unsupported: another dtype, device or count; the text names op and operand.
        """
        columns = self.weight_scale.numel()
        inv_scale, bias = self.out_inv_scale, self.bias
        if bias is not None:
            bias = _check(op, "bias", bias, x, tuple(extension.DTYPES)).expand(columns).contiguous()
        return Epilogue(
            _factors(op, "x_scale", self.x_scale, x, (1, units)),
            _factors(op, "weight_scale", self.weight_scale, x, (columns, columns)),
            bias,
            _added(op, "residual", self.residual, x, out.shape, out.dtype),
            _added(op, "sample_bias", self.sample_bias, x, (units, n), out.dtype),
            None if inv_scale is None else _factors(op, "out_inv_scale", inv_scale, x, (1, n)),
            None if self.gate is None else _gate(op, self.gate, x, units, n, out.dtype),
        )

    def arguments(self, unit_rows: int) -> dict[str, Any]:
        """The binding's keyword arguments for an epilogue that is checked."""
        inv_scale, vector = self.out_inv_scale, self.sample_bias if self.gate is None else self.gate
        return {
            "x_scale": self.x_scale.data_ptr(),
            "scale_count": self.x_scale.numel(),
            "scale_rows": 0 if self.x_scale.numel() == 1 else unit_rows,
            "weight_scale": self.weight_scale.data_ptr(),
            "bias": _address(self.bias),
            "bias_dtype": "float32" if self.bias is None else extension.DTYPES[self.bias.dtype],
            "vector": _address(vector),
            "vectors": 0 if vector is None else vector.shape[0],
            "residual": _address(self.residual),
            "out_inv_scale": _address(inv_scale),
            "out_inv_scale_count": 0 if inv_scale is None else inv_scale.numel(),
        }


def _check(op: str, name: str, operand: Tensor, x: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The operand itself, of one of these dtypes and beside x."""
    if operand.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise Unsupported(f"{op}: the {name} is {operand.dtype}, must be {accepted}")
    if operand.device != x.device:
        raise Unsupported(f"{op}: the {name} is on {operand.device}, must be on {x.device} like the activations")
    return operand


def _factors(op: str, name: str, operand: Tensor, x: Tensor, counts: tuple[int, int]) -> Tensor:
    """Scales, or inverse scales: float32, contiguous, one or as many as `counts` says."""
    if operand.numel() not in counts:
        raise Unsupported(f"{op}: the {name} has {operand.numel()} elements, must have {counts[0]} or {counts[1]}")
    return _check(op, name, operand, x, (torch.float32,)).reshape(-1).contiguous()


def _added(
    op: str, name: str, operand: Tensor | None, x: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """What the epilogue adds, contiguous in this shape; images are NHWC."""
    if operand is None:
        return None
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return _check(op, name, operand, x, (dtype,)).expand(tuple(shape)).contiguous(memory_format=layout)


def _gate(op: str, gate: Tensor, x: Tensor, rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """The gate as (G, N), of as many equal runs of rows and of the output's dtype."""
    gates = gate.numel() // max(1, n)
    if gate.shape[-1] != n or (rows % gates if gates else rows):
        raise Unsupported(f"{op}: a gate of shape {tuple(gate.shape)} for {rows} rows of {n}")
    return _check(op, "gate", gate, x, (dtype,)).reshape(-1, n).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(op: str, m: int, n: int, k: int, taps: int, device: torch.device, call: dict[str, Any]) -> None:
    """Run a call on the tile that is chosen for it, or on one for every GPU where that one refuses it."""
    binding = extension.binding()
    choose = functools.partial(tiles.choose, op, m, n, k, device, taps=taps)

    def run_on(tile: tiles.Tile) -> None:
        partial = None
        if tile.split_k > 1:  # int32, or as many bytes of float32
            partial = torch.empty((tile.split_k, m, n), dtype=torch.int32, device=device)
        binding.run_gemm(tile=tile.place, split_k=tile.split_k, partial=_address(partial), **call)

    tile = choose()
    try:
        run_on(tile)
    except binding.Refusal as refusal:
        if tile.family < tiles.HOPPER or tiles.is_forced():
            raise Unsupported(str(refusal)) from None
        try:  # Hopper's tiles refuse a few convolutions that those for every GPU take
            run_on(choose(for_all=True))
        except binding.Refusal as final:
            raise Unsupported(str(final)) from None


def run(
    op: str,
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    epilogue: Epilogue,
    out: Tensor,
    *,
    channels: int,
    conv: ConvShape | None = None,
) -> Tensor:
    """Compute `out` of operands whose shapes are checked.

    Args:
        op: "linear_w8a8", "linear_w4a8", "conv2d_w8a8", "linear_fp8", "conv2d_fp8", "linear_geglu_w8a8" or
            "linear_geglu_fp8".
        x: (M, channels) contiguous, or (N, C, H, W) channels_last, of the op's int8 or float8_e4m3fn.
        weight: (N, channels) or (K, R, S, C) of the same, or (N, channels / 2) uint8 holding int4; contiguous.
        multiplier: (N, groups) uint8 contiguous, of an int4 weight.
        epilogue: scales, and what is added.
        out: (..., N) contiguous or (samples, N, P, Q) channels_last; floating, or int8 with an `out_inv_scale`.
        channels: input channels.
        conv: the shape, where the op is a convolution.

    Returns:
        out.

    Raises:
        Unsupported: a shape, dtype, device or layout that the kernels do not take; the text names op and operand.
    """
    if out.dtype not in _OUT_DTYPES:
        raise Unsupported(f"{op}: the output is {out.dtype}, must be float16, bfloat16 or float32")
    for name, operand in (("weight", weight), ("multiplier", multiplier)):
        if operand is not None:
            _check(op, name, operand, x, (operand.dtype,))
    columns = epilogue.weight_scale.shape[0]
    n = columns // 2 if "geglu" in op else columns
    m, units = (conv.m, conv.samples) if conv else (x.shape[0], x.shape[0])
    epilogue = epilogue.checked(op, x, out, units, n)
    call: dict[str, Any] = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "multiplier": _address(multiplier),
        "out": out.data_ptr(),
        "out_dtype": _OUT_DTYPES[out.dtype],
        "m": m,
        "n": n,
        "channels": channels,
        "conv": conv or (),
        **epilogue.arguments(m // max(units, 1)),
        **extension.dependent_target(x),
    }
    taps = conv.kernel_height * conv.kernel_width if conv else 1
    _launch(op, m, columns, taps * channels, taps, x.device, call)
    return out


def linear(
    op: str, x_q: Tensor, weight: Tensor, dtype: torch.dtype, epilogue: Epilogue, out_dtype: torch.dtype
) -> Tensor:
    """A linear layer whose activations and weights are both of `dtype`.

    Args:
        op: "linear_w8a8", "linear_fp8", "linear_geglu_w8a8" or "linear_geglu_fp8".
        x_q: (..., K), K a multiple of 16.
        weight: (N, K), N a multiple of 8, with GEGLU of 16.
        dtype: int8 or float8_e4m3fn.
        epilogue: scales, and what is added.
        out_dtype: of the result.

    Returns:
        (..., N), with GEGLU (..., N / 2).

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    k, n = x_q.shape[-1], epilogue.weight_scale.shape[0]
    weight = plain(weight, dtype, (n, k))
    x = quantized(x_q, dtype).reshape(-1, k).contiguous()
    outputs = n // 2 if "geglu" in op else n
    out = torch.empty((*x_q.shape[:-1], outputs), dtype=out_dtype, device=x.device)
    return run(op, x, weight, None, epilogue, out, channels=k)


def conv2d(
    op: str,
    x_q: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    epilogue: Epilogue,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int], int, int],
    out_dtype: torch.dtype,
) -> Tensor:
    """A convolution whose activations and weights are both of `dtype`.

    Args:
        op: "conv2d_w8a8" or "conv2d_fp8".
        x_q: (N, C, H, W), C a multiple of 16.
        weight: (K, R, S, C), K a multiple of 8.
        dtype: int8 or float8_e4m3fn.
        epilogue: scales, and what is added.
        geometry: kernel_size, stride, padding, dilation, groups (1) and upsample, as the op has them.
        out_dtype: of the result.

    Returns:
        (N, K, P, Q) channels_last.

    Raises:
        Unsupported: groups, a packed weight, or an operand of another dtype or size.
    """
    kernel_size, stride, padding, dilation, groups, upsample = geometry
    if groups != 1:
        raise Unsupported(f"groups is {groups}, must be 1")
    samples, channels, height, width = x_q.shape
    out_channels = epilogue.weight_scale.shape[0]
    size = conv2d_output_size((height, width), kernel_size, stride, padding, dilation, upsample)
    weight = plain(weight, dtype, (out_channels, *kernel_size, channels))
    x = quantized(x_q, dtype).contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (samples, out_channels, *size), dtype=out_dtype, device=x.device, memory_format=torch.channels_last
    )
    top, _, left, _ = padding
    conv = ConvShape(samples, height, width, *size, *kernel_size, *stride, *dilation, top, left, upsample)
    return run(op, x, weight, None, epilogue, out, channels=channels, conv=conv)
