"""Ops that round refuse gradients in words; layers pass them on, see `python_tests/nn/test_straight_through.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmq_kernels import ops
from ldmq_kernels.kernels.dispatch import dispatch_report, reset_dispatch_report
from ldmq_kernels.ops import specs
from ldmq_kernels.ops.operands import Shape, example

ROUNDING = [name for name, spec in specs().items() if spec.rounds]
REFUSED = r"rounds and has no backward pass.*torch\.no_grad\(\).*QuantLinear"


def operands(op: str) -> list[Any]:
    shape = Shape(tokens=3, channels=8, out=4, picture=(1, 3, 3), options=specs()[op].optional - {"q_dtype"})
    return list(example(op, shape, torch.device("cpu"), torch.float32))


def test_the_ops_that_have_gradients_are_those_of_floating_activations() -> None:
    assert set(specs()) - set(ROUNDING) == {"linear_w8a16", "linear_w4a16", "conv2d_w8a16"}


@pytest.mark.parametrize("op", ROUNDING)
def test_an_op_that_rounds_refuses_an_activation_that_requires_gradients(op: str) -> None:
    call = getattr(ops, op)
    for index, name in enumerate(specs()[op].arguments):
        arguments = operands(op)
        if index not in specs()[op].floating or arguments[index] is None:
            continue
        with torch.no_grad():
            wanted = call(*arguments)
        arguments[index].requires_grad_()
        with torch.no_grad():
            torch.testing.assert_close(call(*arguments), wanted, rtol=0, atol=0)
        if name == "bias" and "out_inv_scale" not in specs()[op].arguments:
            out = call(*arguments)
            assert torch.equal(out, wanted)
            with pytest.raises(RuntimeError, match=f"ldmq::{op} {REFUSED}"):
                out.sum().backward()
        else:
            with pytest.raises(RuntimeError, match=f"ldmq::{op} {REFUSED}"):
                call(*arguments)


@pytest.mark.parametrize("op", sorted(set(specs()) - set(ROUNDING)))
def test_a_differentiated_op_on_stored_weights_is_computed_by_the_definition(op: str) -> None:
    arguments = operands(op)
    arguments[0].requires_grad_()
    reset_dispatch_report()
    assert getattr(ops, op)(*arguments).requires_grad
    assert dispatch_report().split()[:2] == [op, "reference"]
