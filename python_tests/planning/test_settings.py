"""One plan for several settings: all are drawn, scales cover all, and the worst keeps the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings, calibrate
from ldmq_kernels.calibration.drawings import LATENT, draw
from ldmq_kernels.calibration.settings import changed, of_record, recorded, sample_number, setting_of
from ldmq_kernels.conversion.hessian import RecordedHessians
from ldmq_kernels.planning.evaluate import measure_plan
from ldmq_kernels.planning.planner import analyzed, held_out_settings
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.session import PlanResult, Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.output_noise import output_noise
from python_tests.tiny import PROMPTS

BASE = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)
SEVERAL = changed(BASE, [{}, {"guidance_scale": 1.0, "scheduler": "EulerAncestralDiscreteScheduler"}])
LARGER_LATER = changed(BASE, [{}, {"num_inference_steps": 5, "guidance_scale": 1.0}])
DECIBELS = 36.0
FORMATS = ["w8a8-static", "w8a8-dynamic", "fp16"]
Planned = tuple["Pipe", Session, PlanResult]


class Net(nn.Module):
    """Three linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        inner = torch.relu(self.first(sample * (1 + timestep / 1000)))
        return (self.third(torch.relu(self.second(inner))),)


class Pipe:
    """Draws a row of numbers for each prompt; with guidance the model is called with two halves."""

    def __init__(self) -> None:
        self.unet = Net()

    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int,
        guidance_scale: float,
        generator: Sequence[torch.Generator] = (),
        output_type: str = "latent",
    ) -> SimpleNamespace:
        latent = torch.stack([torch.randn(8, generator=one) for one in generator])
        for step in range(num_inference_steps):
            timestep = torch.tensor(1000.0 - 1000 * step / num_inference_steps)
            halves = torch.cat([latent, latent + 0.1]) if guidance_scale > 1 else latent
            (found,) = self.unet(halves, timestep)
            latent = latent - 0.3 * found.chunk(2)[0] if guidance_scale > 1 else latent - 0.3 * found
        return SimpleNamespace(frames=latent)


@pytest.fixture(scope="module")
def planned() -> Planned:
    pipe = Pipe()
    request = PlanRequest([*PROMPTS, "a dog", "a bowl"], None, FORMATS, settings=LARGER_LATER)
    analysis, held_out, words = analyzed(pipe, request)
    session = Session(pipe.unet, analysis, held_out, FORMATS, verified_on=words)
    return pipe, session, session.plan(Target(sqnr_db=DECIBELS))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_samples_have_numbers_of_their_own_and_halves_of_the_calls_stay_apart(count: int) -> None:
    numbers = {(call, at): sample_number(call, at, count) for call in range(5) for at in range(count)}
    assert len(set(numbers.values())) == len(numbers)
    for (call, at), number in numbers.items():
        assert number % 2 == call % 2
        assert setting_of(number, count) == at
        assert count > 1 or number == call


def test_each_setting_is_drawn_as_it_is_drawn_alone(shallow_pipe: StableDiffusionPipeline) -> None:
    together = draw(shallow_pipe, PROMPTS[:1], SEVERAL, LATENT)
    for place, (one, latents) in enumerate(zip(SEVERAL, together, strict=True)):
        seeded = SamplingSettings(**{**recorded(one), "seed": one.seed + 2 * place})
        assert torch.equal(draw(shallow_pipe, PROMPTS[:1], seeded, LATENT)[0], latents)


def test_the_scheduler_of_the_settings_draws_and_the_pipelines_own_is_back(shallow_pipe: Any) -> None:
    own = shallow_pipe.scheduler
    drawn = draw(shallow_pipe, PROMPTS[:1], SEVERAL[1], LATENT)[0]
    assert shallow_pipe.scheduler is own
    shallow_pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config)
    try:
        expected = draw(shallow_pipe, PROMPTS[:1], changed(SEVERAL[1], [{"scheduler": None}]), LATENT)[0]
    finally:
        shallow_pipe.scheduler = own
    assert torch.equal(drawn, expected)
    assert not torch.equal(
        drawn, draw(shallow_pipe, PROMPTS[:1], changed(SEVERAL[1], [{"scheduler": None}]), LATENT)[0]
    )


def test_ranges_cover_all_settings_in_each_half_of_the_prompts(shallow_pipe: StableDiffusionPipeline) -> None:
    both = calibrate(shallow_pipe, PROMPTS, SEVERAL)
    assert both.settings == SEVERAL
    seen = [torch.zeros(4), torch.zeros(4)]
    for call in both.trajectory.calls:
        for prompt in call.prompts:
            largest = call.of_prompts([prompt]).args[0].abs().amax((0, 2, 3))
            seen[prompt % 2] = torch.maximum(seen[prompt % 2], largest)
    assert {setting_of(prompt, 2) for prompt in both.trajectory.prompts} == {0, 1}
    assert torch.allclose(both.absmax_by_fold["conv_in"].amax(1), torch.stack(seen))


