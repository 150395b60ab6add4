"""The Hessians are the second moments of what each layer multiplies its weight with."""

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels.calibration import SamplingSettings, record_trajectory
from ldmq_kernels.calibration.hessian import input_hessians
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall
from python_tests.tiny import PROMPTS

ALL_ROWS = 10**6

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def _trajectory(*inputs: Tensor) -> Trajectory:
    calls = [UNetCall(step, (x,), {}, torch.empty(0)) for step, x in enumerate(inputs)]
    return Trajectory(calls, torch.empty(0), len(inputs))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unfolded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(N * P * Q, R * S * C), by torch's unfold, which orders (C, R, S)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    rows = nn.functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    return rows.unflatten(2, (layer.in_channels, taps)).transpose(2, 3).flatten(2).flatten(0, 1)


CONVOLUTIONS = [
    nn.Conv2d(3, 4, 3, padding=1),
    nn.Conv2d(5, 4, 1),
    nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 3)),
    nn.Conv2d(3, 4, (2, 4), padding="same"),
    nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
    nn.Conv2d(3, 4, 3, padding=(1, 2), stride=2, padding_mode="circular"),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_a_convolution_against_an_explicit_unfold(layer):
    inputs = _random(2, layer.in_channels, 9, 8), _random(1, layer.in_channels, 7, 11)
    found = input_hessians(nn.Sequential(layer), _trajectory(*inputs), ["0"], rows_per_call=ALL_ROWS)["0"]
    rows = torch.cat([_unfolded(layer, x) for x in inputs]).double()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), rows.t() @ rows, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_the_weight_in_that_order_gives_the_output_power(layer):
    x = _random(2, layer.in_channels, 9, 8)
    found = input_hessians(nn.Sequential(layer), _trajectory(x), ["0"], rows_per_call=ALL_ROWS)["0"]
    weight = layer.weight.detach().permute(0, 2, 3, 1).flatten(1)
    power = (layer(x) - layer.bias[:, None, None]).detach().square().sum((0, 2, 3))
    assert torch.allclose(((weight @ found) * weight).sum(1), power, rtol=1e-4)


def test_a_picture_without_a_batch_is_one_of_a_batch():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), _random(3, 6, 6)
    alone = input_hessians(model, _trajectory(x), ["0"], rows_per_call=ALL_ROWS)["0"]
    assert torch.equal(alone, input_hessians(model, _trajectory(x[None]), ["0"], rows_per_call=ALL_ROWS)["0"])


def test_a_linear_sums_over_tokens_and_calls():
    inputs = _random(2, 7, 6), _random(3, 6)
    found = input_hessians(nn.Sequential(nn.Linear(6, 4)), _trajectory(*inputs), ["0"])["0"]
    rows = torch.cat([inputs[0].flatten(0, 1), inputs[1]])
    assert torch.allclose(found, rows.t() @ rows, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)], ids=str)
def test_sampled_rows_stand_for_all_and_are_the_same_each_time(layer):
    x = _random(4, 6, 32, 32) if isinstance(layer, nn.Conv2d) else _random(4, 1024, 6)
    model, run = nn.Sequential(layer, nn.Identity()), _trajectory(x, x)
    exact = input_hessians(model, run, ["0"], rows_per_call=ALL_ROWS)["0"]
    sampled = input_hessians(model, run, ["0"], rows_per_call=1000)["0"]
    assert not torch.equal(exact, sampled)
    assert torch.equal(sampled, input_hessians(model, run, ["0"], rows_per_call=1000)["0"])
    largest = exact.diagonal().amax()
    assert ((sampled - exact).abs() < 0.15 * largest).all()


def test_the_rows_sampled_of_a_layer_do_not_depend_on_the_other_layers():
    model, run = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), _trajectory(_random(100, 6))
    both = input_hessians(model, run, ["0", "1"], rows_per_call=10)
    assert torch.equal(both["1"], input_hessians(model, run, ["1"], rows_per_call=10)["1"])


def test_a_layer_that_is_never_called_has_seen_nothing():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = input_hessians(Idle(), _trajectory(_random(4, 3)), ["used", "idle"])
    assert not found["idle"].any()
    assert found["idle"].shape == (5, 5)
    assert found["used"].any()


def test_a_unet_gives_them_for_every_layer_and_is_left_as_it_was(shared_pipe):
    trajectory = record_trajectory(shared_pipe, PROMPTS, SamplingSettings(2, 4.0, 5))
    names = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    found = input_hessians(shared_pipe.unet, trajectory, names)
    for name in names:
        weight = shared_pipe.unet.get_submodule(name).weight
        assert found[name].shape == (weight[0].numel(),) * 2
        assert torch.linalg.eigvalsh(found[name].double()).amin() > -1e-3 * found[name].diagonal().mean()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shared_pipe.unet.modules())


def test_what_cannot_be_recorded_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU())
    with pytest.raises(ValueError, match="0 is a grouped convolution"):
        input_hessians(model, _trajectory(), ["0"])
    with pytest.raises(ValueError, match="1 is not a linear or convolution"):
        input_hessians(model, _trajectory(), ["1"])
    bad = _random(2, 3)
    bad[1, 1] = float("nan")
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="0: its input holds NaN"):
        input_hessians(model, _trajectory(bad), ["0"])
    assert not model[0]._forward_hooks
