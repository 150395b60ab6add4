"""A pipeline is drawn with prompts, with its own calls and by functions, and what it is called with is what is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings, calibrate, record_trajectory
from ldmq_kernels.calibration.denoisers import chosen, denoiser, denoisers
from ldmq_kernels.calibration.drawings import drawings, given_calls, texts_of
from ldmq_kernels.calibration.outputs import as_pictures, output_of
from ldmq_kernels.calibration.trajectory import folds_of_rows, replay

PLAIN = SamplingSettings(None, None)


class Net(nn.Module):
    """Takes its residuals out of the list that it is given, as UNets do with those of a T2I-Adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, residuals: list[Tensor]) -> tuple[Tensor]:
        return (self.outer(self.inner(input=self.inner(sample) + residuals.pop()) * timestep / 1000),)


class Pipe:
    """Draws a row of four numbers for each picture."""

    def __init__(self) -> None:
        self.unet, self.runs = Net(), 0

    def __call__(
        self,
        image: Tensor | None = None,
        *,
        strength: float = 1.0,
        timesteps: tuple[float, ...] = (900.0, 500.0),
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        self.runs += 1
        latent = torch.randn(1, 4, generator=generator) if image is None else image * strength
        for timestep in timesteps:
            (latent,) = self.unet(latent, torch.tensor(timestep), residuals=[torch.ones(1, 4)])
        return SimpleNamespace(frames=latent)


class Unseeded(Pipe):
    """Takes no generator."""

    def __call__(self, prompt: list[str]) -> SimpleNamespace:
        return SimpleNamespace(frames=torch.randn(len(prompt), 4))


def test_what_a_call_is_recorded_with_is_what_the_model_got(shared_pipe: Any) -> None:
    pipe = Pipe()
    trajectory = record_trajectory(pipe, [{"image": torch.ones(1, 4)}, {}], PLAIN)
    assert [len(call.kwargs["residuals"]) for call in trajectory.calls] == [1] * 4
    for _ in range(2):  # replays take nothing out of it either
        for call, output in replay(pipe.unet, trajectory):
            assert torch.equal(output, call.output)


def test_calls_are_drawn_as_the_pipeline_draws_them_from_seeds_that_count_up() -> None:
    pipe = Pipe()
    drawn = record_trajectory(pipe, [{}, {"strength": 0.5}], SamplingSettings(None, None, seed=7)).latents
    expected = [pipe(generator=torch.Generator().manual_seed(7 + index)).frames for index in range(2)]
    assert torch.equal(drawn, torch.cat(expected))


def test_a_generator_that_a_call_gives_draws_the_same_each_time() -> None:
    generator = torch.Generator().manual_seed(3)
    call, state = {"generator": generator}, generator.get_state()
    first, second = (record_trajectory(Pipe(), [call], PLAIN).latents for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(generator.get_state(), state)


def test_a_function_is_seeded_and_draws_as_a_call_does() -> None:
    pipe, before = Pipe(), torch.get_rng_state()

    def loop(pipe: Pipe) -> Tensor:
        return pipe(timesteps=(700.0,)).frames

    settings = SamplingSettings(None, None, seed=2)
    first, second = (record_trajectory(pipe, [loop, loop], settings) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents[0], first.latents[1])
    assert first.timesteps() == [700.0]
    assert [call.prompts for call in first.calls] == [(0,), (1,)]
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_cannot_reach_a_function() -> None:
    with pytest.raises(ValueError, match="leave num_inference_steps out"):
        record_trajectory(Pipe(), [lambda pipe: pipe()], SamplingSettings(20, None))


def test_runs_of_different_timesteps_are_put_in_the_order_of_time() -> None:
    calls = [{"timesteps": (900.0, 500.0)}, {"timesteps": (700.0, 500.0, 100.0)}]
    calibration = calibrate(Pipe(), calls, PLAIN)
    trajectory = calibration.trajectory
    assert trajectory.timesteps() == [900.0, 700.0, 500.0, 100.0]
    assert [(call.step, *call.prompts) for call in trajectory.calls] == [(0, 0), (2, 0), (1, 1), (2, 1), (3, 1)]
    for call in trajectory.calls:
        seen = calibration.absmax_by_fold["outer"][call.prompts[0], call.step]
        expected = Pipe().unet.inner(Pipe().unet.inner(call.args[0]) + 1) * call.timestep / 1000
        assert torch.allclose(seen, expected.abs().amax(0))


def test_a_layer_that_runs_twice_has_the_range_and_the_operations_of_both() -> None:
    calibration = calibrate(Pipe(), [{}], PLAIN)
    assert calibration.operations == {"inner": 2 * 16, "outer": 16}
    sample = calibration.trajectory.calls[0].args[0]
    second = Pipe().unet.inner(sample) + 1
    seen = torch.maximum(sample.abs(), second.abs()).amax(0)
    assert torch.allclose(calibration.input_absmax("inner"), seen)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"strenght": 0.5}, r"calls\[1\]: Pipe takes no 'strenght' \(did you mean strength\?\); it takes image, st"),
        ({3: 0.5}, r"calls\[1\] has an argument whose name is no text: 3"),
        (17, r"calls\[1\] is a int: give a mapping"),
        ("a cat", r"Pipe draws no prompts: give calls=\[dict\(...\), ...\] with what it takes: image"),
    ],
    ids=str,
)
def test_what_the_pipeline_does_not_take_is_refused_before_anything_is_drawn(call: Any, words: str) -> None:
    pipe = Pipe()
    with pytest.raises(ValueError, match=words):
        record_trajectory(pipe, [{}, call], PLAIN)
    assert pipe.runs == 0


def test_a_call_that_never_reaches_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="'call 1': drawing it never calls the model"):
        record_trajectory(Pipe(), [{"timesteps": ()}], PLAIN)


