"""Noise at the end: what steps have alike adds as amplitudes, the rest as powers, and runs agree with what is said."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from scipy import stats
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings, calibrate, probes
from ldmq_kernels.calibration import adjoint as sampler
from ldmq_kernels.calibration.adjoint import (
    LATENT,
    PICTURE,
    CallWeights,
    EndCall,
    EndTrajectory,
    rademacher,
    sampler_adjoint,
)
from ldmq_kernels.calibration.drawings import draw
from ldmq_kernels.calibration.probes import EndRecord, end_records
from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity import Analysis, analyze
from ldmq_kernels.sensitivity import ends as ends_of_analysis
from ldmq_kernels.sensitivity.analysis import quantized_as
from ldmq_kernels.sensitivity.end_noise import EndNoise, LayerEndNoise
from ldmq_kernels.sensitivity.output_noise import swapped
from ldmq_kernels.sensitivity.stored import candidates_of, store_candidates
from ldmq_kernels.sensitivity.trials import Judge
from ldmq_kernels.sensitivity.work_folder import WorkError
from python_tests.tiny import PROMPTS

SETTINGS = SamplingSettings(num_inference_steps=3, guidance_scale=2.0)
STEPS, PICTURES = 21, 2


EACH_ROW = torch.eye(2)[[0, 0, 1, 1]]  # the input of two prompts' rows in both halves of guidance


def _layer(error: Tensor) -> nn.Linear:
    """A layer whose output for the two rows of a prompt is this (2, 3) error, beside one that gives zeros."""
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = error.T
    return layer


EXACT = _layer(torch.zeros(2, 3))


def _ends(count: int = STEPS, probes: int = 1) -> EndTrajectory:
    output, once = torch.zeros(2 * PICTURES, 3), torch.ones(probes, dtype=torch.float64)
    calls = [
        EndCall(
            UNetCall(step, (), {}, output, tuple(range(PICTURES))),
            torch.ones(probes, *output.shape),
            CallWeights(once, once),
        )
        for step in range(STEPS)
    ]
    return EndTrajectory(calls, (LATENT,), probes, {LATENT: {0: 2.0, 1: 5.0}}).thinned(count)


class _Way:
    """Another layer for each step and fold, or the same for all."""

    def __init__(self, layer_for: Callable[[int, int], nn.Module]) -> None:
        self._layer_for = layer_for
        self.products = 0

    def state(self, step: int, fold: int) -> nn.Module:
        return self._layer_for(step, fold)

    def in_state(self, state: nn.Module) -> nn.Module:
        self.products += 1
        return state


def _noise(ends: EndTrajectory, errors: dict[int, Tensor], at_once: int = 1) -> EndNoise:
    """Of a layer that makes an error in each step, with gradients of one everywhere, or of random signs."""
    ones, records = torch.ones(4, 3), []
    for of_call in ends.calls:
        step = of_call.call.step
        signs = [ones] if ends.probes == 1 else [rademacher(ones, 99 * step + probe) for probe in range(ends.probes)]
        records.append(EndRecord(step, of_call.weights, EACH_ROW, EXACT(EACH_ROW), torch.stack(signs), (0, 1, 0, 1)))
    layers = {step: _layer(error) for step, error in errors.items()}
    return _added(ends, records, _Way(lambda step, _: layers[step]), at_once)


def _added(ends: EndTrajectory, records: Sequence[EndRecord], way: _Way, at_once: int = 1) -> EndNoise:
    noise = LayerEndNoise(ends, {"other": _Way(lambda *_: EXACT), "one": way}, at_once)
    for record in records:
        noise.add(record)
    return noise.noise()["one"]


ALIKE = {step: torch.full((2, 3), 0.25) for step in range(STEPS)}
UNLIKE = {step: torch.full((2, 3), 0.25 * (-1) ** step) for step in range(STEPS)}


def test_errors_that_are_alike_add_up_as_amplitudes_and_others_cancel() -> None:
    amplitude = 6 * 0.25  # both halves of guidance
    alike = (STEPS * amplitude) ** 2
    assert _noise(_ends(), ALIKE).by_picture == {LATENT: {0: alike / 2, 1: alike / 5}}
    assert _noise(_ends(), UNLIKE).by_picture[LATENT][1] == pytest.approx(amplitude**2 / 5)


def test_some_steps_stand_for_all_with_errors_that_are_alike_and_with_random_ones() -> None:
    some = _ends(5)
    assert [of_call.call.step for of_call in some.calls] == [0, 5, 10, 15, 20]
    assert sum(float(of_call.weights.amplitude) for of_call in some.calls) == pytest.approx(STEPS)
    alike = _noise(some, ALIKE).mean(LATENT) / _noise(_ends(), ALIKE).mean(LATENT)
    assert -1.0 < 10 * math.log10(alike) <= 0
    random = {step: torch.randn(2, 3, generator=torch.Generator().manual_seed(step)) for step in range(STEPS)}
    whole, part = (_noise(_ends(count, 200), random).mean(LATENT) for count in (STEPS, 5))
    assert part / whole == pytest.approx(1.0, abs=0.3)  # 5 without taking away what is not alike


def test_runs_at_several_settings_are_thinned_each_by_itself() -> None:
    whole = _ends()
    short = [replace(c, call=replace(c.call, prompts=(2, 3))) for c in whole.calls[::7]]
    both = replace(whole, calls=[*whole.calls, *short]).thinned(2)
    assert [(c.call.prompts, c.call.step) for c in both.calls] == [((0, 1), 0), ((0, 1), 20), ((2, 3), 0), ((2, 3), 14)]
    assert [float(c.weights.amplitude) for c in both.calls] == [10.5, 10.5, 1.5, 1.5]


def test_a_call_that_does_not_reach_the_end_counts_for_nothing() -> None:
    whole = _ends()
    unseen = replace(whole.calls[0], adjoints=torch.zeros_like(whole.calls[0].adjoints))  # as where all is clipped
    first, last = replace(whole, calls=[unseen, *whole.calls[1:]]).thinned(2).calls
    assert (float(first.weights.amplitude), float(first.weights.power)) == (0.0, 0.0)
    assert float(last.weights.amplitude) == 10.5


def test_each_picture_has_the_error_of_the_layer_that_the_other_fold_makes() -> None:
    ends, errors = _ends(), (_layer(torch.full((2, 3), 1.0)), _layer(torch.full((2, 3), 5.0)))
    record = EndRecord(0, ends.calls[0].weights, EACH_ROW, EXACT(EACH_ROW), torch.ones(1, 4, 3), (0, 1, 0, 1))
    noise = _added(ends, [record], _Way(lambda _, fold: errors[fold]))
    assert noise.by_picture == {LATENT: {0: 6.0**2 / 2, 1: 30.0**2 / 5}}  # both halves of guidance, three values


def test_a_row_for_all_pictures_counts_once_in_all() -> None:
    ends = _ends()
    record = EndRecord(0, ends.calls[0].weights, EACH_ROW[:1], torch.zeros(1, 3), torch.ones(1, 1, 3), ())
    assert record.folds == [0]
    noise = _added(ends, [record], _Way(lambda *_: _layer(torch.ones(2, 3))))
    power = sum(noise.by_picture[LATENT][picture] * ends.scale[LATENT][picture] for picture in range(PICTURES))
    assert power == pytest.approx(9.0)


@pytest.mark.parametrize("at_once", [2, 4, 100])
def test_records_that_wait_for_each_other_are_multiplied_together_and_count_as_before(at_once: int) -> None:
    ends = _ends(probes=3)
    random = {step: torch.randn(2, 3, generator=torch.Generator().manual_seed(step // 2)) for step in range(STEPS)}
    alone, together = (_noise(ends, random, count).by_picture[LATENT] for count in (1, at_once))
    assert together == pytest.approx(alone)
    layer, wide = _layer(torch.ones(2, 3)), EACH_ROW.repeat(2, 1)
    one = _Way(lambda *_: layer)
    shapes = [EACH_ROW, EACH_ROW, wide[:, None], wide[:, None]]  # another shape does not wait
    records = [
        EndRecord(
            step,
            ends.calls[0].weights,
            x,
            torch.zeros(*x.shape[:-1], 3),
            torch.ones(3, *x.shape[:-1], 3),
            (0, 1) * (len(x) // 2),
        )
        for step, x in enumerate(shapes)
    ]
    _added(ends, records, one, at_once)
    assert one.products == 2


@pytest.fixture(scope="module")
def analysis(shallow_pipe: StableDiffusionPipeline) -> Analysis:
    calibration = calibrate(shallow_pipe, PROMPTS, SETTINGS)
    return analyze(shallow_pipe, calibration, parse_schemes(["w8a8-dynamic"]), ends=(LATENT, PICTURE))


def test_noise_in_the_latents_is_as_predicted(shallow_pipe: StableDiffusionPipeline, analysis: Analysis) -> None:
    model, exact = shallow_pipe.unet, analysis.calibration.trajectory.latents
    true, predicted = [], []
    for name in list(analysis.candidates)[::3]:
        (candidate,) = analysis.candidates[name]
        with swapped(model, {name: quantized_as(name, quantizable_layers(model)[name], candidate)}), torch.no_grad():
            latents = draw(shallow_pipe, PROMPTS, SETTINGS, "latent")[0]
        by_picture = (latents - exact).square().flatten(1).sum(1) / exact.square().flatten(1).sum(1)
        true.append(10 * math.log10(by_picture.mean()))
        assert candidate.end is not None
        predicted.append(10 * math.log10(candidate.end.mean(LATENT)))
    assert stats.spearmanr(true, predicted).statistic > 0.9
    assert abs(float(np.median(np.subtract(predicted, true)))) < 1.5


def _followed(pipe: Any, analysis: Analysis, names: Sequence[str]) -> dict[str, EndNoise | None]:
    """Noise at the end of a few layers' candidates of the analysis, as they are in a plan."""
    following = ends_of_analysis.Following(pipe, analysis.calibration, (LATENT,), show=False)
    for name in names:
        layer, (candidate,), before = quantizable_layers(pipe.unet)[name], analysis.candidates[name], following.bytes
        judge = Judge([quantized_as(name, layer, candidate)], (), ())
        following.add(name, [candidate], {"w8a8-dynamic": judge})
        assert following.bytes - before >= layer.weight.numel()
    noise = {name: candidate.end for name, (candidate,) in following.followed()}
    assert following.bytes == 0
    assert list(following.followed()) == []
    return noise


