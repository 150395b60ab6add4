"""The adjoint of the sampler is what finite differences of the pipeline's own runs say, or says why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ldmq_kernels.calibration import SamplingSettings, Trajectory, drawings, record_trajectory
from ldmq_kernels.calibration.adjoint import LATENT, PICTURE, EndTrajectory, _weights, rademacher, sampler_adjoint
from ldmq_kernels.calibration.decoding import decoded
from ldmq_kernels.calibration.drawings import Call, draw
from ldmq_kernels.calibration.redrawn import NoAdjoint
from python_tests.tiny import PROMPTS, SHALLOW, tiny_pipeline

SETTINGS = SamplingSettings(num_inference_steps=3, guidance_scale=4.0)
SIZE = 1e-3  # of the errors that are put in: Euler ancestral computes in float32


@pytest.fixture(scope="module")
def exact_pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """In double precision, so that differences of runs are exact enough to compare with."""
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **SHALLOW).to(torch.float64)


@pytest.fixture
def pipe(exact_pipe: StableDiffusionPipeline) -> Iterator[Any]:
    """The same one for every test; its scheduler and class are put back afterwards."""
    scheduler, kind = exact_pipe.scheduler, type(exact_pipe)
    yield exact_pipe
    exact_pipe.scheduler = scheduler
    exact_pipe.__class__ = kind


def _adjoint(pipe: Any, recorded: Trajectory, pictures: tuple[int, ...] = (0, 1), **options: Any) -> EndTrajectory:
    return sampler_adjoint(pipe, recorded, PROMPTS, SETTINGS, pictures, **({"probes": 2} | options))


def _moved(pipe: Any, index: int, error: Tensor, calls: Sequence[Call] = PROMPTS) -> Tensor:
    """The latents where an error is added to the UNet's output of one call."""
    seen = []

    def add(_model: Any, _args: Any, output: Any) -> Any:
        seen.append(output)
        return (output[0] + error,) if len(seen) == index + 1 else output

    handle = pipe.unet.register_forward_hook(add)
    try:
        return draw(pipe, calls, SETTINGS, "latent")[0]
    finally:
        handle.remove()


def _agrees(pipe: Any, recorded: Trajectory, ends: EndTrajectory) -> None:
    """Compare each call's adjoint with what an error of its output does to the latents, picture by picture."""
    rows = {picture: [picture] for picture in ends.pictures}
    weights, _ = _weights(pipe.vae, recorded.latents.clone(), rows, ends.ends, ends.probes)
    for index, of_call in enumerate(ends.calls):
        call = recorded.calls[index]
        error = SIZE * torch.randn(call.output.shape, generator=torch.Generator().manual_seed(index)).double()
        moved = _moved(pipe, index, error) - recorded.latents
        for weight, adjoint in zip(weights, of_call.adjoints, strict=True):
            true = (moved * weight).flatten(1).sum(1)[ends.pictures]
            of_rows = (error[call.rows_of(ends.pictures)] * adjoint).flatten(1).sum(1)
            torch.testing.assert_close(of_rows.unflatten(0, (-1, len(true))).sum(0), true, rtol=0.05, atol=0.05 * SIZE)


