"""The tensors that a quantized layer keeps in a checkpoint, and what they may hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.numerics import affine
from ldmq_kernels.numerics.formats import Scheme

FLOAT32_BUFFERS = ("weight_scale", "group_scale", "input_scale", "smoothing")
BUFFERS = ("weight", "multiplier", *FLOAT32_BUFFERS)


def check_stored(scheme: Scheme, name: str, stored: Tensor | None) -> None:
    """Refuse a tensor that a layer of this scheme never stores; None and meta tensors hold nothing to check.

    Args:
        scheme: the layer's.
        name: one of BUFFERS.
        stored: its tensor in a checkpoint.

    Raises:
        ValueError: it has another dtype, a scale is not finite and positive, or integers are out of range.
    """
    if stored is None or stored.is_meta:
        return
    four_bit = scheme.format.weight_bits == 4
    integers = {"weight": torch.uint8 if four_bit else torch.int8, "multiplier": torch.uint8}
    expected = integers.get(name, torch.float32)
    if stored.dtype != expected:
        raise ValueError(f"{name} is {stored.dtype}, {expected} is needed: is this a checkpoint of another plan?")
    if name in FLOAT32_BUFFERS:
        wrong, accepted = ~(torch.isfinite(stored) & (stored > 0)), "finite and positive"
    elif name == "multiplier":
        wrong, accepted = (stored < 1) | (stored > affine.MULTIPLIER_MAX), f"in 1..{affine.MULTIPLIER_MAX}"
    elif four_bit:
        wrong, accepted = ((stored & 0xF) == 8) | ((stored >> 4) == 8), "a pair of int4 in [-7, 7]"
    else:
        wrong, accepted = stored == -128, "in [-127, 127]"
    if bool(wrong.any()):
        raise ValueError(f"{name} holds a value that is not {accepted}: the checkpoint is damaged")
