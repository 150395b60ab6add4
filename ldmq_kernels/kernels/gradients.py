"""Gradients of the ops: of those that only store weights in few bits, the definition's; of those that round, none.

A rounded activation passes no gradient on, and an int8 tensor cannot say that one was lost. So an op that rounds
refuses an input that requires gradients. A bias that does is taken where the output is floating, as layers whose bias
is trainable are called for inference too, and the backward pass refuses it. Layers pass gradients straight through
(`nn.straight_through`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels.op_spec import Arguments, OpSpec

REMEDY = (
    "call it under torch.no_grad(), detach the input, or call a QuantLinear or QuantConv2d, which passes gradients "
    "straight through to its input"
)


def needed(spec: OpSpec, arguments: Arguments) -> list[Tensor]:
    """The arguments that require gradients."""
    given = (arguments[index] for index in spec.floating if index < len(arguments))
    return [tensor for tensor in given if tensor is not None and tensor.requires_grad]


def check(spec: OpSpec, arguments: Arguments) -> None:
    """Accept for an op that rounds that its bias requires gradients, unless it quantizes its output; nothing else.

    Raises:
        RuntimeError: a gradient would have to pass the rounding: an activation requires it.
    """
    bias = arguments[spec.arguments.index("bias")] if "bias" in spec.arguments else None
    if "out_inv_scale" in spec.arguments and arguments[spec.arguments.index("out_inv_scale")] is not None:
        bias = None
    if any(tensor is not bias for tensor in needed(spec, arguments)):
        raise RuntimeError(_text(spec))


def refusing(spec: OpSpec, compute: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """The result of an op, which raises when it is differentiated."""
    return _Refused.apply(spec, compute, *arguments)


def refuse_compiled(spec: OpSpec) -> None:
    """Refuse gradients under torch.compile.

    Raises:
        RuntimeError: always.
    """
    if spec.rounds:
        raise RuntimeError(_text(spec))
    raise RuntimeError(f"ldmq::{spec.name} has gradients in eager mode only: do not compile what is trained")


def _text(spec: OpSpec) -> str:
    return f"ldmq::{spec.name} rounds and has no backward pass, and an input of it requires gradients: {REMEDY}"


class _Refused(torch.autograd.Function):
    """The call of an op whose backward pass is an error."""

    @staticmethod
    def forward(ctx: Any, spec: OpSpec, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Compute, which torch does without gradients here."""
        ctx.spec = spec
        return compute(*arguments)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(_text(ctx.spec))
