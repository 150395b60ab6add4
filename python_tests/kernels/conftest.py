"""Every op is tested on every backend that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldmq_kernels.kernels.backend import backends
from python_tests.kernels.cuda.emulation import emulate
from python_tests.kernels.operands import Backend

HERE = Path(__file__).parent
ON_GPU = ("triton", "cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out ops that a backend does not have; mark the folders of what runs on a GPU."""
    for item in items:
        if item.path.parent in [HERE / backend for backend in ON_GPU]:
            item.add_marker(pytest.mark.gpu_kernels)

    def is_missing(item: pytest.Item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        op = parameters.get("op", item.path.stem.removeprefix("test_"))  # test_float8.py is of several
        is_op, name = backends()["reference"].has(op), parameters.get("backend")
        return is_op and name in ("cpu", "cuda") and not backends()[name].has(op)

    missing = [item for item in items if item.path.parent == HERE and is_missing(item)]
    if missing:
        config.hook.pytest_deselected(items=missing)
        items[:] = [item for item in items if item not in set(missing)]


def _check_interpreter() -> None:
    import triton.language as tl

    if type(tl.cdiv).__name__ != "InterpretedFunction":
        pytest.fail("triton was imported before TRITON_INTERPRET was set: set TRITON_INTERPRET=1 in the environment")


@pytest.fixture(params=["reference", "cpu", *(pytest.param(b, marks=pytest.mark.gpu_kernels) for b in ON_GPU)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """One backend and its device: Triton and CUDA take the GPU where there is one; elsewhere the interpreter and the
    emulator run them on the CPU.
    """
    on_gpu = request.param in ON_GPU and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if request.param == "cuda" and not on_gpu:
        emulate(monkeypatch)
    if not backends()[request.param].serves(device):
        pytest.skip(f"backend {request.param} does not serve {device} on this machine")
    if request.param == "triton" and not on_gpu:
        _check_interpreter()
    return Backend(request.param, device)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every torch.empty with NaN or the largest integer, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same operands in every run."""
    torch.manual_seed(0)
