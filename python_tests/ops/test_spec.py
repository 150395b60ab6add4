"""An op is one specification: every part is needed, and all that the package knows of an op is read from it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ldmq_kernels import ops
from ldmq_kernels.cli.checks import SHAPES
from ldmq_kernels.kernels.agreement import EXACT
from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.kernels.op_spec import LinearShape, OpSpec, spec_of, specs
from ldmq_kernels.ops.operands import Operands, example, of_tokens
from python_tests.kernels.operands import metadata

CPU = torch.device("cpu")


def toy_scale(x: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Scale the columns of x.

    Args:
        x: (..., N) floating.
        weight_scale: (N,) float32.
        bias: (N,) floating.

    Returns:
        (..., N) of x's dtype.
    """
    return x


TOY = OpSpec(toy_scale, lambda call: call.x, LinearShape(), EXACT, of_tokens)


def without(**changes: Any) -> OpSpec:
    """The toy's specification with other annotations or another docstring."""

    def toy_scale(x: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        return x

    toy_scale.__doc__ = TOY.function.__doc__
    for name, value in changes.items():
        setattr(toy_scale, name, value)
    return dataclasses.replace(TOY, function=toy_scale)


def test_a_whole_specification_is_accepted() -> None:
    TOY.check()
    assert TOY.schema == "toy_scale(Tensor x, Tensor weight_scale, Tensor? bias) -> Tensor"
    assert TOY.optional == {"bias"}


@pytest.mark.parametrize("part", ["fake", "shape", "agreement", "example"])
def test_a_missing_part_is_named_with_its_op(part: str) -> None:
    with pytest.raises(ValueError, match=f"the specification of toy_scale has no {part}"):
        dataclasses.replace(TOY, **{part: None}).check()


@pytest.mark.parametrize("name", ["x", "weight_scale", "bias", "return"])
def test_a_missing_annotation_is_named_with_its_op(name: str) -> None:
    annotations = {key: value for key, value in TOY.function.__annotations__.items() if key != name}
    with pytest.raises(ValueError, match="toy_scale: " + ("its result" if name == "return" else name)):
        without(__annotations__=annotations).check()


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        (None, "x, weight_scale, bias"),
        ("Scale.\n\nArgs:\n    x: it.\n    bias: it.\n\nReturns:\n    y.", "weight_scale"),
    ],
)
def test_what_the_docstring_leaves_out_is_named_with_its_op(docstring: str | None, missing: str) -> None:
    with pytest.raises(ValueError, match=f"the docstring of toy_scale does not describe {missing}"):
        without(__doc__=docstring).check()


def test_a_shape_that_asks_for_another_argument_is_named_with_its_op() -> None:
    with pytest.raises(ValueError, match="the shape of toy_scale does not fit"):
        dataclasses.replace(TOY, shape=LinearShape("columns")).check()


def test_an_example_that_does_not_know_an_argument_is_named_with_its_op() -> None:
    def toy_scale(x: Tensor, wondrous: Tensor) -> Tensor:
        return x

    spec = dataclasses.replace(TOY, function=toy_scale)
    with pytest.raises(ValueError, match="the example of toy_scale must say what wondrous is"):
        spec.example(spec, Operands(CPU, torch.float32, SHAPES[0]))


@pytest.mark.parametrize("op", list(specs()))
def test_every_op_is_a_typed_function_that_calls_its_overload(op: str) -> None:
    spec, function = spec_of(op), getattr(ops, op)
    spec.check()
    assert spec.function is inspect.unwrap(function)
    assert inspect.signature(function).return_annotation in ("Tensor", "tuple[Tensor, Tensor]")
    schema = getattr(torch.ops.ldmq, op).default._schema
    assert [argument.name for argument in schema.arguments] == spec.arguments
    assert str(schema).replace("ldmq::", "") == str(torch._C.parse_schema(spec.schema))


@pytest.mark.parametrize("op", list(specs()))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.tokens}x{shape.channels}x{shape.out}")
def test_fake_agreement_and_shape_hold_for_every_example(op: str, shape: Any) -> None:
    spec, arguments = spec_of(op), example(op, shape, CPU, torch.float32)  # where a CPU's producers round once
    expected = getattr(backends()["reference"], op)(*arguments)
    result = getattr(ops, op)(*arguments)
    assert not spec.agreement.difference(result, expected)
    with FakeTensorMode() as mode:
        promised = getattr(ops, op)(*tree_map_only(Tensor, mode.from_tensor, arguments))
    assert tree_map_only(Tensor, metadata, result) == tree_map_only(Tensor, metadata, promised)
    rows = {name: value for name, value in zip(spec.arguments, arguments, strict=True) if value is None}
    assert set(rows) <= spec.optional
    assert spec.shape_text(arguments)


def test_results_that_are_further_apart_than_an_op_allows_are_told() -> None:
    scale = torch.ones(3)
    near = torch.tensor([1, 2, 3], dtype=torch.int8), scale
    next_step = torch.tensor([1, 3, 3], dtype=torch.int8), scale
    assert not spec_of("silu_quantize").agreement.difference(next_step, near)
    assert "differs by up to 1, 0 is allowed" in spec_of("quantize_per_token").agreement.difference(next_step, near)


def test_no_op_is_listed_beside_its_specification() -> None:
    """An op that a backend has is specified, and its definition is in the reference."""
    assert all(backends()["reference"].has(op) for op in specs())
