"""A compiler that traces one thread's call is no business of the others, though torch's own flag is up in all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldmq_kernels
from ldmq_kernels import tracing

PACKAGE = Path(ldmq_kernels.__file__).parent


HERE: list[bool] = []  # what a traced call was told, and what another thread was told meanwhile
ELSEWHERE: list[bool] = []


class Told(nn.Module):
    """Adds 1 where its call is traced, and fills the lists."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            self.ask()
        return x + 1 if torch.compiler.is_dynamo_compiling() or tracing.is_exported() else x

    @torch.compiler.assume_constant_result
    def ask(self) -> None:
        def answer(told: list[bool]) -> None:
            told += [torch.compiler.is_compiling(), tracing.is_compiled(), tracing.is_exported()]

        answer(HERE)
        other = threading.Thread(target=answer, args=(ELSEWHERE,))
        other.start()
        other.join()


def compiled(module: Told) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)


def exported(module: Told) -> Callable[..., Tensor]:
    return torch.export.export(module, (torch.zeros(1),), strict=False).module()


def test_no_call_is_traced_without_a_compiler() -> None:
    assert Told()(torch.zeros(1)).item() == 0
    assert not tracing.is_compiled()
    assert not tracing.is_exported()


@pytest.mark.slow
@pytest.mark.parametrize(("trace", "is_export"), [(compiled, False), (exported, True)])
def test_a_compiler_traces_its_thread_alone(trace: Callable[[Told], Callable[..., Tensor]], is_export: bool) -> None:
    HERE.clear()
    ELSEWHERE.clear()
    assert trace(Told())(torch.zeros(1)).item() == 1
    assert HERE[:3] == [True, True, is_export]
    assert ELSEWHERE[:3] == [True, False, False]
    assert Told()(torch.zeros(1)).item() == 0


def test_nothing_else_asks_torch_whether_any_thread_compiles() -> None:
    asking = [path.name for path in PACKAGE.rglob("*.py") if "compiler.is_compiling() " in path.read_text()]
    assert asking == ["tracing.py"]