def test_layers_are_followed_to_the_end_in_any_number_of_replays_whether_a_model_is_small_or_large(
    shallow_pipe: StableDiffusionPipeline, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(analysis.candidates)[:3]
    monkeypatch.setattr(ends_of_analysis, "PROBES", 2)
    together = _followed(shallow_pipe, analysis, names)
    assert list(together) == names
    monkeypatch.setattr(probes, "MEMORY", 1)
    assert _followed(shallow_pipe, analysis, names) == together
    monkeypatch.setattr(sampler, "WHOLE_MODEL", 10)
    monkeypatch.setattr(ends_of_analysis, "LARGE_PROBES", 2)
    large = _followed(shallow_pipe, analysis, names)
    for name, noise in together.items():
        other = large[name]
        assert noise is not None
        assert other is not None
        assert other.by_picture[LATENT] == pytest.approx(noise.by_picture[LATENT], rel=1e-3)


def test_a_layer_may_be_run_while_its_records_come(shallow_pipe: StableDiffusionPipeline, analysis: Analysis) -> None:
    calibration, name = analysis.calibration, "conv_in"
    ends = sampler_adjoint(shallow_pipe, calibration.trajectory, calibration.calls, calibration.settings, [0], probes=1)
    layer = quantizable_layers(shallow_pipe.unet)[name]
    steps = []
    for _, of_call in end_records(shallow_pipe.unet, ends, [name]):
        layer(of_call.x)
        steps.append(of_call.step)
    assert steps == [0, 1, 2]


def test_noise_at_the_end_is_kept_to_the_bit(shallow_pipe: StableDiffusionPipeline, analysis: Analysis) -> None:
    layers = quantizable_layers(shallow_pipe.unet)
    name, kept = next(iter(analysis.candidates.items()))
    assert [c.end for c in candidates_of(store_candidates(kept), layers[name])] == [c.end for c in kept]
    assert kept[0].end is not None
    assert set(kept[0].end.by_picture) == {LATENT, PICTURE}


def test_what_is_kept_in_a_folder_needs_no_adjoint_again(
    shallow_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calibration, schemes = calibrate(shallow_pipe, PROMPTS, SETTINGS), parse_schemes(["w8a16"])
    monkeypatch.setattr(ends_of_analysis, "PROBES", 1)
    options: dict[str, Any] = {"exact": 0, "work_dir": tmp_path / "work"}
    first = analyze(shallow_pipe, calibration, schemes, ends=(LATENT,), **options)
    monkeypatch.setattr(ends_of_analysis, "walk", None)
    again = analyze(shallow_pipe, calibration, schemes, ends=(LATENT,), **options)
    assert [c.end for (c,) in again.candidates.values()] == [c.end for (c,) in first.candidates.values()]
    with pytest.raises(WorkError, match="ends"):
        analyze(shallow_pipe, calibration, schemes, **options)


def test_a_scheduler_without_gradients_is_named_and_the_output_decides(
    shallow_pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Detaching(DDIMScheduler):
        def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output.detach(), *args, **kwargs)

    monkeypatch.setattr(shallow_pipe, "scheduler", Detaching.from_config(shallow_pipe.scheduler.config))
    calibration = calibrate(shallow_pipe, PROMPTS, SETTINGS)
    with caplog.at_level(logging.WARNING):
        found = analyze(shallow_pipe, calibration, parse_schemes(["w8a16"]), ends=(LATENT,), exact=0)
    assert "of this StableDiffusionPipeline with a Detaching, no gradient runs from its latents" in caplog.text
    assert all(candidate.end is None for (candidate,) in found.candidates.values())


def test_of_a_large_model_some_steps_of_two_pictures_count(
    shallow_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibrate(shallow_pipe, [*PROMPTS, "a dog"], SETTINGS)
    monkeypatch.setattr(sampler, "WHOLE_MODEL", 10)
    monkeypatch.setattr(ends_of_analysis, "LARGE_CALLS", 2)
    found = ends_of_analysis.Following(shallow_pipe, calibration, (LATENT,), show=False).some_calls
    assert (found.pictures, found.probes) == ([0, 1], 1)
    assert [of_call.call.step for of_call in found.calls] == [0, 2]


def test_of_a_small_model_the_first_pictures_are_followed(
    shallow_pipe: StableDiffusionPipeline, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends_of_analysis, "PICTURES", 1)
    (noise,) = _followed(shallow_pipe, analysis, ["conv_in"]).values()
    assert noise is not None
    assert list(noise.by_picture[LATENT]) == [0]


def test_what_is_known_of_the_end_saves_runs_of_single_layers(analysis: Analysis) -> None:
    assert analysis.exact == frozenset()
    assert set(analysis.output) == set(analysis.estimates)
