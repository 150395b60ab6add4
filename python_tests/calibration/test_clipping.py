"""What a plan's ranges cut off at other settings is found by layer, and wider ranges mend it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings
from ldmq_kernels.calibration.clipping import LayerClipping, clipping, observe_clipping, unclip
from ldmq_kernels.calibration.settings import recorded
from ldmq_kernels.conversion import quantize
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.split import LOW_STEPS
from ldmq_kernels.plans.plan import LayerPlan, Plan, model_record

SETTINGS = SamplingSettings(None, None)
SCALE = 0.01  # a range up to 1.27
CALLS = [{"factor": 3.0}]


class Net(nn.Module):
    """Two linears that read the same values, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.conv = nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(64, 4, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.conv(sample.movedim(-1, 1).unsqueeze(-1))
        return (self.one(sample) + self.other(sample),)


class Pipe:
    """Calls its model with a normal sample times `factor`, and then with a third of it."""

    def __init__(self) -> None:
        self.unet = Net()

    def __call__(self, factor: float = 1.0) -> SimpleNamespace:
        sample = factor * torch.randn(1, 50, 64)
        for timestep, part in ((900.0, sample), (100.0, sample / 3)):
            self.unet(part, torch.tensor(timestep))
        return SimpleNamespace(frames=sample)


def _plan(pipe: Pipe, **layers: LayerPlan) -> Plan:
    plan = Plan(model_record(pipe.unet), [], timestep_groups=[500.0], calibration=recorded(SETTINGS))
    plan.measured = {"held_out_sqnr_db": 30.0}
    for name, layer_plan in layers.items():
        plan.set(name, layer_plan)
    return plan


def _found(pipe: Any, plan: Plan, calls: Any = CALLS) -> dict[str, LayerClipping]:
    found = observe_clipping(pipe, plan, calls, SETTINGS, show=False)
    assert len(found.trajectory.calls) == 2 * len(calls)
    return {one.layer: one for one in found.layers}


def _seen(calls: Any = CALLS) -> list[Tensor]:
    seen = []

    class Watching(Pipe):
        def __call__(self, factor: float = 1.0) -> SimpleNamespace:
            drawn = super().__call__(factor)
            seen.append(drawn.frames)
            return drawn

    pipe = Watching()
    observe_clipping(pipe, _plan(pipe), calls, SETTINGS, show=False)
    return [part for sample in seen for part in (sample, sample / 3)]


def test_shares_and_sqnr_are_those_of_the_quantized_input() -> None:
    pipe = Pipe()
    inv_smooth = torch.linspace(0.5, 2, 64)
    found = _found(pipe, _plan(pipe, one=LayerPlan(SCHEMES["w8a8-static"], "", SCALE, inv_smooth)))["one"]
    y = torch.cat([part.flatten(0, 1) for part in _seen()]).double() * inv_smooth
    quantized = (y / SCALE).round().clamp(-127, 127) * SCALE
    assert found.share == pytest.approx(((y / SCALE).round().abs() > 127).double().mean().item(), abs=2e-4)
    assert found.sqnr_db == pytest.approx(10 * math.log10(y.square().sum() / (quantized - y).square().sum()), abs=0.01)
    unclipped = (y / SCALE).round() * SCALE
    expected = 10 * math.log10(y.square().sum() / (unclipped - y).square().sum())
    assert found.unclipped_db == pytest.approx(expected, abs=0.01)
    assert found.largest == pytest.approx((float(y.abs().max()) / (127 * SCALE),), rel=1e-5)
    assert found.clips
    assert found.lost_db > 20


def test_each_timestep_group_has_its_own_range() -> None:
    pipe = Pipe()
    plan = _plan(pipe, one=LayerPlan(SCHEMES["w8a8-timestep"], "", (1.0, SCALE)))
    found = _found(pipe, plan)["one"]
    first, second = (float(part.abs().max()) for part in _seen())
    assert found.largest == pytest.approx((first / 127, second / (127 * SCALE)), rel=1e-5)
    assert found.largest[0] < 1 < found.largest[1]


def test_layers_come_with_the_one_that_loses_most_first_and_only_those_with_ranges() -> None:
    pipe = Pipe()
    plan = _plan(
        pipe,
        one=LayerPlan(SCHEMES["w8a8-static"], "", 1.0),
        other=LayerPlan(SCHEMES["w8a8-dynamic"]),
        conv=LayerPlan(SCHEMES["w8a8x2"], "", SCALE),
    )
    found = observe_clipping(pipe, plan, CALLS, SETTINGS, show=False).layers
    assert [one.layer for one in found] == ["conv", "one"]
    assert found[0].clips
    assert found[0].unclipped_db > 60 > found[0].sqnr_db
    assert (found[1].share, found[1].clips) == (0.0, False)
    assert found[1].lost_db == pytest.approx(0, abs=1e-9)
    assert not any(layer._forward_pre_hooks for layer in pipe.unet.modules())


def test_a_split_range_ends_where_both_parts_are_at_their_end() -> None:
    pipe = Pipe()
    found = _found(pipe, _plan(pipe, one=LayerPlan(SCHEMES["w8a8x2"], "", SCALE)))["one"]
    end = 127 * SCALE * (1 + 1 / LOW_STEPS)
    assert found.largest == pytest.approx((max(float(p.abs().max()) for p in _seen()) / end,), rel=1e-5)


def test_a_first_token_that_is_computed_apart_has_no_range() -> None:
    pipe = Pipe()
    plan = _plan(pipe, one=LayerPlan(SCHEMES["w8a8-static"], "", SCALE, first_token=True))
    found = _found(pipe, plan)["one"]
    y = torch.cat([part[:, 1:].flatten() for part in _seen()])
    assert found.largest == pytest.approx((float(y.abs().max()) / (127 * SCALE),), rel=1e-5)


def test_layers_that_clip_measure_their_scales_and_the_others_stay() -> None:
    pipe = Pipe()
    plan = _plan(
        pipe,
        one=LayerPlan(SCHEMES["w8a8-static"], "alone", SCALE, smoothing=torch.ones(64), bias_correction=torch.ones(64)),
        other=LayerPlan(SCHEMES["w8a8-timestep"], "", (1.0, SCALE)),
        conv=LayerPlan(SCHEMES["w8a8-static"], "", 1.0),
    )
    before = plan.to_dict()
    mended = unclip(plan, observe_clipping(pipe, plan, CALLS, SETTINGS, show=False))
    assert plan.to_dict() == before
    assert {name: str(mended.layer(name).scheme) for name in ("one", "other", "conv")} == {
        "one": "w8a8-dynamic",
        "other": "w8a8-dynamic",
        "conv": "w8a8-static",
    }
    assert mended.input_scales == {"conv": 1.0}
    assert set(mended.smoothing) == {"one"}
    assert not mended.bias_correction  # of the errors of a scale that is no more
    assert mended.layer("one").reason.startswith("alone; measured scale, its range clipped ")
    assert mended.measured == {}
    assert set(mended.calibration["unclipped"]["layers"]) == {"one", "other"}
    assert Plan.from_dict(mended.to_dict()).exceptions == mended.exceptions


def test_a_split_range_that_clips_covers_all_that_was_seen_and_no_more() -> None:
    pipe = Pipe()
    plan = _plan(pipe, one=LayerPlan(SCHEMES["w8a8x2"], "", SCALE))
    mended = unclip(plan, observe_clipping(pipe, plan, CALLS, SETTINGS, show=False))
    found = _found(pipe, mended)["one"]
    assert found.scheme == "w8a8x2"
    assert not found.clips
    assert found.largest == pytest.approx((1.0,), rel=1e-5)


def test_a_plan_that_clips_nowhere_keeps_its_numbers() -> None:
    pipe = Pipe()
    plan = _plan(pipe, one=LayerPlan(SCHEMES["w8a8-static"], "", 1.0))
    assert unclip(plan, clipping(pipe, plan, calls=CALLS)).input_scales == plan.input_scales


def test_settings_say_what_differs_from_the_plans_own() -> None:
    pipe = Pipe()
    plan = _plan(pipe, one=LayerPlan(SCHEMES["w8a8-static"], "", SCALE))
    plan.calibration["seed"] = 5
    found = clipping(pipe, plan, calls=CALLS, settings=[{"seed": 6}, {}], show_progress=False)
    assert [one.seed for one in found.settings] == [6, 5]
    assert unclip(plan, found).calibration["unclipped"]["settings"][1]["seed"] == 5


def test_a_quantized_model_is_refused() -> None:
    pipe = Pipe()
    plan = _plan(pipe, one=LayerPlan(SCHEMES["w8a8-static"], "", SCALE))
    quantize(pipe.unet, plan)
    with pytest.raises(ValueError, match="quantized already"):
        clipping(pipe, plan, calls=CALLS)