def test_prompts_are_drawn_together_and_all_else_alone() -> None:
    prompts = [f"prompt {index}" for index in range(10)]
    runs = drawings([*prompts, {"prompt": "a call"}, "last"], PLAIN)
    assert [run.samples for run in runs] == [tuple(range(8)), (8, 9), (10,), (11,)]
    assert runs[2].names == ["a call"]


def test_some_of_the_prompts_of_a_run_are_drawn_alone_as_in_it(shallow_pipe: Any) -> None:
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=2.0, seed=7)
    (whole,) = drawings(["a cat", "a dog", "a blue bowl"], settings)
    part = whole.of_samples(shallow_pipe, [0, 2])
    assert part is not None
    assert (part.names, part.samples) == (["a cat", "a blue bowl"], (0, 2))
    latents, alone = whole.run(shallow_pipe, "latent"), part.run(shallow_pipe, "latent")
    assert latents is not None
    torch.testing.assert_close(alone, latents[[0, 2]], rtol=1e-4, atol=1e-4)
    assert whole.of_samples(shallow_pipe, range(3)) is whole
    assert whole.of_samples(Unseeded(), [0]) is None  # what it draws may depend on how many there are


def test_one_way_to_say_what_is_drawn_is_needed() -> None:
    assert given_calls("a cat", None, None) == ("a cat",)
    assert given_calls(None, {"prompt": "a cat"}, None) == ({"prompt": "a cat"},)
    with pytest.raises(ValueError, match="nothing given: give prompts, or calls="):
        given_calls(None, None, None)
    with pytest.raises(ValueError, match="prompts and calls given"):
        given_calls("a cat", [{}], None)


def test_texts_of_calls_are_found_wherever_they_are() -> None:
    calls = ["a", {"prompt": ["b", "c"], "negative_prompt": "d", "strength": 0.5}, len]
    assert texts_of(calls) == ["a", "b", "c", "d"]


def test_rows_belong_to_their_sample_also_as_frames_and_in_halves() -> None:
    assert folds_of_rows(4, (0, 1)) == (0, 1, 0, 1)  # two halves of guidance
    assert folds_of_rows(8, (0, 1), batch=4) == (0, 0, 1, 1, 0, 0, 1, 1)  # of two frames each
    assert folds_of_rows(6, (0, 1), batch=2) == (0, 0, 0, 1, 1, 1)
    assert folds_of_rows(5, (3,)) == (1,) * 5  # whatever one call draws
    assert folds_of_rows(5, (0, 1), batch=4) == ()


def test_outputs_of_any_kind_become_tensors() -> None:
    from PIL import Image

    red = Image.new("RGB", (4, 2), (255, 0, 0))
    assert output_of(SimpleNamespace(images=[red, red])).shape == (2, 2, 4, 3)  # type: ignore[union-attr]
    assert output_of(([[red] * 5],)).shape == (1, 5, 2, 4, 3)  # type: ignore[union-attr]
    assert output_of(None) is None
    pictures = as_pictures(output_of(([[red] * 5],)))  # type: ignore[arg-type]
    assert pictures.shape == (1, 3, 2, 4)
    assert pictures[0, :, 0, 0].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="no pictures"):
        as_pictures(torch.zeros(2, 4, 8, 8))


def test_a_call_of_a_real_pipeline_with_a_picture(shallow_pipe: Any) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**shallow_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": "a red cat", "image": torch.rand(1, 3, 16, 16, generator=generator), "num_inference_steps": 4}
    trajectory = record_trajectory(pipe, [call | {"strength": 0.5}, call | {"strength": 0.75}], PLAIN)
    assert trajectory.timesteps() == [501, 251, 1]
    assert {unet_call.guidance_scale for unet_call in trajectory.calls} == {7.5}
    drawn = pipe(**call, strength=0.5, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.equal(trajectory.outputs[0], drawn)


def test_what_the_pipeline_switches_in_the_model_is_as_it_was_at_each_call() -> None:
    pipe = Pipe()
    first, second = object(), object()

    def loop(pipe: Pipe) -> Tensor:
        latent = torch.ones(1, 4)
        for enabled, processor in ((True, first), (False, second)):
            pipe.unet.inner.enabled, pipe.unet.inner.processor = enabled, processor
            (latent,) = pipe.unet(latent, torch.tensor(500.0), residuals=[torch.ones(1, 4)])
        return latent

    def seen(inner: Any, *_: Any) -> None:
        states.append((inner.enabled, inner.processor))

    trajectory = record_trajectory(pipe, [loop], PLAIN)
    states: list[tuple[bool, object]] = []
    pipe.unet.inner.register_forward_pre_hook(seen)
    assert len(list(replay(pipe.unet, trajectory))) == 2
    assert states == [(True, first)] * 2 + [(False, second)] * 2
    assert (pipe.unet.inner.enabled, pipe.unet.inner.processor) == (False, second)


def test_denoisers_are_found_by_name_and_a_decoder_by_what_it_takes() -> None:
    class Wrapped(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None:
            """As a compiled model takes its arguments."""

    transformer, decoder = Wrapped(), Net()
    pipe = SimpleNamespace(transformer=transformer, transformer_2=None, decoder=nn.Linear(2, 2), vae=nn.Linear(2, 2))
    assert denoisers(pipe) == {"transformer": transformer}
    pipe.decoder = decoder
    assert denoisers(pipe) == {"transformer": transformer, "decoder": decoder}
    assert denoiser(pipe) is transformer
    assert denoiser(chosen(pipe, "decoder")) is decoder
    with pytest.raises(TypeError, match="has neither a unet nor a transformer"):
        denoiser(SimpleNamespace(vae=decoder))
