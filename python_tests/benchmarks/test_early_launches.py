"""Early launches are proved and measured: a row for each backend whatever happens, and a form of each model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_run import early_launches
from benchmarks.harness import machine
from benchmarks.models import gpu
from benchmarks.models.definitions import TOYS
from ldmq_kernels.kernels import dependent_launch, dispatch
from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.kernels.dependent_launch import dependent_launches
from ldmq_kernels.kernels.gpu import Gpu

GPU = torch.device("cuda", 0)
HUNG = RuntimeError("compare did not end within 28 s")


def row(outcome: str, **more: Any) -> dict[str, Any]:
    return {"outcome": outcome, "detail": "", **more}


@pytest.mark.parametrize(
    ("by_triton", "by_cuda", "noted", "code"),
    [
        (row("ok", gain=1.25), row("ok", gain=1.08), ("", 1.08), 0),
        (row("ok", gain=1.25), row("missing"), ("", 1.25), 0),
        (row("ok", gain=1.25), row("wrong", detail="they differ"), ("wrong: they differ, by cuda", 0.0), 1),
        (HUNG, row("ok", gain=1.1), (f"failed: {HUNG}, early launches by triton", 0.0), 1),
        (row("missing"), row("missing"), None, 1),
    ],
)
def test_each_backend_has_a_row_and_both_have_to_be_right(
    by_triton: Any,
    by_cuda: Any,
    noted: tuple[str, float] | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends, notes = {"triton": by_triton, "cuda": by_cuda}, list[tuple[str, float]]()

    def in_child(_: Callable[..., Any], backend: str, seconds: float) -> dict[str, Any]:
        assert 2 * seconds < 60  # the job's limit
        if isinstance(ends[backend], Exception):
            raise ends[backend]
        return {"name": f"by {backend}"} | ends[backend]

    def note(_: torch.device, problem: str, gain: float) -> str:
        notes.append((problem, gain))
        return ""

    monkeypatch.setattr(early_launches, "in_child", in_child)
    monkeypatch.setattr(early_launches, "note", note)
    rows = tmp_path / "rows.jsonl"
    assert early_launches.main(["--rows", str(rows)]) == code
    assert notes == ([] if noted is None else [noted])
    found = [json.loads(line)["row"]["outcome"] for line in rows.read_text().splitlines()]
    assert found == [end["outcome"] if isinstance(end, dict) else "failed" for end in (by_triton, by_cuda)]


@pytest.mark.slow
def test_without_a_gpu_both_are_missing_and_say_why(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert early_launches.main(["--device", "cpu", "--rows", str(rows)]) == 1
    found = [json.loads(line)["row"] for line in rows.read_text().splitlines()]
    assert [one["outcome"] for one in found] == ["missing", "missing"]
    assert all(one["detail"] for one in found)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("problem", ["", "results differ eagerly"])
def test_a_backend_is_offered_the_chain_where_the_device_has_early_launches(
    capability: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = []

    def compared(call: Callable[[], str], on: torch.device) -> tuple[str, float]:
        offered.append((call(), on))
        return problem, 0.0 if problem else 1.2345

    monkeypatch.setattr(machine, "device", lambda: GPU)
    monkeypatch.setattr(backends()["cuda"], "serves", lambda _: True)
    monkeypatch.setattr(early_launches, "gpu_of", lambda _: Gpu("NVIDIA H200", capability, 132))
    monkeypatch.setattr(early_launches, "chain", lambda _: lambda: dispatch.usual_order(GPU)[0])
    monkeypatch.setattr(early_launches, "compared", compared)
    monkeypatch.setattr(early_launches, "served", lambda _: {"linear_w8a8": {"cuda": 16}})
    found = early_launches.compare("cuda")
    if capability < 90:
        assert (found["outcome"], offered) == ("missing", [])
        return
    assert offered == [("cuda", GPU)]
    assert found["outcome"] == ("wrong" if problem else "ok")
    assert found.get("gain") == (None if problem else 1.234)
    assert problem == found["detail"]


@pytest.mark.parametrize("is_on", [True, False])
def test_a_model_is_measured_without_early_launches_beside_a_graph_with_them(
    is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms are captured by their own first call."""
    monkeypatch.setattr(dependent_launch, "gpu_of", lambda _: Gpu("NVIDIA H200", 90, 132))
    monkeypatch.setattr(gpu.ldmq, "capture", lambda module: module)
    seen: dict[str, bool] = {}

    def caller(module: torch.nn.Module, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        return lambda: torch.tensor(dependent_launch.is_on(GPU))

    monkeypatch.setattr(gpu, "caller", caller)
    with dependent_launches(is_on):
        forms = gpu.plain_forms(torch.nn.Identity(), torch.nn.Identity(), {}, on_gpu=True)
        seen = {name: bool(call()) for name, call in forms.items()}
    assert (gpu.LATE in seen) == is_on
    assert seen["ldmq_graph"] == is_on
    assert not seen.get(gpu.LATE, False)


def test_a_models_summary_has_what_early_launches_gain() -> None:
    (measured,) = gpu.measure("sd15", TOYS["sd15"], torch.float32, rounds=1)
    ms = {"eager_fp16": 3.0, "ldmq_eager": 2.0, "ldmq_graph": 1.6, gpu.LATE: 1.5}
    summary = gpu.summary(measured | {"ms": ms})
    assert summary["unet_sd15/early_launches"] == 1.5 / 1.6
    assert summary["unet_sd15/ms"] == 1.6  # a form that no user gets
    assert "unet_sd15/early_launches" not in measured["summary"]
