"""`ldmq doctor` lets kernels be launched early where results are equal and it is not slower, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldmq_kernels.cli import early_launches
from ldmq_kernels.kernels import dependent_launch, measurements
from ldmq_kernels.kernels.dependent_launch import is_on
from ldmq_kernels.kernels.gpu import Gpu
from ldmq_kernels.timing import Samples

GPU = torch.device("cuda", 0)


class Machine:
    """A GPU that is not there: what its kernels give early, how long they take so, and what a recording does."""

    def __init__(self) -> None:
        self.capability = 90
        self.early_result, self.early_ms = 1.0, 0.8
        self.recording_fails = False

    def chain(self, device: torch.device) -> early_launches.Chain:
        return lambda: (torch.tensor([self.early_result if is_on(device) else 1.0]),)

    def recorded(self, call: early_launches.Chain) -> early_launches.Chain:
        if self.recording_fails:
            raise RuntimeError("CUDA error: invalid resource handle")
        outputs = call()
        return lambda: outputs

    def interleaved(self, calls: dict[bool, Any], _: torch.device) -> dict[bool, Samples]:
        assert list(calls) == [False, True]
        return {early: Samples((self.early_ms if early else 1.0,)) for early in calls}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path))
    monkeypatch.delenv("LDMQ_PDL", raising=False)
    monkeypatch.setattr(measurements, "SHIPPED", tmp_path / "shipped")
    for module in (measurements, dependent_launch, early_launches):
        monkeypatch.setattr(module, "gpu_of", lambda _: Gpu("NVIDIA H200", made.capability, 132))
    for name in ("chain", "recorded", "interleaved"):
        monkeypatch.setattr(early_launches, name, getattr(made, name))
    measurements.forget()
    return made


def test_equal_and_faster_switches_it_on_until_it_is_found_to_be_slower(machine: Machine) -> None:
    assert not is_on(GPU)
    assert "are launched before" in (line := early_launches.check_early_launches(GPU))
    assert "1.25x as fast" in line
    assert is_on(GPU)
    machine.early_ms = 1.1
    assert "are not launched before" in early_launches.check_early_launches(GPU)
    assert not is_on(GPU)


@pytest.mark.parametrize("wrong", ["other results", "a recording that fails"])
def test_what_is_not_right_switches_it_off(machine: Machine, wrong: str) -> None:
    measurements.launch_early(GPU, True, "found before")
    assert is_on(GPU)
    machine.early_result, machine.recording_fails = (2.0, False) if wrong == "other results" else (1.0, True)
    told = "results with dependent launches differ eagerly" if wrong == "other results" else "invalid resource handle"
    assert told in early_launches.check_early_launches(GPU)
    assert not is_on(GPU)


def test_older_gpus_are_not_asked(machine: Machine) -> None:
    machine.capability = 89
    assert early_launches.check_early_launches(GPU) == ""
    assert not measurements.user_file(GPU).exists()
    with dependent_launch.dependent_launches(True):
        assert not is_on(GPU)


def test_another_version_has_to_find_out_for_itself(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements.launch_early(GPU, True, "equal, and faster")
    assert is_on(GPU)
    monkeypatch.setattr(measurements, "__version__", "99")
    measurements.forget()
    assert not is_on(GPU)


def test_the_environment_overrides_what_was_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMQ_PDL", "1")
    assert is_on(GPU)
    measurements.launch_early(GPU, True, "equal, and faster")
    monkeypatch.setenv("LDMQ_PDL", "0")
    assert not is_on(GPU)
    monkeypatch.setenv("LDMQ_PDL", "yes")
    with pytest.raises(ValueError, match="LDMQ_PDL is 'yes', must be 0 or 1"):
        is_on(GPU)


def test_the_chain_needs_what_each_of_its_ops_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, in small: an op that gives zeros changes the outputs, whichever it is."""
    for name, small in {"ROWS": 16, "CHANNELS": 32, "HIDDEN": 64, "SIZE": 4, "LAYERS": 1}.items():
        monkeypatch.setattr(early_launches, name, small)
    expected = early_launches.chain(torch.device("cpu"))()
    assert all(out.float().isfinite().all() and out.abs().max() > 0 for out in expected)
    run = early_launches.chain(torch.device("cpu"))
    names = ("layer_norm_quantize", "linear_w8a8", "gelu_quantize", "group_norm_silu_quantize", "conv2d_w8a8")
    for name in (*names, "quantize_per_sample"):
        original = getattr(early_launches.ops, name)

        def zeros(*arguments: Any, original: Any = original) -> Any:
            found = original(*arguments)
            return (found[0] * 0, found[1]) if isinstance(found, tuple) else found * 0

        with monkeypatch.context() as patch:
            patch.setattr(early_launches.ops, name, zeros)
            assert not all(map(torch.equal, run(), expected)), name