SCHEDULERS = {
    "DDIM": lambda config: DDIMScheduler.from_config(config),
    "DPM++ multistep": lambda config: DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++"),
    "Euler ancestral": lambda config: EulerAncestralDiscreteScheduler.from_config(config),
    "UniPC": lambda config: UniPCMultistepScheduler.from_config(config),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_adjoint_is_what_errors_do_to_the_latents_whatever_the_scheduler(name: str, pipe: Any) -> None:
    pipe.scheduler = scheduler = SCHEDULERS[name](pipe.scheduler.config)
    recorded = record_trajectory(pipe, PROMPTS, SETTINGS)
    _agrees(pipe, recorded, _adjoint(pipe, recorded, probes=1))
    assert pipe.scheduler is scheduler
    assert torch.is_grad_enabled()
    with torch.no_grad():
        _adjoint(pipe, recorded, probes=1)
        assert not torch.is_grad_enabled()
    assert "forward" not in vars(pipe.unet) | vars(pipe.text_encoder)
    assert torch.equal(draw(pipe, PROMPTS, SETTINGS, "latent")[0], recorded.latents)


def test_guidance_that_is_rescaled_and_a_call_without_gradients_of_its_own_are_gone_through(pipe: Any) -> None:
    class Rescaled(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            step = self.scheduler.step

            def without_gradients(*given: Any, **named: Any) -> Any:
                with torch.no_grad():
                    return step(*given, **named)

            self.scheduler.step = without_gradients
            return super().__call__(*args, guidance_rescale=0.7, **kwargs)

    pipe.__class__ = Rescaled
    recorded = record_trajectory(pipe, PROMPTS, SETTINGS)
    _agrees(pipe, recorded, _adjoint(pipe, recorded, probes=1))


def test_a_call_that_draws_two_pictures_is_one_sample_of_two(pipe: Any) -> None:
    call = {"prompt": "a red circle", "num_images_per_prompt": 2, "guidance_scale": 3.0}
    recorded = record_trajectory(pipe, [call], SETTINGS)
    ends = sampler_adjoint(pipe, recorded, [call], SETTINGS, (0,), probes=1)
    (weight,), scale = _weights(pipe.vae, recorded.latents.clone(), {0: [0, 1]}, (LATENT,), 1)
    assert ends.scale == scale
    for index, of_call in enumerate(ends.calls):
        error = SIZE * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(index)).double()
        true = ((_moved(pipe, index, error, [call]) - recorded.latents) * weight).sum()
        torch.testing.assert_close((error * of_call.adjoints[0]).sum(), true, rtol=0.05, atol=0.05 * SIZE)


def test_pictures_that_are_not_asked_for_cost_nothing_and_chunks_of_prompts_change_nothing(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = record_trajectory(pipe, PROMPTS, SETTINGS)
    both, second = _adjoint(pipe, together, ends=(LATENT, PICTURE)), _adjoint(pipe, together, (1,))
    monkeypatch.setattr(drawings, "PROMPTS_AT_ONCE", 1)
    apart = _adjoint(pipe, record_trajectory(pipe, PROMPTS, SETTINGS), ends=(LATENT, PICTURE))
    assert (both.pictures, second.pictures, apart.pictures) == ([0, 1], [1], [0, 1])
    for index in range(SETTINGS.num_inference_steps):
        torch.testing.assert_close(second.calls[index].adjoints, both.calls[index].adjoints[:2, [1, 3]])
        first, last = apart.calls[index].adjoints, apart.calls[index + SETTINGS.num_inference_steps].adjoints
        torch.testing.assert_close(torch.stack([first, last], 2).flatten(1, 2), both.calls[index].adjoints)
    assert apart.scale[LATENT] == pytest.approx(both.scale[LATENT])


def test_a_probe_of_the_picture_comes_through_the_decoder(pipe: Any) -> None:
    recorded = record_trajectory(pipe, PROMPTS, SETTINGS)
    latents = recorded.latents.clone()
    weights, scale = _weights(pipe.vae, latents, {0: [0], 1: [1]}, (PICTURE,), 1)
    error = SIZE * torch.randn(latents.shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        moved = decoded(pipe.vae, latents + error).double() - decoded(pipe.vae, latents).double()
    seeds = (500, 1_000_500)
    signs = [rademacher(torch.empty(3, 16, 16), seed) for seed in seeds]
    true, found = ((a * b).flatten(1).sum(1) for a, b in ((moved, torch.stack(signs)), (error, weights[0])))
    torch.testing.assert_close(found, true, rtol=0.05, atol=SIZE)
    assert scale == {PICTURE: {0: 768.0, 1: 768.0}}


class _Rounding(DDIMScheduler):
    """Takes the output out of torch."""

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(torch.from_numpy(model_output.detach().numpy()), *args, **kwargs)


def test_a_scheduler_without_gradients_is_told_and_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    pipe.scheduler = scheduler = _Rounding.from_config(pipe.scheduler.config)
    recorded = record_trajectory(pipe, PROMPTS, SETTINGS)
    with pytest.raises(NoAdjoint, match="no gradient runs from its latents to"):
        _adjoint(pipe, recorded)
    assert pipe.scheduler is scheduler
    assert "forward" not in vars(pipe.unet)


def test_a_pipeline_that_draws_something_else_each_time_is_told(pipe: Any) -> None:
    recorded = record_trajectory(pipe, PROMPTS, SETTINGS)
    other = SamplingSettings(SETTINGS.num_inference_steps, SETTINGS.guidance_scale, seed=5)
    with pytest.raises(NoAdjoint, match="draws something else the second time: call 0 of its model"):
        sampler_adjoint(pipe, recorded, PROMPTS, other, (0, 1), probes=1)
    more = SamplingSettings(SETTINGS.num_inference_steps, SETTINGS.guidance_scale)
    with pytest.raises(NoAdjoint, match="more often than the 2 times that were recorded"):
        sampler_adjoint(pipe, recorded.at_steps([0, 1]), PROMPTS, more, (0, 1), probes=1)


def test_a_module_in_two_places_of_a_pipeline_is_gone_through(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, components = record_trajectory(pipe, PROMPTS, SETTINGS), type(pipe).components.fget
    twice = property(lambda self: components(self) | {"text_encoder_2": self.text_encoder})
    monkeypatch.setattr(type(pipe), "components", twice)
    assert len(_adjoint(pipe, recorded, probes=1).calls) == SETTINGS.num_inference_steps
    assert "forward" not in vars(pipe.text_encoder)


def test_a_pipeline_without_a_vae_has_no_picture(pipe: Any) -> None:
    recorded = record_trajectory(pipe, PROMPTS, SETTINGS)
    with pytest.raises(NoAdjoint, match="no VAE"):
        sampler_adjoint(SimpleNamespace(unet=pipe.unet), recorded, PROMPTS, SETTINGS, (0,), ends=(PICTURE,), probes=1)