def test_the_worst_setting_keeps_the_target_and_the_plan_says_each(planned: Planned) -> None:
    pipe, session, result = planned
    measured = result.plan.measured
    each = [entry["held_out_sqnr_db"] for entry in measured["by_settings"]]
    again = measure_plan(pipe.unet, result.plan, session.held_out)
    for place, one in enumerate(LARGER_LATER):
        alone = [call for call in session.held_out.calls if setting_of(call.prompts[0], 2) == place]
        assert {call.guidance_scale for call in alone} == {4.0 if place == 0 else None}
        noise = measure_plan(pipe.unet, result.plan, replace(session.held_out, calls=alone))
        assert len(noise.by_step) == one.num_inference_steps
        assert noise.mean_db == pytest.approx(each[place], abs=1e-3)
    assert measured["held_out_sqnr_db"] == min(each) >= DECIBELS
    assert min(each) < again.mean_db < max(each)
    assert [entry["guidance_scale"] for entry in measured["by_settings"]] == [4.0, 1.0]
    assert of_record(Plan.from_dict(result.plan.to_dict()).calibration) == LARGER_LATER


def test_gptq_takes_the_inputs_of_all_settings(planned: Planned) -> None:
    pipe, _, result = planned
    plan = Plan.from_dict(result.plan.to_dict())
    name = next(n for n, c in plan.layers(pipe.unet).items() if c.scheme.quantizes)
    plan.details[name] = {"rounding": "gptq"}
    drawn = RecordedHessians(pipe, plan)._trajectory
    assert {setting_of(prompt, 2) for prompt in drawn.prompts} == {0, 1}


def test_one_prompt_at_several_settings_is_judged_on_itself(shallow_pipe: StableDiffusionPipeline) -> None:
    calibration = calibrate(shallow_pipe, PROMPTS[:1], SEVERAL)
    assert calibration.absmax_by_fold == {}
    assert list(calibration.trajectory.by_fold()) == [0]
    assert output_noise(shallow_pipe.unet, calibration.trajectory, by_sample=True).mean_power == 0


def test_one_setting_is_recorded_as_before() -> None:
    assert recorded(BASE) == {"num_inference_steps": 2, "guidance_scale": 4.0, "seed": 0, "height": None, "width": None}
    assert of_record({"mode": "first-step", **recorded(BASE)}) == (BASE,)
    assert [one.seed for one in held_out_settings(SEVERAL)] == [1_000_003] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 4}, r"settings\[0\] has 'steps': it is a mapping with any of num_inference_steps, "),
        ({"num_inference_steps": "4"}, r"settings\[0\] has '4' for num_inference_steps: give a whole number"),
        ({"guidance_scale": True}, r"settings\[0\] has True for guidance_scale: give a number"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0: give at least 1"),
        ("steps", r"settings\[0\] has 'steps'"),
    ],
)
def test_what_is_no_setting_is_refused(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        changed(BASE, [change])


def test_no_settings_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no settings to draw at"):
        changed(BASE, [])


def test_a_scheduler_that_the_pipeline_cannot_have_is_refused_before_it_draws(shallow_pipe: Any) -> None:
    flow = changed(BASE, [{"scheduler": "FlowMatchEulerDiscreteScheduler"}])
    with pytest.raises(ValueError, match=r"'FlowMatchEulerDiscreteScheduler': choose among .*DDIMScheduler, "):
        calibrate(shallow_pipe, PROMPTS, flow)
    with pytest.raises(ValueError, match="choose among none, since it has none"):
        calibrate(SimpleNamespace(unet=shallow_pipe.unet), [{}], flow)


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    from ldmq_kernels.cli.options import sampling

    file = tmp_path / "settings.jsonl"
    file.write_text('{"num_inference_steps": 4}\n\n{"guidance_scale": 1, "scheduler": "DDIMScheduler"}\n')
    found = sampling(30, None, 7, None, None, tmp_path, None, file)
    assert [(one.num_inference_steps, one.guidance_scale, one.seed) for one in found] == [(4, 7.5, 7), (30, 1, 7)]
    file.write_text("")
    with pytest.raises(ValueError, match=r'holds no setting: .* such as {"num_inference_steps": 4}'):
        sampling(30, None, 7, None, None, tmp_path, None, file)
