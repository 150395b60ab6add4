"""Plans are asked for again until a run reaches the target and not far more; runs are made up here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from ldmq_kernels.calibration import Trajectory
from ldmq_kernels.planning import session as sessions
from ldmq_kernels.planning.session import ENOUGH_DB, RUNS, Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, PlanError
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import StepNoise
from python_tests.planning.synthetic import SummedRuns, everything_in
from python_tests.report.analyses import TRIED, made_up_analysis
from python_tests.tiny import tiny_unet

FORMATS = [*TRIED, "fp16"]
HELD_OUT = Trajectory([], torch.zeros(1, 4, 8, 8), 8)

Runs = list[tuple[bool, dict[str, str]]]


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def analysis(unet: nn.Module) -> Analysis:
    return made_up_analysis(unet)


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runs]:
    """Whole plans have their layers' summed noise times a factor on each trajectory, all steps; gives the runs."""

    def install(calibrated: float = 1.0, held_out: float = 1.0) -> Runs:
        runs: Runs = []

        class MadeUp(SummedRuns):
            def noise(self, schemes: Mapping[str, str], trajectory: Trajectory) -> StepNoise:
                is_held_out = trajectory is HELD_OUT
                runs.append((is_held_out, dict(schemes)))
                factor = held_out if is_held_out else calibrated
                alone = super().noise(schemes, trajectory).by_step
                return StepNoise({step: power * factor for step, power in alone.items()})

        monkeypatch.setattr(sessions, "PlanEvaluator", MadeUp)
        return runs

    return install


def _session(unet: nn.Module, analysis: Analysis, **options: object) -> Session:
    return Session(unet, analysis, HELD_OUT, FORMATS, **options)


def _held_out(runs: Runs) -> list[dict[str, str]]:
    return [schemes for is_held_out, schemes in runs if is_held_out]


