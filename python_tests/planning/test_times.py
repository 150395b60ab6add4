"""Layers are timed on the shapes that they really have, equal ones once, and times are kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.kernels import measurements
from ldmq_kernels.planning import times as layer_times
from ldmq_kernels.planning.times import ROUNDS, WARM_UP, cache_file, measure_times
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import PlanError
from ldmq_kernels.sensitivity.analysis import Analysis
from python_tests.report.analyses import TRIED, made_up_analysis
from python_tests.tiny import run_unet, tiny_unet, unet_inputs

SCHEMES = ("fp16", *TRIED)


class Clock:
    """Runs each work and calls it a millisecond longer than the one before; counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, work: Callable[[], Any], _device: torch.device) -> float:
        work()
        self.calls += 1
        return float(self.calls)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def analysis(unet: nn.Module) -> Analysis:
    return made_up_analysis(unet)


@pytest.fixture(scope="module")
def call(unet: nn.Module) -> UNetCall:
    return UNetCall(0, (), unet_inputs(), run_unet(unet))


def test_every_layer_has_a_time_in_every_scheme_and_equal_shapes_one(
    unet: nn.Module, analysis: Analysis, call: UNetCall, tmp_path: Path
) -> None:
    clock = Clock()
    found = measure_times(unet, analysis, call, path=tmp_path / "times.json", timer=clock)
    names = list(quantizable_layers(unet))
    assert set(found.layers) == {(name, scheme) for name in names for scheme in SCHEMES}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert found.layers[f"{block}.attn1.to_q", "w8a16"] == found.layers[f"{block}.attn1.to_k", "w8a16"]
    assert found.layers[f"{block}.attn1.to_q", "w8a16"] != found.layers[f"{block}.attn1.to_q", "fp16"]
    assert found.layers[f"{block}.attn1.to_k", "fp16"] != found.layers[f"{block}.attn2.to_k", "fp16"]
    rounds = WARM_UP + ROUNDS
    kept = json.loads((tmp_path / "times.json").read_text())["milliseconds"]
    assert clock.calls == rounds * (len(kept) + 1)
    assert len(kept) < len(found.layers) / 2
    assert found.rest >= 0


def test_times_are_kept_and_only_what_is_missing_is_measured(
    unet: nn.Module, analysis: Analysis, call: UNetCall, tmp_path: Path
) -> None:
    path = tmp_path / "times.json"
    first = measure_times(unet, analysis, call, path=path, timer=Clock())
    content = json.loads(path.read_text())
    dropped = next(key for key in content["milliseconds"] if key.endswith("w8a16"))
    del content["milliseconds"][dropped]
    path.write_text(json.dumps(content))
    clock = Clock()
    again = measure_times(unet, analysis, call, path=path, timer=clock)
    assert clock.calls == 2 * (WARM_UP + ROUNDS)
    assert sum(first.layers[key] != again.layers[key] for key in first.layers) >= 1
    assert all(first.layers[key] == again.layers[key] for key in first.layers if key[1] != "w8a16")


@pytest.mark.parametrize("spoil", ["other version", "damaged", "nonsense"])
def test_times_of_another_version_or_a_damaged_file_are_measured_anew(
    spoil: str, unet: nn.Module, analysis: Analysis, call: UNetCall, tmp_path: Path
) -> None:
    path = tmp_path / "times.json"
    measure_times(unet, analysis, call, path=path, timer=Clock())
    content = json.loads(path.read_text())
    whole = len(content["milliseconds"])
    content["head"]["package"] = "0.0.0"
    path.write_text({"other version": json.dumps(content), "damaged": "{", "nonsense": "[]"}[spoil])
    clock = Clock()
    measure_times(unet, analysis, call, path=path, timer=clock)
    assert clock.calls == (WARM_UP + ROUNDS) * (whole + 1)
    assert json.loads(path.read_text())["head"]["package"] != "0.0.0"


def test_the_model_stays_as_it_was_and_real_times_are_positive(
    unet: nn.Module, analysis: Analysis, call: UNetCall, tmp_path: Path
) -> None:
    found = measure_times(unet, analysis, call, path=tmp_path / "times.json")
    assert torch.equal(run_unet(unet), call.output)
    assert min(found.layers.values()) > 0
    assert found.all_float == pytest.approx(found.rest + sum(found.layers[n, "fp16"] for n in quantizable_layers(unet)))


def test_the_users_own_file_is_named_after_the_device() -> None:
    path = cache_file(torch.device("cpu"))
    assert path.name.startswith("layer-times-")
    assert path.suffix == ".json"


def test_times_that_cannot_be_kept_are_measured_all_the_same(
    unet: nn.Module, analysis: Analysis, call: UNetCall, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="times are not kept for later runs"):
        found = measure_times(unet, analysis, call, path=tmp_path / "file" / "times.json", timer=Clock())
    assert found.layers == measure_times(unet, analysis, call, path=None, timer=Clock()).layers


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", '"fast"', "null"])
def test_times_that_are_none_are_measured_anew(value: str, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(f'{{"head": {{}}, "milliseconds": {{"a": 1.5, "b": {value}}}}}')
    assert layer_times._earlier(tmp_path / "times.json", {}) == {}
    (tmp_path / "times.json").write_text('{"head": {}, "milliseconds": {"a": 1.5}}')
    assert layer_times._earlier(tmp_path / "times.json", {}) == {"a": 1.5}


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LDMQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_file(torch.device("cpu")) is None


def test_an_untuned_gpu_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    monkeypatch.setattr(measurements, "fingerprint", lambda _device: "")
    with pytest.raises(PlanError, match=r"Some GPU.*run `ldmq bench --tune` once"):
        layer_times._head(torch.device("cuda"))
