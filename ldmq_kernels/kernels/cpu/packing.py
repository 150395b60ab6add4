"""How the weights of 8-bit products are held, exact both ways: in oneDNN's layouts, as 16-bit pairs, or as float32.

A linear is blocked at once. Which blocks suit a convolution depends on the size of its input (the
wrong ones are reordered in every call, for longer than the convolution takes on an 8x8 map), so its
packed tensor starts in plain order and `lay_out_conv2d` blocks it at its first call, in place.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Packer
from ldmq_kernels.kernels.cpu import onednn, products, self_check, widened
from ldmq_kernels.numerics.formats.int4 import pack_int4, unpack_int4
from ldmq_kernels.numerics.formats.int4_two_level import divide_multiplier, fold_multiplier

_LAYING_OUT = threading.Lock()
TRIMMED = 1 << 26  # bytes of plain weights after whose packing the holes that they left are given back


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is in a form of this file; a plain one is strided int8, or int4 in uint8."""
    return products.is_packed(weight) or weight.is_mkldnn or weight.dtype == torch.float32


def pack_linear(weight: Tensor) -> Tensor:
    """(N, K) int8 to the form that `linear_w8a8` and, of the folded weight, `linear_w4a8` multiply."""
    if products.takes(weight):
        return products.pack(weight)
    return onednn.prepack_linear(weight.contiguous()) if self_check.is_exact() else widened.pack_linear(weight)


def unpack_linear(packed: Tensor, outputs: int) -> Tensor:
    """The (N, K) int8 that `pack_linear` packed; `outputs` is N."""
    if products.is_packed(packed):
        return products.unpack(packed, outputs).flatten(1)
    return widened.unpack_linear(packed) if packed.dtype == torch.float32 else packed.to_dense().t().contiguous()


def join_linear(packed: Sequence[Tensor], outputs: Sequence[int]) -> Tensor | None:
    """Packed weights of one input as one, of all their outputs in turn; None but for whole panels of `products`."""
    begin_panels = all(count % products.PANEL == 0 for count in outputs[:-1])
    return torch.cat(list(packed)) if begin_panels and all(map(products.is_packed, packed)) else None


def pack_conv2d(weight: Tensor) -> Tensor:
    """(K, R, S, C / groups) int8 to the form that `conv2d_w8a8` and `conv2d_w4a8` multiply."""
    return products.pack(weight) if products.takes(weight) else pack_conv2d_of_groups(weight)


def pack_conv2d_of_groups(weight: Tensor) -> Tensor:
    """The same where `products` does not multiply it, as it does no weight of several groups."""
    if not self_check.is_exact():
        return widened.pack_conv2d(weight)
    return weight.permute(0, 3, 1, 2).contiguous().to_mkldnn()


def unpack_conv2d(packed: Tensor, outputs: int) -> Tensor:
    """The (K, R, S, C / groups) int8 that `pack_conv2d` packed, whatever its layout is by now; `outputs` is K."""
    if products.is_packed(packed):
        return products.unpack(packed, outputs)
    if packed.dtype == torch.float32:
        return widened.unpack_conv2d(packed, outputs)
    return packed.to_dense().permute(0, 2, 3, 1).contiguous()


@functools.cache
def _trim() -> Callable[[int], int]:
    """glibc's malloc_trim where there is one: the holes that old layouts leave go back to the system."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda _: 0


class _Holes:
    """Bytes of plain weights that were packed since their memory was last given back."""

    held = 0


def _trim_after(packed: int) -> None:
    """Give memory back from time to time: what comes next would have to get it anew from the system."""
    _Holes.held += packed
    if _Holes.held >= TRIMMED:
        _Holes.held = 0
        _trim()(0)


def lay_out_conv2d(
    packed: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    input_shape: torch.Size,
) -> None:
    """Block a packed convolution weight, in place, for inputs of `input_shape`, if no call has done so before.

    Later shapes keep the first one's blocks: they cost at most a reorder in each call.
    """
    if getattr(packed, "_ldmq_is_laid_out", False):
        return
    with _LAYING_OUT:  # no other thread computes with a weight that is not laid out
        if getattr(packed, "_ldmq_is_laid_out", False):
            return
        prepack = widened.prepack_conv2d if packed.dtype == torch.float32 else onednn.prepack_conv2d
        with torch.inference_mode(packed.is_inference()):
            packed.data = prepack(packed.to_dense(), stride, padding, dilation, groups, input_shape)
        _trim()(0)
        packed._ldmq_is_laid_out = True  # type: ignore[attr-defined]


def _packer(
    layout: str,
    pack: Callable[[Tensor], Tensor],
    unpack: Callable[[Tensor, int], Tensor],
    join: Callable[[Sequence[Tensor], Sequence[int]], Tensor | None] | None = None,
) -> Packer:
    """How the weight of a product is held; int4 ones are folded with their multipliers, which int8 holds exactly."""

    def packed(weight: Tensor, multiplier: Tensor | None, channels: int) -> Tensor:
        held = pack(weight if multiplier is None else fold_multiplier(unpack_int4(weight, channels), multiplier))
        _trim_after(weight.nbytes)
        return held

    def unpacked(tensor: Tensor, multiplier: Tensor | None, outputs: int) -> Tensor:
        integers = unpack(tensor, outputs)
        return integers if multiplier is None else pack_int4(divide_multiplier(integers, multiplier))

    return Packer(layout, is_packed, packed, unpacked, join)


@functools.cache
def packers() -> Mapping[str, Packer]:
    """How the weights of the products of quantized activations are held on this processor, by op."""
    layout = products.form() or ("oneDNN" if self_check.is_exact() else "float32")
    linear = _packer(layout, pack_linear, unpack_linear, join_linear)
    conv2d = _packer(layout, pack_conv2d, unpack_conv2d)
    linears = dict.fromkeys(("linear_w8a8", "linear_static_w8a8", "linear_geglu_w8a8", "linear_w4a8"), linear)
    convolutions = dict.fromkeys(("conv2d_w8a8", "conv2d_w4a8"), conv2d)
    float8 = {
        "linear_fp8": Packer(
            "float32",
            is_packed,
            lambda weight, *_: widened.pack_linear_float8(weight),
            lambda packed, *_: widened.unpack_linear_float8(packed),
        ),
        "conv2d_fp8": Packer(
            "float32",
            is_packed,
            lambda weight, *_: widened.pack_conv2d_float8(weight),
            lambda packed, *_: widened.unpack_conv2d_float8(packed),
        ),
    }
    return {**linears, **convolutions, **float8}
