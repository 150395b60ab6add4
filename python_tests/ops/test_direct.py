"""An op's function passes torch's dispatcher by, unless somebody there has a part in the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldmq_kernels import ops
from ldmq_kernels.cli.checks import SHAPES
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.op_spec import specs
from ldmq_kernels.ops.operands import example

CPU = torch.device("cpu")


def arguments_of(op: str) -> tuple[Any, ...]:
    return example(op, SHAPES[0], CPU, torch.float32)


class Seen(TorchDispatchMode):
    """Names of the ops that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.fixture
def through_dispatcher(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops whose calls the dispatcher gets."""
    seen: list[str] = []
    original = torch._ops.OpOverload.__call__

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.name())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", call)
    return seen


@pytest.mark.parametrize("op", list(specs()))
def test_a_plain_call_is_the_dispatchers_to_the_bit(op: str, through_dispatcher: list[str]) -> None:
    arguments = arguments_of(op)
    direct = flat(getattr(ops, op)(*arguments))
    assert f"ldmq::{op}" not in through_dispatcher
    called = flat(getattr(torch.ops.ldmq, op).default(*arguments))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(direct, called, strict=True))
    assert [a.stride() for a in direct] == [b.stride() for b in called]


def test_a_mode_of_torch_sees_the_op() -> None:
    arguments = arguments_of("linear_w8a8")
    with Seen() as seen:
        ops.linear_w8a8(*arguments)
    assert "ldmq::linear_w8a8" in seen.names

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Functions():
        ops.linear_w8a8(*arguments)
    assert "ldmq.linear_w8a8.default" in names


def test_a_profiler_sees_the_op() -> None:
    arguments = arguments_of("linear_w8a8")
    with torch.profiler.profile() as profile:
        ops.linear_w8a8(*arguments)
    assert "ldmq::linear_w8a8" in {event.name for event in profile.events()}


@pytest.mark.parametrize("change", ["autocast", "vmap", "subclass", "meta", "named"])
def test_the_dispatcher_gets_what_is_not_plain(change: str, through_dispatcher: list[str]) -> None:
    arguments = arguments_of("quantize_per_token")
    x, *rest = arguments
    op = ops.quantize_per_token
    if change == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            op(*arguments)
    elif change == "vmap":
        by_row = torch.vmap(lambda row: op(row, *rest))(x)
        assert all(
            torch.equal(a, b) for a, b in zip(by_row, torch.ops.ldmq.quantize_per_token(*arguments), strict=True)
        )
    elif change == "subclass":
        op(torch.nn.Buffer(x).as_subclass(type("Own", (Tensor,), {})), *rest)
    elif change == "meta":
        assert op(x.to("meta"), *rest)[0].is_meta
    else:
        op(x, *rest[:-1], **{specs()["quantize_per_token"].arguments[len(rest)]: rest[-1]})
    assert "ldmq::quantize_per_token" in through_dispatcher


@pytest.mark.parametrize(("place", "wrong"), [(1, 0.5), (4, "none"), (6, "float32")])
def test_an_argument_of_another_type_is_refused_by_the_dispatcher(place: int, wrong: Any) -> None:
    arguments = list(arguments_of("linear_w8a8"))
    arguments[place] = wrong
    with pytest.raises((RuntimeError, TypeError), match=r"linear_w8a8\(\) expected|Expected a value of type"):
        ops.linear_w8a8(*arguments)
    with pytest.raises((RuntimeError, TypeError)):
        ops.linear_w8a8(*arguments[:4])


def test_calls_are_counted_either_way() -> None:
    dispatch.reset_dispatch_report()
    ops.linear_w8a8(*arguments_of("linear_w8a8"))
    torch.ops.ldmq.linear_w8a8.default(*arguments_of("linear_w8a8"))
    assert sum(count for (op, _), count in dispatch.calls_by_backend().items() if op == "linear_w8a8") == 2
