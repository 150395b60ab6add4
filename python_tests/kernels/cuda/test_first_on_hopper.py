"""The extension is offered calls before Triton on compute capability 9.0, and nowhere else without a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import usual_order
from ldmq_kernels.kernels.cuda import backend as cuda_backend
from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.gpu import Gpu
from ldmq_kernels.kernels.triton import backend as triton_backend
from ldmq_kernels.tuning.compare_backends import compared_backends

GPU = torch.device("cuda", 0)
OP = "linear_w8a8"
PREBUILT = "80;86;89;90a"
CUDA_FIRST, TRITON_FIRST = ("cuda", "triton", "reference"), ("triton", "reference")
Pretend = Callable[[str, tuple[int, int]], None]


class OnGpu(SimpleNamespace):
    """What the choice of a backend looks at of a tensor on a GPU."""

    def __init__(self, *shape: int) -> None:
        super().__init__(shape=torch.Size(shape), device=GPU, requires_grad=False)


def served_by(rows: int) -> str:
    """Who serves a linear of 64 to 40 channels."""
    arguments = OnGpu(rows, 64), OnGpu(1), OnGpu(40, 64), OnGpu(40), None, None, torch.float16
    return dispatch.server(OP)(*arguments)


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """An extension built for some architectures, a GPU of some capability, and two backends that give their names."""
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path))
    monkeypatch.setattr(measurements, "gpu_of", lambda _: Gpu("NVIDIA H200", 90, 132))
    for backend, name in ((triton_backend, "triton"), (cuda_backend, "cuda")):
        monkeypatch.setitem(vars(backend), "serves", lambda device: device.type == "cuda")
        monkeypatch.setitem(vars(backend), OP, lambda *_, name=name: name)

    def built(architectures: str, capability: tuple[int, int]) -> None:
        module = SimpleNamespace(architectures=lambda: architectures, versions=lambda: (13000, 13000))
        monkeypatch.setattr(extension, "load", lambda: module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        measurements.forget()

    yield built
    measurements.forget()
    measurements.warn_once.cache_clear()
    dispatch.reset_dispatch_report()


@pytest.mark.parametrize(
    ("architectures", "capability", "order"),
    [
        (PREBUILT, (9, 0), CUDA_FIRST),
        ("90a", (9, 0), CUDA_FIRST),
        ("80", (9, 0), TRITON_FIRST),  # it has mma.sync's tiles alone for this GPU
        (PREBUILT, (8, 0), TRITON_FIRST),
        (PREBUILT, (8, 9), TRITON_FIRST),
        (PREBUILT, (10, 0), TRITON_FIRST),
    ],
)
def test_the_order_follows_the_gpu_and_what_was_built(
    pretend: Pretend, architectures: str, capability: tuple[int, int], order: tuple[str, ...]
) -> None:
    pretend(architectures, capability)
    assert usual_order(GPU) == order
    assert served_by(34) == order[0]
    assert next(iter(compared_backends(OP, GPU))).name == order[0]


def test_a_measurement_takes_its_shape_and_the_doctor_the_op(pretend: Pretend, tmp_path: Path) -> None:
    line = {"backend": "triton", "milliseconds": {"triton": 0.05, "cuda": 0.06}}
    content = {"tiles": {}, "backends": {OP: {"34x64 to 40": line}}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(content))
    pretend(PREBUILT, (9, 0))
    assert (served_by(34), served_by(36)) == ("triton", "cuda")
    measurements.switch_off(OP, "cuda", GPU, "differs")
    with pytest.warns(UserWarning, match="switched off"):
        assert served_by(36) == "triton"


def test_what_the_extension_refuses_or_a_driver_cannot_run_is_tritons(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise dispatch.Unsupported("no gate")

    pretend(PREBUILT, (9, 0))
    monkeypatch.setitem(vars(cuda_backend), OP, refuse)
    assert served_by(34) == "triton"
    monkeypatch.setitem(vars(cuda_backend), "serves", lambda _: False)
    assert usual_order(GPU) == TRITON_FIRST
