"""A weight that is rounded once serves every way to scale the activations, to the bit."""

from typing import Any

import pytest
import torch
from torch import nn

from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES

SCALES = {"static": [0.03], "timestep": [0.04, 0.02], "split": [0.03]}


def float_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(70, 33), torch.randn(3, 11, 70)
    return nn.Conv2d(20, 12, 3, padding=1), torch.randn(2, 20, 9, 7)


def quantized(layer: nn.Module, scheme: str, **others: Any) -> Any:
    kind: type[QuantizedLayer] = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    return kind.from_float(layer, SCHEMES[scheme], **others)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic", "split"])
@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_the_same_weight_computes_what_a_layer_of_its_own_does(
    kind: str, form: str, activations: str, smooth: bool
) -> None:
    layer, x = float_layer(kind)
    channels = x.shape[1 if kind == "conv2d" else -1]
    smoothing = torch.exp2(torch.arange(channels) % 3 - 1.0) if smooth else None
    scale = torch.tensor(SCALES[activations]) if activations in SCALES else None
    first_token = kind == "linear" and activations != "split"
    scheme = SCHEMES[f"{form}-dynamic"].with_activations(activations)
    own = quantized(layer, str(scheme), input_scale=scale, smoothing=smoothing, first_token=first_token)
    base = quantized(layer, f"{form}-dynamic", smoothing=smoothing)
    before = base(x)
    shared = base.with_activations(own.scheme, input_scale=scale, first_token=first_token)
    for group in (0, 1) if activations == "timestep" else (0,):
        own.use_timestep_group(group)
        shared.use_timestep_group(group)
        assert torch.equal(shared(x), own(x))
    assert torch.equal(base(x), before)  # the one that it was made of stays as it is
    states = own.state_dict(), shared.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_corrected_bias_is_the_copys_alone() -> None:
    layer, x = float_layer("linear")
    base = quantized(layer, "w8a8-dynamic")
    shared = base.with_activations(base.scheme)
    shared.correct_bias(torch.ones(33))
    assert torch.allclose(shared(x), base(x) + 1)


def test_other_weights_and_other_layers_are_refused() -> None:
    layer, _ = float_layer("linear")
    with pytest.raises(ValueError, match="has another weight"):
        quantized(layer, "w8a8-dynamic").with_activations(SCHEMES["w4a8-dynamic"])
    static = quantized(layer, "w8a8-static", input_scale=torch.tensor([0.1]))
    with pytest.raises(ValueError, match="a plain dynamic layer"):
        static.with_activations(SCHEMES["w8a8-dynamic"])
