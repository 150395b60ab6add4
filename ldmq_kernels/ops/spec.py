"""Defines an op from its specification: schema, implementation by dispatch and fake kernel in torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ldmq_kernels.kernels import dispatch, op_spec
from ldmq_kernels.kernels.agreement import EXACT, Agreement
from ldmq_kernels.kernels.op_spec import CallShape, OpSpec

_LIBRARY = torch.library.Library("ldmq", "DEF")
LDMQ = torch.ops.ldmq
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

Function = TypeVar("Function", bound=Callable[..., Any])


def op(
    *,
    fake: Callable[[Any], Any],
    shape: CallShape,
    example: Callable[[OpSpec, Any], tuple[Any, ...]],
    agreement: Agreement = EXACT,
) -> Callable[[Function], Function]:
    """Define an op: a decorator of the typed function that calls it.

    Args:
        fake: (call) -> the result's metadata, the call's arguments being attributes.
        shape: what makes two calls the same shape.
        example: (spec, operands) -> arguments.
        agreement: how near backends' results must come to each other.

    Raises:
        ValueError: the specification is not whole; the text names the op and the part.
    """

    def define(function: Function) -> Function:
        spec = OpSpec(function, fake, shape, agreement, example)
        op_spec.register(spec)
        _LIBRARY.define(spec.schema, tags=_TAGS)
        _LIBRARY.impl(spec.name, dispatch.server(spec.name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ldmq::{spec.name}", lambda *a: spec.fake(spec.call(*a)), lib=_LIBRARY)
        return function

    return define
