"""Plans for the latents and the pictures: predicted, drawn by the pipeline's own call, and told with their spread."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings
from ldmq_kernels.calibration import adjoint as sampler
from ldmq_kernels.calibration.adjoint import LATENT
from ldmq_kernels.calibration.drawings import draw
from ldmq_kernels.calibration.hessian import input_hessians
from ldmq_kernels.calibration.settings import changed
from ldmq_kernels.conversion import quantize
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.planning.drawn import (
    PICTURES,
    Drawn,
    FloatEnds,
    Spread,
    mean_within_db,
    spread_in_words,
    with_more_seeds,
)
from ldmq_kernels.planning.evaluate import PlanEvaluator
from ldmq_kernels.planning.planner import HELD_OUT_SEED, end_check, held_out_settings, make_plan, open_session
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan, PlanError
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.end_noise import EndNoise
from ldmq_kernels.sensitivity.output_noise import swapped
from python_tests.planning.test_settings import Pipe
from python_tests.tiny import PROMPTS, SHALLOW, tiny_pipeline

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=2.0)
FORMATS = ["w8a8-dynamic", "w8a16", "fp16"]
TEXTS = [*PROMPTS, "a dog", "a green ring"]


def test_the_spread_has_the_mean_the_median_and_the_worst_tenth() -> None:
    assert Spread.of([10.0, 20.0, 30.0, 40.0, 100.0]) == Spread(40.0, 30.0, 14.0)
    drawn = Drawn({"latent": (30.0, 40.0), "psnr": (50.0, 51.0)}, (0, 1))
    assert (drawn.mean_db("latent"), drawn.spread["psnr"].mean) == (35.0, 50.5)
    assert [part.by_picture["psnr"] for part in Drawn(drawn.by_picture, (0, 2)).by_setting(2)] == [(50.0,), (51.0,)]


def test_a_mean_of_few_pictures_is_known_as_far_as_they_agree() -> None:
    assert mean_within_db([40.0, 42.0, 44.0, 46.0]) == pytest.approx(3.182446 * 2.581989 / 2)  # Student's t of 3
    assert mean_within_db([40.0, 46.0]) is None


def test_held_out_prompts_are_drawn_with_further_seeds_until_there_are_enough() -> None:
    assert with_more_seeds(["one", "two", "three"]) == ["one", "two", "three"] * 3
    assert len(with_more_seeds(["text"] * (PICTURES + 1))) == PICTURES + 1


def test_pictures_are_compared_one_by_one(shallow_pipe: StableDiffusionPipeline) -> None:
    ends = FloatEnds(shallow_pipe, PROMPTS, SETTINGS)
    assert ends.compare().by_picture == {"latent": (200.0, 200.0), "psnr": (200.0, 200.0)}
    exact = draw(shallow_pipe, PROMPTS, SETTINGS, "latent")[0]
    louder = nn.Conv2d(32, 4, 3, padding=1)
    louder.load_state_dict({name: 1.001 * t for name, t in shallow_pipe.unet.conv_out.state_dict().items()})
    with swapped(shallow_pipe.unet, {"conv_out": louder}), torch.no_grad():
        found, second = ends.compare(), ends.compare([1])
        moved = draw(shallow_pipe, PROMPTS, SETTINGS, "latent")[0]
    power = (moved - exact).double().square().flatten(1).sum(1) / exact.double().square().flatten(1).sum(1)
    assert found.by_picture["latent"] == pytest.approx((-10 * power.log10()).tolist(), abs=1e-3)
    assert second.by_picture["latent"] == pytest.approx(found.by_picture["latent"][1:], abs=0.01)  # in another batch
    again = FloatEnds(shallow_pipe, PROMPTS, SETTINGS, [moved]).compare().by_picture["psnr"]
    assert found.by_picture["psnr"] == pytest.approx(again, abs=0.01)


def test_what_draws_no_latents_cannot_be_compared(shallow_pipe: StableDiffusionPipeline) -> None:
    def nothing(_pipe: Any) -> None:
        return None

    free = SamplingSettings(num_inference_steps=None, guidance_scale=None)
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline gives no latents to compare.*target_sqnr_db"):
        FloatEnds(shallow_pipe, [nothing], free)


@pytest.fixture(scope="module")
def session(shallow_pipe: StableDiffusionPipeline) -> Session:
    return open_session(shallow_pipe, _request(Target(latent_db=30.0)))


def _request(target: Target | None, **options: Any) -> PlanRequest:
    return PlanRequest(TEXTS, target, FORMATS, settings=SETTINGS, **options)


def _calibrated(session: Session) -> FloatEnds:
    assert session.ends is not None
    return session.ends.calibrated


def _bytes(plan: Plan) -> int:
    return int(plan.measured["weight_bytes"])


def test_a_target_in_the_latents_is_met_by_drawing_and_was_predicted(session: Session) -> None:
    plans = {db: session.plan(Target(latent_db=db)) for db in (40.0, 60.0)}
    for db, result in plans.items():
        measured = result.plan.measured
        assert measured["held_out_latent_db"] >= db
        assert measured["held_out_latent_db_worst_tenth"] < measured["held_out_latent_db_median"]
        assert measured["held_out_pictures"] == PICTURES
        assert measured["predicted_latent_db"] == pytest.approx(measured["held_out_latent_db"], abs=4.0)
        assert result.plan.target == {"latent_db": db}
        first = session.chooser.choose(Target(latent_db=40.0))  # which is drawn on the calibration's pictures
        drawn = PlanEvaluator(session.model, session.analysis).cross_validated_drawing(
            first.schemes, _calibrated(session)
        )
        within = mean_within_db(drawn.by_picture["latent"])
        assert measured["predicted_latent_db_within"] == pytest.approx(within, abs=1e-3)
    assert _bytes(plans[40.0].plan) < _bytes(plans[60.0].plan)


def test_the_plan_draws_what_it_says(
    session: Session, shallow_pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = session.plan(Target(latent_db=40.0)).plan
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **SHALLOW)
    calls, settings = with_more_seeds(["a green ring"]), held_out_settings(SETTINGS)
    assert [one.seed for one in settings] == [HELD_OUT_SEED]
    exact = FloatEnds(pipe, calls, settings)
    quantize(pipe, plan, show_progress=False)
    drawn = exact.compare()
    # fused blocks round a few values the other way, which one picture of eight may show
    assert drawn.mean_db("latent") == pytest.approx(plan.measured["held_out_latent_db"], abs=0.5)
    assert drawn.mean_db("psnr") == pytest.approx(plan.measured["held_out_psnr_db"], abs=0.5)
    kept = Plan.from_dict(plan.to_dict()).measured
    assert f"SQNR of the final latents {kept['held_out_latent_db']:.2f} dB in the mean of 8" in spread_in_words(kept)


def test_bytes_are_kept_beside_it_and_what_cannot_be_met_says_what_can(session: Session) -> None:
    smallest = session.chooser.least("bytes")
    within = int(1.1 * smallest)
    assert _bytes(session.plan(Target(bytes=within)).plan) <= within
    with pytest.raises(PlanError, match=r"150\.0 dB cannot be met: with these formats at most about"):
        session.plan(Target(latent_db=150.0, layers=0))
    with pytest.raises(PlanError, match="is not SQNR of the final latents"):
        session.plan(Target(sqnr_db=30.0))


def test_plans_that_gptq_rounds_are_predicted_by_what_each_half_of_the_prompts_makes_of_the_other(
    session: Session, shallow_pipe: StableDiffusionPipeline
) -> None:
    calibration, layers = session.analysis.calibration, quantizable_layers(shallow_pipe.unet)
    schemes, name = dict.fromkeys(layers, "fp16"), "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    plain = LayerPlan(SCHEMES["w4a16"], "", rounding="gptq")
    candidate = LayerCandidate(plain, 0.0, "gptq", judged=(plain, plain))
    analysis = replace(session.analysis, candidates={**session.analysis.candidates, name: [candidate]})
    drawn = PlanEvaluator(shallow_pipe.unet, analysis).cross_validated_drawing(
        schemes | {name: "w4a16"}, FloatEnds(shallow_pipe, calibration.calls, SETTINGS, calibration.trajectory.outputs)
    )
    folds = calibration.trajectory.by_fold()
    for fold, sample in enumerate((0, 1)):
        hessian = input_hessians(shallow_pipe.unet, folds[1 - fold], [name])[name]
        with swapped(shallow_pipe.unet, {name: quantize_layer(name, layers[name], plain, hessian)}), torch.no_grad():
            latents = draw(shallow_pipe, calibration.calls, SETTINGS, "latent")[0][sample]
        exact = calibration.trajectory.outputs[0][sample]
        power = float((latents - exact).double().square().sum() / exact.double().square().sum())
        place = drawn.samples.index(sample)
        assert drawn.by_picture["latent"][place] == pytest.approx(-10 * math.log10(power), abs=0.01)


def _of_one_picture(session: Session, model: nn.Module) -> Session:
    """A session in which noise is known of the first picture alone."""

    def of_the_first(candidate: LayerCandidate) -> LayerCandidate:
        assert candidate.end is not None
        return replace(candidate, end=EndNoise({LATENT: {0: candidate.end.by_picture[LATENT][0]}}))

    few = {name: [of_the_first(c) for c in each] for name, each in session.analysis.candidates.items()}
    analysis = replace(session.analysis, candidates=few)
    return Session(model, analysis, session.held_out, FORMATS, ends=session.ends)


def test_the_prediction_is_as_good_as_all_pictures_of_the_calibration_are(
    session: Session, shallow_pipe: StableDiffusionPipeline
) -> None:
    of_one = _of_one_picture(session, shallow_pipe.unet)
    chosen = of_one.chooser.choose(Target(latent_db=40.0))
    evaluator = PlanEvaluator(shallow_pipe.unet, session.analysis)
    drawn = evaluator.cross_validated_drawing(chosen.schemes, _calibrated(session))
    assert len(set(drawn.by_picture["latent"])) == 3
    assert of_one.predicted_db(chosen) == pytest.approx(drawn.mean_db("latent"))
    assert of_one.interaction_db is not None
    first = drawn.by_picture["latent"][drawn.samples.index(0)]
    assert of_one.interaction_db == pytest.approx(chosen.sum_db - first)


def test_the_prediction_of_a_large_model_is_corrected_by_the_pictures_that_noise_is_known_of(
    session: Session, shallow_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "WHOLE_MODEL", 10)
    of_one, seen = _of_one_picture(session, shallow_pipe.unet), list[Any]()
    compare = FloatEnds.compare
    monkeypatch.setattr(FloatEnds, "compare", lambda ends, samples=None: seen.append(samples) or compare(ends, samples))
    of_one.predicted_db(of_one.chooser.choose(Target(latent_db=40.0)))
    assert seen == [[0]]


def test_several_settings_have_a_target_in_the_latents_and_the_worst_keeps_it() -> None:
    settings = changed(SETTINGS, [{}, {"num_inference_steps": 4}])
    request = PlanRequest(TEXTS, Target(latent_db=40.0), ["w8a8-dynamic", "fp16"], settings=settings)
    measured = make_plan(Pipe(), request).plan.measured
    each = [entry["held_out_latent_db"] for entry in measured["by_settings"]]
    assert len(each) == 2
    assert min(each) >= 40.0
    assert measured["held_out_pictures"] == 2 * PICTURES
    assert measured["held_out_latent_db"] == pytest.approx(sum(each) / 2, abs=1e-3)


@pytest.mark.slow
def test_pictures_are_a_target_alike(shallow_pipe: StableDiffusionPipeline) -> None:
    plan = make_plan(shallow_pipe, _request(Target(psnr_db=30.0))).plan
    assert plan.measured["held_out_psnr_db"] >= 30.0
    assert "predicted_psnr_db" in plan.measured


@pytest.mark.slow
def test_without_gradients_a_target_in_the_latents_is_met_all_the_same(
    shallow_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Detaching(DDIMScheduler):
        def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output.detach(), *args, **kwargs)

    monkeypatch.setattr(shallow_pipe, "scheduler", Detaching.from_config(shallow_pipe.scheduler.config))
    with caplog.at_level(logging.WARNING):
        plan = make_plan(shallow_pipe, _request(Target(latent_db=40.0))).plan
    assert "with a Detaching, no gradient" in caplog.text
    assert plan.measured["held_out_latent_db"] >= 40.0


def test_a_pipeline_whose_latents_no_vae_decodes_has_no_target_in_pictures(
    session: Session, shallow_pipe: StableDiffusionPipeline
) -> None:
    request = replace(_request(None), signals=("psnr",))
    with pytest.raises(ValueError, match="no VAE that decodes its latents as they are: give a target for the latents"):
        end_check(_WithoutVae(shallow_pipe), request, session.analysis)


class _WithoutVae:
    """A pipeline that keeps its VAE to itself."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self._pipe, self.unet = pipe, pipe.unet

    def __call__(self, **arguments: Any) -> Any:
        return self._pipe(**arguments)
