"""Defines an op from its specification: schema, implementation by dispatch and fake kernel in torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ldmq_kernels.kernels import dispatch, gradients, op_spec
from ldmq_kernels.kernels.agreement import EXACT, Agreement
from ldmq_kernels.kernels.op_spec import Arguments, CallShape, OpSpec
from ldmq_kernels.tracing import is_compiled, is_plain

_LIBRARY = torch.library.Library("ldmq", "DEF")
LDMQ = torch.ops.ldmq
AUTOCAST = ("AutocastCPU", "AutocastCUDA")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

Function = TypeVar("Function", bound=Callable[..., Any])


def _without_autocast(op: str, key: str) -> Callable[..., Any]:
    """The op with autocast off inside it: what a backend computes in float32 would be rounded and overflow."""
    autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return getattr(LDMQ, op).default(*arguments)

    return call


def _fake(spec: OpSpec, arguments: Arguments) -> Any:
    """The result's metadata, for calls without gradients: what a compiler traces has none."""
    if is_compiled() and torch.is_grad_enabled() and gradients.needed(spec, arguments):
        gradients.refuse_compiled(spec)
    return spec.fake(spec.call(*arguments))


def define_plain(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op of one implementation, which computes what torch has a function for, too.

    Args:
        schema: as torch.library takes it.
        function: the implementation, on any device; what it computes in torch is differentiated as such.
        fake: the result's metadata for the same arguments.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"ldmq::{name}", fake, lib=_LIBRARY)


def _direct(spec: OpSpec, function: Function, serve: Callable[..., Any]) -> Function:
    """The op's function; it passes torch's dispatcher by, which takes time, where that would do no more than call."""
    types, least = spec.types, len(spec.arguments) - len(spec.may_be_left_out)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or named or len(arguments) < least or not is_plain():
            return function(*arguments, **named)
        for argument, accepted in zip(arguments, types, strict=False):
            if type(argument) not in accepted:
                return function(*arguments)
        if len(arguments) > len(types) or arguments[0].is_meta:
            return function(*arguments)
        return serve(*arguments)

    return call  # type: ignore[return-value]


def op(
    *,
    fake: Callable[[Any], Any],
    shape: CallShape,
    example: Callable[[OpSpec, Any], tuple[Any, ...]],
    agreement: Agreement = EXACT,
    rounds: bool = True,
    operand_dtype: torch.dtype = torch.int8,
) -> Callable[[Function], Function]:
    """Define an op: a decorator of the typed function that calls it.

    Args:
        fake: (call) -> the result's metadata, the call's arguments being attributes.
        shape: what makes two calls the same shape.
        example: (spec, operands) -> arguments.
        agreement: how near backends' results must come to each other.
        rounds: whether it rounds activations or takes rounded ones, and so has no gradients.
        operand_dtype: of the quantized activations and of the 8-bit weight that it takes.

    Raises:
        ValueError: the specification is not whole; the text names the op and the part.
    """

    def define(function: Function) -> Function:
        spec = OpSpec(function, fake, shape, agreement, example, rounds, operand_dtype)
        op_spec.register(spec)
        _LIBRARY.define(spec.schema, tags=_TAGS)
        serve = dispatch.server(spec.name)
        _LIBRARY.impl(spec.name, serve, "CompositeExplicitAutograd")
        # what a backend computes in torch is differentiated as such; `gradients` refuses the rest
        _LIBRARY.impl(spec.name, torch.library.fallthrough_kernel, "Autograd")
        for key in AUTOCAST:
            _LIBRARY.impl(spec.name, _without_autocast(spec.name, key), key)
        torch.library.register_fake(f"ldmq::{spec.name}", lambda *a: _fake(spec, a), lib=_LIBRARY)
        return _direct(spec, function, serve)

    return define
