"""Whoever moves or writes a model by its parameters and buffers, to offload or export it, gets all that layers read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import Packer
from ldmq_kernels.nn import QuantLinear, timestep_groups
from ldmq_kernels.nn.packed import unpacked
from ldmq_kernels.numerics.formats import SCHEMES


class Model(nn.Module):
    def __init__(self, scheme: str, scales: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        smoothing = torch.exp2(torch.arange(8) % 3 - 1.0)
        self.linear = QuantLinear.from_float(
            nn.Linear(8, 4), SCHEMES[scheme], input_scale=torch.tensor(scales), smoothing=smoothing
        )

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        """(..., 8) to (..., 4)."""
        return self.linear(x)


def move(layer: nn.Module, device: str | None, kept: dict[str, torch.Tensor]) -> None:
    """As accelerate and diffusers do: the tensors, one by one, and not by `layer.to`."""
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[name] = kept[name] if device is None else buffer.to(device)


@pytest.mark.parametrize(("scheme", "scales"), [("w8a8-static", [0.03]), ("w8a8-timestep", [0.06, 0.03])])
def test_calibrated_scales_follow_the_buffers(scheme: str, scales: list[float]) -> None:
    model, x = Model(scheme, scales).requires_grad_(False), torch.randn(3, 8)
    if len(scales) > 1:
        timestep_groups.attach(model, [500.0])
    wanted = model(x, 100.0)
    layer = model.linear
    there = {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
    scale, inverse = layer.call_scale.clone(), layer.input_inv_scale.clone()
    move(layer, "meta", there)
    assert (layer.call_scale.device.type, layer.input_inv_scale.device.type) == ("meta", "meta")
    assert layer.call_scale.shape == scale.shape
    move(layer, None, there)
    assert torch.equal(layer.call_scale, scale)
    assert torch.equal(layer.input_inv_scale, inverse)
    assert torch.equal(model(x, 100.0), wanted)


OPAQUE = Packer(
    "a test",
    lambda weight: weight.is_mkldnn,
    lambda weight, _multiplier, _channels: weight.float().to_mkldnn(),
    lambda packed, _multiplier, _outputs: packed.to_dense().to(torch.int8),
)


@torch.no_grad()
def test_a_model_whose_weights_are_packed_is_exported_and_saved_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Model("w8a8-static", [0.03]), torch.randn(3, 8)
    wanted, stored = model(x, 1.0), model.linear.plain_weight.clone()
    monkeypatch.setattr(dispatch, "packer", lambda *_: OPAQUE)
    model.linear.unpack()
    model.linear.pack()
    assert model.linear.packed_weight.is_mkldnn
    with unpacked(model):
        program = torch.export.export(model, (x, 1.0), strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x, 1.0), wanted)
    assert model.linear.packed_weight.is_mkldnn
    with unpacked(model):
        model.to("cpu")  # which packs what is moved
    assert model.linear.packed_weight.is_mkldnn
    assert torch.equal(model.linear.plain_weight, stored)
