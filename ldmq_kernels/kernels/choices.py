"""What tells the shapes of an op's calls apart, and how the file of measurements writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = tuple[Any, ...]
_SCALE_AT = {  # the argument with an element, or a row, for each column of the output
    "linear_w8a8": 3,
    "linear_w4a8": 4,
    "linear_static_w8a8": 4,
    "linear_w8a16": 2,
    "linear_w4a16": 2,
    "conv2d_w8a8": 3,
    "conv2d_w4a8": 4,
    "conv2d_w8a16": 2,
}
_KERNEL_AT = {"conv2d_w8a8": 7, "conv2d_w4a8": 8, "conv2d_w8a16": 4}  # then stride, padding, dilation, groups, upsample
_INV_SCALE_AT = {"group_norm_silu_quantize": 6, "layer_norm_quantize": 4, "geglu_quantize": 1, "silu_quantize": 1}


def key_of(op: str) -> Callable[[Arguments], tuple[Any, ...]]:
    """What tells the shapes of an op's calls apart: quick to make and to hash."""
    if op in _KERNEL_AT:
        scale, at = _SCALE_AT[op], _KERNEL_AT[op]
        return lambda a: (a[0].shape, a[scale].shape[0], *a[at], *a[at + 1], *a[at + 3], a[at + 4], a[at + 5])
    if op in _SCALE_AT:
        scale = _SCALE_AT[op]
        return lambda a: (a[0].shape, a[scale].shape[0])
    if op == "group_norm_silu_quantize":
        at = _INV_SCALE_AT[op]
        return lambda a: (a[0].shape, a[at] is None, a[at + 2])
    if op in _INV_SCALE_AT:
        at = _INV_SCALE_AT[op]
        return lambda a: (a[0].shape, a[at] is None)
    return lambda a: (a[0].shape,)


def _x(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def text_of(op: str, key: tuple[Any, ...]) -> str:
    """A key as people read it, and as it stands in the file; the rows of a matrix are one number."""
    shape, *rest = key
    if op in _KERNEL_AT:
        columns, r, s, stride_y, stride_x, *dilation, groups, upsample = rest
        text = f"{_x(*shape)} to {columns}, kernel {_x(r, s)}, stride {_x(stride_y, stride_x)}, upsample {upsample}"
        unusual = {"dilation": _x(*dilation)} if dilation != [1, 1] else {}
        unusual |= {"groups": groups} if groups != 1 else {}
        return text + "".join(f", {name} {value}" for name, value in unusual.items())
    is_picture = len(shape) == 4 and op in ("quantize_static", "quantize_per_sample", "group_norm_silu_quantize")
    text = _x(*shape) if is_picture else _x(torch.Size(shape[:-1]).numel(), *shape[-1:])
    if op in _SCALE_AT:
        return f"{text} to {rest[0]}"
    if op in _INV_SCALE_AT:
        measured, *per_token = rest
        return f"{text}, {'static' if not measured else 'per token' if all(per_token) else 'per sample'}"
    return text


def shape_text(op: str, arguments: Arguments) -> str:
    """The shapes of a call, as the table has them: "8192x640 to 5120" for a linear of so many rows.

    Padding, data types and what the epilogue adds are not part of it.

    Args:
        op: its name.
        arguments: all that the op takes.
    """
    return text_of(op, key_of(op)(arguments))
