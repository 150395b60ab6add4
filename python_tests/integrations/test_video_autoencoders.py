"""Video autoencoders: 3-D convolutions with forwards and caches of their own, quantized inside, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLMagvit, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import summarize
from ldmq_kernels.nn import QuantConv3d, QuantizedLayer, product_of_layer, quantized_class
from ldmq_kernels.nn.kinds import watch_product
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import FORMER_KINDS, fingerprint, quantizable_layers
from ldmq_kernels.plans.plan import uniform_plan

FLOOR_DB = 30.0  # of each layer's own output


def wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4
    )


def cogvideox() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )


def magvit() -> AutoencoderKLMagvit:
    return AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"],
        layers_per_block=1,
        norm_num_groups=8,
    )


def made(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build().eval()


@torch.no_grad()
def drawn(model: Any) -> Tensor:
    """A clip of 5 frames, encoded and decoded."""
    video = torch.rand(1, 3, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    sample: Tensor = model(video).sample
    return sample


@pytest.mark.parametrize("build", [wan, cogvideox, magvit])
def test_every_convolution_is_quantized_and_comes_back_from_disk(build: Callable[[], Any], tmp_path: Path) -> None:
    model = made(build)
    exact, floats = drawn(model), dict(model.named_modules())
    model = copy.deepcopy(model)
    ldmq.quantize(model, scheme="w8a8-dynamic")
    summary = summarize(model)
    assert summary.quantized_convolutions == summary.convolutions > 10
    assert summary.in_float == ()
    worst = [float("inf")]

    def compare(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            given, state = args, vars(floats[name])
            state.update({key: value for key, value in kept.pop(layer).items() if key == "prev_features"})
            worst[0] = min(worst[0], ldmq.sqnr_db(floats[name](*given), output))

        return hook

    kept: dict[nn.Module, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.register_forward_pre_hook(lambda layer, _: kept.update({layer: dict(vars(layer))}))
            layer.register_forward_hook(compare(name))
    out = drawn(model)
    assert worst[0] > FLOOR_DB
    assert out.shape == exact.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(drawn(type(model).from_pretrained(tmp_path).eval()), out)


def causal() -> tuple[WanCausalConv3d, Tensor, Tensor]:
    torch.manual_seed(0)
    frames = torch.randn(1, 8, 4, 5, 6)
    return WanCausalConv3d(8, 12, 3, padding=1).eval(), frames[:, :, :2], frames[:, :, 2:]


def test_a_causal_convolution_keeps_its_own_forward_and_is_still_of_its_class() -> None:
    layer, before, x = causal()
    cls = quantized_class(layer)
    assert issubclass(cls, WanCausalConv3d) and issubclass(cls, QuantConv3d)  # noqa: PT018
    quantized: Any = cls.from_float(layer, SCHEMES["w8a8-dynamic"])
    with torch.no_grad():
        for arguments in ((x,), (x, before)):
            out = quantized(*arguments)
            assert ldmq.sqnr_db(layer(*arguments), out) > FLOOR_DB
            again = copy.deepcopy(quantized)
            again.requantize(quantized.weight, quantized.bias)
            for copied in (again, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
                assert type(copied) is cls
                assert torch.equal(copied(*arguments), out)


def test_what_is_watched_is_the_product_of_the_prepared_input() -> None:
    layer, before, x = causal()
    seen: list[tuple[Tensor, Tensor]] = []
    handle = watch_product(layer, lambda _layer, args, _kwargs, output: seen.append((args[0], output)))
    with torch.no_grad():
        out = layer(x, before)
        handle.remove()
        layer(x)
        ((prepared, output),) = seen
        assert prepared.shape == (1, 8, 4, 7, 8)
        assert torch.equal(output, out)
        assert torch.equal(product_of_layer(layer, prepared), out)
        quantized = quantized_class(layer).from_float(layer, SCHEMES["w8a16"])
        assert ldmq.sqnr_db(product_of_layer(quantized, prepared), out) > FLOOR_DB


def test_what_replaced_the_product_is_watched_and_kept() -> None:
    layer, _, x = causal()
    with torch.no_grad():
        layer._conv_forward = lambda x, weight, bias: nn.functional.conv3d(x, weight) * 2  # as tiling does
        wanted, seen = layer(x), []
        handle = watch_product(layer, lambda _layer, _args, _kwargs, output: seen.append(output))
        layer(x)
        handle.remove()
        assert torch.equal(seen[0], wanted)
        assert torch.equal(layer(x), wanted)


def test_a_plan_from_before_such_layers_had_schemes_leaves_them_in_float(tmp_path: Path) -> None:
    model = made(wan)
    plan = uniform_plan(model, "w8a8-dynamic")
    plan.model["fingerprint"] = fingerprint(model, FORMER_KINDS)
    plan.exceptions = {}
    ldmq.quantize(model, plan)
    kinds = {type(layer).__name__ for layer in quantizable_layers(model).values()}
    assert kinds == {"WanCausalConv3d", "QuantConv2d"}
    assert "is from before such convolutions had schemes" in summarize(made(wan), plan).in_float[0].reason
    out = drawn(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(drawn(AutoencoderKLWan.from_pretrained(tmp_path).eval()), out)