@pytest.mark.parametrize("decibels", [22.0, 31.5, 44.0])
def test_what_layers_do_together_is_measured_once_and_predicted(
    decibels: float, unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    runs = run_with(calibrated=2.0, held_out=2.0)
    result = _session(unet, analysis).plan(Target(sqnr_db=decibels))
    measured = result.plan.measured
    assert measured["interaction_db"] == pytest.approx(3.01, abs=0.01)
    assert measured["predicted_sqnr_db"] == pytest.approx(measured["held_out_sqnr_db"], abs=0.01)
    assert measured["held_out_sqnr_db"] >= decibels
    assert [is_held_out for is_held_out, _ in runs].count(False) == 1


@pytest.mark.parametrize("factor", [4.0, 30.0, 0.2])
def test_held_out_noise_of_another_size_is_repaired_without_much_to_spare(
    factor: float, unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    runs = run_with(held_out=factor)
    result = _session(unet, analysis).plan(Target(sqnr_db=33.0))
    assert 33.0 <= result.held_out.mean_db <= 33.0 + ENOUGH_DB
    assert 1 < len(_held_out(runs)) <= RUNS
    missed = result.predicted_db - result.held_out.mean_db
    assert missed == pytest.approx(10 * math.log10(factor), abs=0.1)  # nothing of the held-out runs is in it


def test_too_much_is_asked_for_again_and_the_smaller_plan_is_kept(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    runs = run_with(held_out=0.05)
    session = _session(unet, analysis)
    result = session.plan(Target(sqnr_db=44.0))
    first = session.chooser.choose(Target(sqnr_db=44.0))
    assert _held_out(runs)[0] != dict(_held_out(runs)[-1])
    assert result.plan.measured["weight_bytes"] < first.bytes


def test_a_target_below_what_the_smallest_plan_has_is_met_by_it_at_once(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    runs = run_with()
    result = _session(unet, analysis).plan(Target(sqnr_db=1.0))
    assert {str(c.scheme) for c in result.plan.layers(unet).values()} == {"w8a8-static"}
    assert len(_held_out(runs)) <= 2


def test_what_no_plan_reaches_says_how_far_they_came(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with(held_out=1e4)
    without_float = Session(unet, analysis, HELD_OUT, list(TRIED))
    with pytest.raises(PlanError, match=r"35.0 dB is not reached on held-out prompts.*has -?[\d.]+ dB"):
        without_float.plan(Target(sqnr_db=35.0))


def test_a_plan_without_noise_is_predicted_and_measured_as_exact(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    layers = len(quantizable_layers(unet))
    measured = _session(unet, analysis).plan(Target(layers=layers)).plan.measured
    assert (measured["held_out_sqnr_db"], measured["predicted_sqnr_db"]) == (200.0, 200.0)


def test_the_plan_says_what_it_was_made_from(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    calibration = dataclasses.replace(analysis.calibration, timestep_groups=(600.0, 200.0))
    analysis = dataclasses.replace(analysis, calibration=calibration)
    result = _session(unet, analysis).plan(Target(sqnr_db=33.0))
    plan = Plan.from_dict(result.plan.to_dict())
    assert plan.timestep_groups == [600.0, 200.0]
    recorded = {"mode": "first-step", "texts": ["a prompt"], "prompts": 1, "seed": 0, "num_inference_steps": 8}
    assert plan.calibration.items() >= {**recorded, "guidance_scale": 4.0, "timestep_groups": [600.0, 200.0]}.items()
    assert plan.target == {"sqnr_db": 33.0}
    assert all(entry["reason"] for entry in plan.exceptions.values())
    assert all(rule["reason"] for rule in plan.rules)
    choices = plan.layers(unet)
    assert {name: choice.scheme for name, choice in choices.items()} == {
        name: choice.scheme for name, choice in result.plan.layers(unet).items()
    }


def test_a_layer_that_never_ran_stays_and_its_bytes_count(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    name = next(n for n in analysis.candidates if "attn2" in n)
    partial = dataclasses.replace(analysis, candidates={n: c for n, c in analysis.candidates.items() if n != name})
    full = _session(unet, analysis).plan(Target(sqnr_db=1.0)).plan
    plan = _session(unet, partial).plan(Target(sqnr_db=1.0)).plan
    assert plan.exceptions[name] == {"scheme": "fp16", "reason": "never ran in calibration"}
    assert plan.measured["weight_bytes"] > full.measured["weight_bytes"]


# -- the paper's global step -------------------------------------------------------------------------------


def test_sensitive_blocks_start_with_higher_precision_and_say_so(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    session = _session(unet, analysis, hybrid=0.3)
    assert 0 < len(session.sensitive) < len({block_of(unet, name) for name in analysis.candidates})
    plan = session.plan(Target(sqnr_db=22.0)).plan
    inside = {n: c for n, c in plan.layers(unet).items() if block_of(unet, n) in session.sensitive}
    assert {str(c.scheme) for c in inside.values()} <= {"w8a8-dynamic", "w8a16", "fp16"}
    reasons = [plan.exceptions[name]["reason"] for name in inside if name in plan.exceptions]
    assert reasons
    assert all(reason.startswith("sensitive block ") for reason in reasons)


@pytest.mark.parametrize("decibels", [20.0, 33.0, 45.0])
def test_the_knapsack_alone_is_at_least_as_good_by_its_own_measure(
    decibels: float, unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    target = Target(sqnr_db=decibels)
    free, bound = _session(unet, analysis), _session(unet, analysis, hybrid=0.5)
    assert not bound.chooser.is_cheaper(bound.chooser.choose(target), free.chooser.choose(target), target)
    limit = Target(bytes=int(1.2 * bound.chooser.least("bytes")))
    assert free.chooser.choose(limit).sum_db >= bound.chooser.choose(limit).sum_db - 0.05


def test_sensitive_blocks_are_those_of_most_noise_for_their_size(unet: nn.Module, analysis: Analysis) -> None:
    blocks = list(dict.fromkeys(block for block, _ in analysis.blocks))
    loud = blocks[len(blocks) // 2]
    noises = {key: StepNoise(dict.fromkeys(analysis.steps, 1e-8)) for key in analysis.blocks}
    noises[loud, "w8a8-static"] = StepNoise(dict.fromkeys(analysis.steps, 1.0))
    analysis = dataclasses.replace(analysis, blocks=noises)
    assert sessions.sensitive_blocks(unet, analysis, 0.5) == [loud]
    assert set(sessions.sensitive_blocks(unet, analysis, 1.0)) == set(blocks)
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        sessions.sensitive_blocks(unet, analysis, 1.5)


# -- times and signals -------------------------------------------------------------------------------------


def _times(analysis: Analysis, slower: str) -> LayerTimes:
    layers = everything_in(analysis, {"fp16": 2.0, "w8a8-static": 1.0, "w8a8-dynamic": 1.2, "w8a16": 1.9})
    return LayerTimes(layers | {(slower, scheme): 2.5 for scheme in TRIED}, rest=7.0)


def test_a_layer_that_would_get_slower_stays_in_16_bit_and_says_so(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    slower = list(analysis.candidates)[5]
    times = _times(analysis, slower)
    plan = _session(unet, analysis, times=times).plan(Target(sqnr_db=20.0)).plan
    assert plan.exceptions[slower]["scheme"] == "fp16"
    assert plan.exceptions[slower]["reason"] == "slower when quantized: 2.500 ms in place of 2.000 ms"
    layers = len(analysis.candidates)
    assert plan.measured["milliseconds_float"] == 7.0 + 2.0 * layers
    with pytest.raises(PlanError, match="at least 1 layers stay in 16 bit; those that would get slower"):
        _session(unet, analysis, times=times).plan(Target(sqnr_db=20.0, layers=0))


def test_milliseconds_are_kept_with_what_is_beside_the_layers(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    times = _times(analysis, list(analysis.candidates)[5])
    limit = 7.0 + 1.3 * len(analysis.candidates)
    plan = _session(unet, analysis, times=times).plan(Target(milliseconds=limit)).plan
    total = sum(times.layers[name, str(choice.scheme)] for name, choice in plan.layers(unet).items())
    assert plan.measured["milliseconds"] == pytest.approx(7.0 + total)
    assert 0.9 * limit < 7.0 + total <= limit + 1e-9
    with pytest.raises(PlanError, match=r"8 ms cannot be met.*at least [\d.]+ ms"):
        _session(unet, analysis, times=times).plan(Target(milliseconds=8.0))


def test_times_without_a_format_say_what_is_missing(unet: nn.Module, analysis: Analysis) -> None:
    times = _times(analysis, "none")
    layers = {key: ms for key, ms in times.layers.items() if key[1] != "w8a16"}
    with pytest.raises(PlanError, match="no time was measured in w8a16"):
        _session(unet, analysis, times=LayerTimes(layers, 0.0))


def test_a_signal_that_was_not_analysed_is_refused_and_one_that_was_is_kept(
    unet: nn.Module, analysis: Analysis, run_with: Callable[..., Runs]
) -> None:
    run_with()
    with pytest.raises(PlanError, match="no signal 'ssim'"):
        _session(unet, analysis, signals=("sqnr", "ssim"))
    scored = next(n for n in analysis.candidates if "attn2.to_k" in n)
    ssim = {(scored, "w8a8-static"): 0.5, (scored, "w8a8-dynamic"): 0.4, (scored, "w8a16"): 1e-6}
    both = _session(unet, dataclasses.replace(analysis, signals={"ssim": ssim}), signals=("sqnr", "ssim"))
    target = Target(sqnr_db=31.0)
    assert _session(unet, analysis).chooser.choose(target).schemes[scored] != "w8a16"
    assert both.chooser.choose(target).schemes[scored] == "w8a16"
    assert both.plan(target).plan.measured["predicted_ssim_loss"] == pytest.approx(1e-6)
