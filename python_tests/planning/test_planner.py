"""A plan meets its target on prompts that it was not made from, or says what can be met."""

import pytest

from ldmq_kernels.calibration import SamplingSettings, calibrate, record_trajectory
from ldmq_kernels.numerics.formats import FLOAT, parse_schemes
from ldmq_kernels.planning.cost import weight_bytes
from ldmq_kernels.planning.plan import Plan, PlanError, quantizable_layers
from ldmq_kernels.planning.planner import Target, make_plan, measure_plan, plan_from_analysis, split_prompts
from ldmq_kernels.sensitivity import analyze
from python_tests.tiny import PROMPTS

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)
FORMATS = ["w8a8-static", "w8a8-dynamic", "w4a8-dynamic", "w8a16", "fp16"]


@pytest.fixture(scope="module")
def analysis(shared_pipe):
    calibration = calibrate(shared_pipe, PROMPTS, SETTINGS)
    return analyze(shared_pipe, calibration, parse_schemes(FORMATS), analysed_steps=2)


@pytest.fixture(scope="module")
def held_out(shared_pipe):
    return record_trajectory(shared_pipe, ["a green ring"], SamplingSettings(2, 4.0, seed=99))


def _plan(shared_pipe, analysis, held_out, formats=FORMATS, **target):
    return plan_from_analysis(shared_pipe.unet, analysis, held_out, Target(**target), formats)


@pytest.mark.parametrize("decibels", [20.0, 30.0, 40.0])
def test_the_target_is_met_on_held_out_prompts(shared_pipe, analysis, held_out, decibels):
    result = _plan(shared_pipe, analysis, held_out, sqnr_db=decibels)
    again = measure_plan(shared_pipe.unet, result.plan, held_out)
    assert again.mean_db >= decibels
    assert result.plan.measured["held_out_sqnr_db"] == pytest.approx(again.mean_db, abs=1e-3)


def test_a_lower_target_takes_fewer_bytes(shared_pipe, analysis, held_out):
    sizes = [_plan(shared_pipe, analysis, held_out, sqnr_db=db).plan.measured["weight_bytes"] for db in (20, 35, 50)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_bytes_are_kept_and_spent(shared_pipe, analysis, held_out):
    floats = sum(weight_bytes(m, FLOAT) for m in quantizable_layers(shared_pipe.unet).values())
    tight = _plan(shared_pipe, analysis, held_out, bytes=int(0.35 * floats))
    loose = _plan(shared_pipe, analysis, held_out, bytes=int(0.55 * floats))
    assert tight.plan.measured["weight_bytes"] <= 0.35 * floats
    assert loose.held_out.mean_db > tight.held_out.mean_db


def test_a_byte_target_that_is_too_small_says_the_least(shared_pipe, analysis, held_out):
    with pytest.raises(PlanError, match=r"at least \d+ bytes"):
        _plan(shared_pipe, analysis, held_out, bytes=1000)


def test_an_unreachable_target_says_the_most(shared_pipe, analysis, held_out):
    only = {k: v for k, v in analysis.output.items() if k[1].startswith("w8a8")}
    candidates = {n: [c for c in cs if str(c.scheme).startswith("w8a8")] for n, cs in analysis.candidates.items()}
    narrowed = type(analysis)(analysis.calibration, analysis.steps, candidates, only, {})
    with pytest.raises(PlanError, match=r"at most about [\d.]+ dB"):
        _plan(shared_pipe, narrowed, held_out, formats=["w8a8-static", "w8a8-dynamic"], sqnr_db=90.0)


def test_a_prediction_that_was_too_hopeful_is_repaired(shared_pipe, analysis, held_out):
    import dataclasses

    from ldmq_kernels.sensitivity.output_noise import StepNoise

    hopeful = {k: StepNoise({s: p / 10 for s, p in v.by_step.items()}) for k, v in analysis.output.items()}
    result = _plan(shared_pipe, dataclasses.replace(analysis, output=hopeful), held_out, sqnr_db=35.0)
    assert result.held_out.mean_db >= 35.0
    assert result.predicted_db > 40.0


def test_every_exception_has_its_reason(shared_pipe, analysis, held_out):
    plan = _plan(shared_pipe, analysis, held_out, sqnr_db=35.0).plan
    assert plan.exceptions
    assert all(entry["reason"] for entry in plan.exceptions.values())


def test_the_whole_method_writes_a_plan_that_loads(shared_pipe, tmp_path):
    result = make_plan(shared_pipe, [*PROMPTS, "a dog"], Target(sqnr_db=30.0), settings=SETTINGS, analysed_steps=1)
    result.plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert {n: str(c.scheme) for n, c in loaded.layers(shared_pipe.unet).items()} == {
        n: str(c.scheme) for n, c in result.plan.layers(shared_pipe.unet).items()
    }
    assert loaded.calibration["prompts"] == 2


def test_the_last_quarter_of_the_prompts_is_held_out():
    assert split_prompts(list("abcdefgh")) == (list("abcdef"), ["g", "h"])
    assert split_prompts(["a"]) == (["a"], ["a"])
    with pytest.raises(ValueError, match="no prompt"):
        split_prompts(["", "  "])


def test_one_target_is_given():
    with pytest.raises(ValueError, match="one target"):
        Target()
    with pytest.raises(ValueError, match="one target"):
        Target(sqnr_db=30.0, bytes=100)
