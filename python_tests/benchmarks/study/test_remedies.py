"""What rounds activations more finely in the study, and how it is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.study import drawn_remedies, remedies
from ldmq_kernels.calibration.adjoint import CallWeights
from ldmq_kernels.calibration.probes import EndRecord


def test_each_remedy_helps_where_it_should() -> None:
    x = torch.rand(2, 9, 64)  # above zero
    x[..., 5] *= 8
    rounds = remedies.remedies(remedies.Seen.of(x))
    noise = {words: float((rounded(x, True) - x).square().sum()) for words, rounded in rounds.items()}
    plain = noise.pop("one scale a token or sample")
    assert {words for words, value in noise.items() if value > plain} == {"its range cut to 0.8"}
    assert noise["a scale for each pixel"] == plain


def test_noise_is_weighted_with_the_square_of_the_adjoint_at_the_input() -> None:
    layer, x = nn.Linear(32, 3, bias=False), torch.randn(4, 32)
    gradient = torch.randn(4, 3)
    record = EndRecord(0, CallWeights(torch.ones(4), torch.ones(4)), x, gradient, gradient[None], (0, 1, 2, 3))
    found = remedies.layer_noise(layer, [record])
    error = remedies.as_it_is(x, True) - x
    wanted = (error.square() * (gradient @ layer.weight.detach()).square()).sum()
    torch.testing.assert_close(found["one scale a token or sample"], float(wanted), rtol=1e-4, atol=0)


def test_the_table_takes_each_remedy_everywhere_and_where_it_is_better() -> None:
    rows = [
        {"model": "demo", "noise": {"one": 1e-3, "other": 1e-4}},
        {"model": "demo", "noise": {"one": 1e-4, "other": 1e-3}},
    ]
    lines = remedies.table({"rows": rows, "device": "a device", "torch": "2"}).splitlines()[-2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [["demo", "one", "29.6", "29.6"], ["demo", "other", "29.6", "37.0"]]


@pytest.mark.parametrize("layer", [nn.Linear(32, 3), nn.Conv2d(32, 3, 3)], ids=["linear", "convolution"])
def test_a_hook_rounds_the_input_along_its_channels(layer: nn.Module) -> None:
    x = torch.randn(2, 9, 32) if isinstance(layer, nn.Linear) else torch.randn(2, 32, 5, 5)
    last = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    found = remedies.remedies(remedies.Seen.of(last))["Hadamard rotation"]
    expected = found(last, isinstance(layer, nn.Linear))
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(drawn_remedies.rounding(found))
    layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    layer(x)
    assert torch.equal(seen[0], expected if isinstance(layer, nn.Linear) else expected.movedim(-1, 1))
    assert not torch.equal(seen[0], x)


def test_an_error_that_is_fed_back_averages_out_over_steps_and_is_forgotten_with_other_pictures() -> None:
    layer, x = nn.Linear(32, 3), torch.randn(2, 9, 32)
    hook = drawn_remedies.FedBack(remedies.as_it_is)
    look = drawn_remedies._forgetting([hook])
    once = remedies.as_it_is(x, True)
    given = []
    for timestep in range(40, 0, -1):
        look(layer, (), {"timestep": timestep})
        given.append(hook(layer, (x,))[0])
    assert torch.equal(given[0], once)
    mean = torch.stack(given).mean(0)
    assert float((mean - x).abs().amax()) < 0.1 * float((once - x).abs().amax())
    look(layer, (x, torch.tensor([40.0])), {})
    assert torch.equal(hook(layer, (x,))[0], once)
