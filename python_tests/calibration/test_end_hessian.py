"""The Hessians of the end are those of the gradients by the weight, of probes that go through the whole pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings, record_trajectory
from ldmq_kernels.calibration import adjoint as sampler
from ldmq_kernels.calibration.adjoint import LATENT, PICTURE, CallWeights, EndCall, EndTrajectory, rademacher
from ldmq_kernels.calibration.end_hessian import OWN_SHARE, end_hessian_bytes, end_hessians, ends_to_round_by
from ldmq_kernels.calibration.trajectory import UNetCall
from python_tests.tiny import PROMPTS

SETTINGS = (SamplingSettings(3, 4.0, 5),)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, 5, (3, 2), padding=(1, 0), stride=2, padding_mode="reflect"),
            nn.Linear(5, 4),
        )
        self.idle = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).movedim(1, -1))


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def of_calls(model: Small, runs: list[tuple[int, ...]], steps: int = 2, probes: int = 2) -> EndTrajectory:
    calls = []
    weights = CallWeights(torch.tensor([1.0, 2.0]).double()[:probes], torch.ones(probes).double())
    for run, prompts in enumerate(runs):
        for step in range(steps):
            x = torch.randn(2 * len(prompts), 3, 6, 6, generator=torch.Generator().manual_seed(10 * run + step))
            with torch.no_grad():
                output = model(x)
            adjoints = torch.stack([rademacher(output, 100 * run + 10 * step + probe) for probe in range(probes)])
            calls.append(EndCall(UNetCall(step, (x,), {}, output, prompts, 1.0), adjoints, weights))
    return EndTrajectory(calls, (LATENT,), probes, {LATENT: {}})


def gradients(model: Small, name: str, ends: EndTrajectory) -> list[Tensor]:
    """Of each picture and probe by the weight (out, K), by autograd through the whole model."""
    weight, found = model.get_submodule(name).weight, {}
    for of_call in ends.calls:
        for picture in of_call.call.prompts:
            cut, rows = of_call.call.of_prompts([picture]), of_call.call.rows_of([picture])
            for probe, adjoint in enumerate(of_call.adjoints):
                gradient = torch.autograd.grad(model(*cut.args), weight, adjoint[rows])[0]
                gradient = (gradient.movedim(1, -1) if gradient.dim() == 4 else gradient).flatten(1)
                key = picture, probe
                found[key] = found.get(key, 0) + gradient * of_call.weights.amplitude[probe].float()
    return list(found.values())


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_factors_are_of_what_pictures_and_probes_add_up_to(model: Small, name: str) -> None:
    ends = of_calls(model, [(0, 1), (2, 3, 4)])
    width = model.get_submodule(name).weight[0].numel()
    plain = torch.diag(torch.rand(width, generator=torch.Generator().manual_seed(1)))
    found = end_hessians(model, ends, {name: plain})[name]
    every = torch.stack(gradients(model, name, ends))
    inputs, outputs = torch.einsum("nok,noj->kj", every, every), torch.einsum("nok,npk->op", every, every)
    expected = inputs / inputs.diagonal().mean() + plain / plain.diagonal().mean()
    assert torch.allclose(found.inputs, expected, rtol=1e-3, atol=1e-4)
    expected = outputs / outputs.diagonal().mean() + OWN_SHARE * torch.eye(len(outputs))
    assert torch.allclose(found.outputs, expected, rtol=1e-3, atol=1e-4)


def test_a_layer_that_does_not_reach_the_end_is_rounded_by_its_inputs(model: Small) -> None:
    plain = torch.diag(torch.tensor([1.0, 3.0]))
    found = end_hessians(model, of_calls(model, [(0,)]), {"idle": plain})["idle"]
    assert torch.equal(found.inputs, plain / 2)
    assert torch.equal(found.outputs, OWN_SHARE * torch.eye(3))


def test_the_bytes_are_of_a_runs_gradients_and_both_hessians(model: Small) -> None:
    ends = of_calls(model, [(0, 1), (2, 3, 4)])
    assert end_hessian_bytes(model.second, ends) == 4 * (3 * 2 * 20 + 2 * 25 + 16)


def test_a_small_model_is_seen_by_all_its_pictures_and_a_large_one_by_the_first_latents(
    shallow_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [*PROMPTS, "a dog"]
    monkeypatch.setattr("ldmq_kernels.calibration.end_hessian.PROBES", 1)
    monkeypatch.setattr("ldmq_kernels.calibration.end_hessian.LARGE_CALLS", 2)
    trajectory = record_trajectory(shallow_pipe, prompts, SETTINGS)
    whole = ends_to_round_by(shallow_pipe, trajectory, prompts, SETTINGS)
    assert (whole.ends, whole.pictures, len(whole.calls)) == ((PICTURE,), [0, 1, 2], 3)
    monkeypatch.setattr(sampler, "WHOLE_MODEL", 10)
    large = ends_to_round_by(shallow_pipe, trajectory, prompts, SETTINGS)
    assert (large.ends, large.pictures) == ((LATENT,), [0, 1])
    assert [of_call.call.step for of_call in large.calls] == [0, 2]
    assert replace(large, calls=[]).probes == 1
