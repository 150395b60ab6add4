"""Blocks in fused form: the fused ops are called, the result stays, and anything on top of the layers turns it off."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import FUSED, PLAIN, fuse, unfuse
from ldmq_kernels.integrations.diffusers.fused.transformer_block import FusedBasicTransformerBlock
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.cpu import packing, products
from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record, uniform_plan
from python_tests.tiny import TEXT_WIDTH, mixed_plan, run_unet, tiny_unet

SCHEMES = ("w8a8-dynamic", "w4a8-dynamic", "w8a8-static", "w4a8-static")
OF_TRANSFORMERS = ("FluxTransformerBlock", "FluxSingleTransformerBlock", "WanTransformerBlock", "JointTransformerBlock")
OF_UNETS = {fused for fused in PLAIN if fused.__name__ not in OF_TRANSFORMERS}
NEAR = 60.0  # dB between fused and unfused: other orders of float sums, and the ties that they turn over


def static_plan(unet: nn.Module, scheme: str) -> Plan:
    """One scale for all inputs, without a calibration."""
    plan = Plan(model_record(unet), [{"pattern": "*", "scheme": scheme}])
    plan.input_scales.update(dict.fromkeys(quantizable_layers(unet), 0.03))
    return plan


def quantized_unet(scheme: str = "w8a8-dynamic") -> nn.Module:
    unet = tiny_unet()
    if scheme.endswith("static"):
        convert(unet, static_plan(unet, scheme))
    else:
        convert(unet, uniform_plan(unet, scheme) if scheme != "mixed" else mixed_plan(unet))
    return unet


def served(run: Callable[[], Any]) -> Counter[str]:
    """How often each op was served while `run` ran."""
    dispatch.reset_dispatch_report()
    run()
    lines = dispatch.dispatch_report().splitlines()
    return Counter({line.split()[0]: int(line.split()[-2]) for line in lines if line.endswith("calls")})


def unfused_output(unet: nn.Module) -> Tensor:
    plain = unfuse(copy.deepcopy(unet))
    assert not any(type(module) in PLAIN for module in plain.modules())
    return run_unet(plain)


@pytest.mark.parametrize("scheme", [*SCHEMES, "mixed", "w8a16"])
@pytest.mark.usefixtures("as_unfused")
def test_a_fused_unet_computes_what_the_unfused_one_does(scheme: str) -> None:
    unet = quantized_unet(scheme)
    assert float(sqnr_db(unfused_output(unet), run_unet(unet))) > NEAR


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fused_unet_is_as_near_to_the_float_one_as_the_unfused(scheme: str) -> None:
    exact = run_unet(tiny_unet())
    unet = quantized_unet(scheme)
    assert float(sqnr_db(exact, run_unet(unet))) > float(sqnr_db(exact, unfused_output(unet))) - 2


def test_every_kind_of_block_is_fused_by_conversion() -> None:
    kinds = {type(module) for module in quantized_unet().modules()}
    assert kinds >= OF_UNETS
    assert not kinds & set(FUSED)


def test_a_loaded_unet_is_fused(tmp_path: Any) -> None:
    unet = quantized_unet()
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    assert {type(m) for m in loaded.modules()} >= OF_UNETS
    assert torch.equal(run_unet(loaded), run_unet(unet))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("as_unfused")
def test_the_fused_ops_serve_all_norms_and_activations(scheme: str) -> None:
    unet = quantized_unet(scheme)
    names = Counter(type(module).__name__ for module in unet.modules())
    blocks, resnets = names["BasicTransformerBlock"], names["ResnetBlock2D"]
    counts = served(lambda: run_unet(unet))
    assert counts["group_norm_silu_quantize"] == 2 * resnets + names["Transformer2DModel"]
    assert counts["layer_norm_quantize"] == 3 * blocks
    assert counts["geglu_quantize"] == blocks
    assert counts["silu_quantize"] == resnets
    if scheme.endswith("static"):
        return
    # the text once for k and v, the attentions' outputs, proj_out, shortcuts, and the time embedding's two layers
    shortcuts = sum(getattr(module, "conv_shortcut", None) is not None for module in unet.modules())
    assert counts["quantize_per_token"] == 3 * blocks + names["Transformer2DModel"] + shortcuts + 2
    assert served(lambda: unfused_output(unet))["layer_norm_quantize"] == 0


def test_no_layer_norm_runs_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = quantized_unet()
    wanted = run_unet(unet)
    monkeypatch.setattr(nn.LayerNorm, "forward", None)
    assert torch.equal(run_unet(unet), wanted)


@pytest.mark.parametrize("name", ["conv1", "norm2", "nonlinearity", "time_emb_proj"])
@pytest.mark.usefixtures("as_unfused")
def test_a_hook_inside_a_residual_block_is_called(name: str) -> None:
    unet = quantized_unet()
    block = next(module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D")
    seen: list[Any] = []
    block.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    out = run_unet(unet)
    assert seen
    assert float(sqnr_db(unfused_output(unet), out)) > NEAR


@pytest.mark.parametrize("name", ["attn1", "attn1.to_k", "attn2.to_out.0", "ff", "ff.net.0.proj", "ff.net.2", "norm3"])
@pytest.mark.usefixtures("as_unfused")
def test_a_hook_inside_a_transformer_block_is_called(name: str) -> None:
    unet = quantized_unet()
    block = next(module for module in unet.modules() if isinstance(module, FusedBasicTransformerBlock))
    seen: list[Any] = []
    block.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    out = run_unet(unet)
    assert seen
    assert float(sqnr_db(unfused_output(unet), out)) > NEAR


@pytest.mark.usefixtures("as_unfused")
def test_another_attention_processor_is_used() -> None:
    unet = quantized_unet()
    calls: list[int] = []

    class Own(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    unet.set_attn_processor(Own())
    out = run_unet(unet)
    assert calls
    assert float(sqnr_db(unfused_output(unet), out)) > 40


def test_masks_reach_the_attention() -> None:
    block = next(m for m in quantized_unet().modules() if isinstance(m, FusedBasicTransformerBlock))
    width = block.norm1.normalized_shape[0]
    x, context = torch.randn(2, 16, width), torch.randn(2, 40, block.attn2.to_k.in_features)
    mask = torch.zeros(2, 1, 40)
    mask[..., 20:] = -10000.0
    with torch.no_grad():
        out = block(x, encoder_hidden_states=context, encoder_attention_mask=mask)
        short = block(x, encoder_hidden_states=context[:, :20])
        free = block(x, encoder_hidden_states=context)
        plain = unfuse(copy.deepcopy(block))(x, encoder_hidden_states=context, encoder_attention_mask=mask)
    assert float(sqnr_db(short, out)) > NEAR
    assert float(sqnr_db(plain, out)) > NEAR
    assert float(sqnr_db(free, out)) < NEAR


RESNET, TRANSFORMER = "down_blocks.0.resnets.0", "mid_block.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("place", "names"),
    [
        *((RESNET, [name]) for name in ("conv1", "conv2", "time_emb_proj")),
        *((TRANSFORMER, [name]) for name in ("attn1.to_k", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")),
        (RESNET, ["conv1", "conv2"]),
    ],
)
def test_a_float_layer_in_a_block_stays_float(place: str, names: list[str]) -> None:
    unet = tiny_unet()
    plan = uniform_plan(unet, "w8a8-dynamic")
    for name in names:
        plan.exceptions[f"{place}.{name}"] = {"scheme": "fp16", "reason": "stays"}
    convert(unet, plan)
    block = unet.get_submodule(place)
    plain = unfuse(copy.deepcopy(block))
    x = (torch.randn(2, 32, 8, 8), torch.randn(2, 128)) if place == RESNET else (torch.randn(2, 16, 64), None)
    more = {} if place == RESNET else {"encoder_hidden_states": torch.randn(2, 7, TEXT_WIDTH)}
    with torch.no_grad():
        assert float(sqnr_db(plain(*x, **more), block(*x, **more))) > NEAR


def test_blocks_keep_their_names_and_survive_copies() -> None:
    unet = quantized_unet()
    wanted = run_unet(unet)
    assert {type(m).__name__ for m in unet.modules()} >= {"ResnetBlock2D", "BasicTransformerBlock"}
    assert all(isinstance(m, PLAIN[type(m)]) for m in unet.modules() if type(m) in PLAIN)
    for clone in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(run_unet(clone), wanted)
        assert {type(m) for m in clone.modules()} >= OF_UNETS


def test_fusing_twice_is_fusing_once() -> None:
    unet = quantized_unet()
    wanted = run_unet(unet)
    assert fuse(fuse(unet)) is unet
    assert torch.equal(run_unet(unet), wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_q_k_and_v_are_one_exact_product_without_a_second_copy(scheme: str) -> None:
    """On a backend that does not pack weights."""
    with dispatch.use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda _: False)
        unet = quantized_unet(scheme)
        block = next(m for m in unet.modules() if isinstance(m, FusedBasicTransformerBlock))
        q, k, v = block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
        assert len({layer.plain_weight.untyped_storage().data_ptr() for layer in (q, k, v)}) == 1
        counts = served(lambda: run_unet(unet))
        fused, saved = run_unet(unet), {name: t.clone() for name, t in unet.state_dict().items()}
        assert torch.equal(unfused_output(unet), fused)
        blocks = sum(isinstance(m, FusedBasicTransformerBlock) for m in unet.modules())
        products = [
            sum(count for op, count in found.items() if op.startswith("linear"))
            for found in (served(lambda: unfused_output(unet)), counts)
        ]
        assert products[0] - products[1] == 3 * blocks
        q.plain_weight[:] = 0
        q.finish()  # as loading does: what was merged is stale, and not used
        assert not torch.equal(run_unet(unet), fused)
        unet.load_state_dict(saved)
        assert torch.equal(run_unet(unet), fused)
        assert served(lambda: run_unet(unet)) == counts
        assert torch.equal(run_unet(unet.to(torch.float64).to(torch.float32)), fused)


@pytest.mark.skipif(not products.serves(), reason="weights are packed in a form that cannot be joined")
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-static"])
def test_packed_weights_of_q_k_and_v_are_joined_without_a_second_copy(scheme: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "join_linear", lambda *_: None)
        packing.packers.cache_clear()
        apart = run_unet(quantized_unet(scheme))
    packing.packers.cache_clear()
    unet = quantized_unet(scheme)
    block = next(m for m in unet.modules() if isinstance(m, FusedBasicTransformerBlock))
    layers = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
    packed = [layer.packed_weight for layer in layers]
    assert len({weight.untyped_storage().data_ptr() for weight in packed if weight is not None}) == 1
    products_of = [
        sum(count for op, count in served(lambda model=model: run_unet(model)).items() if op.startswith("linear"))
        for model in (unfuse(copy.deepcopy(unet)), unet)
    ]
    assert products_of[0] - products_of[1] >= 3 * sum(isinstance(m, FusedBasicTransformerBlock) for m in unet.modules())
    assert torch.equal(run_unet(unet), apart)
    saved = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for clone in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet)), unet.to(torch.float64).to(torch.float32)):
        assert torch.equal(run_unet(clone), apart)
    others = {name: tensor.flip(0) for name, tensor in saved.items() if name.endswith("attn1.to_v.weight")}
    unet.load_state_dict({**saved, **others})
    assert not torch.equal(run_unet(unet), apart)
    unet.load_state_dict(saved)
    assert torch.equal(run_unet(unet), apart)


def test_projections_of_different_scales_are_quantized_apart() -> None:
    unet = quantized_unet()
    block = next(m for m in unet.modules() if isinstance(m, FusedBasicTransformerBlock))
    smoothing = torch.exp2(torch.randint(-1, 2, (block.attn1.to_k.in_features,)).float())
    clone = nn.Linear(block.attn1.to_k.in_features, block.attn1.to_k.out_features, bias=False)
    block.attn1.to_k = QuantLinear.from_float(clone, block.attn1.to_k.scheme, smoothing=smoothing)
    fuse(unet)
    assert float(sqnr_db(unfused_output(unet), run_unet(unet))) > NEAR


@pytest.mark.parametrize("output_size", [None, (10, 14), (9, 13)])
def test_upsampling_is_inside_the_convolution(output_size: tuple[int, int] | None) -> None:
    unet = quantized_unet()
    block = next(m for m in unet.modules() if type(m).__name__ == "Upsample2D")
    x = torch.randn(2, block.channels, 5, 7)
    plain = unfuse(copy.deepcopy(block))
    with torch.no_grad():
        assert torch.equal(block(x, output_size), plain(x, output_size))
        sizes: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.interpolate", lambda x, **k: sizes.append(x.shape) or x)
            block(x, output_size)
    assert len(sizes) == (output_size == (9, 13))


@pytest.mark.usefixtures("as_unfused")
def test_a_vae_is_fused_with_its_far_padding_inside_the_convolution() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    convert(vae, uniform_plan(vae, "w8a8-dynamic"))
    plain = unfuse(copy.deepcopy(vae))
    picture = torch.randn(1, 3, 14, 18)
    with torch.no_grad():
        latents, wanted = vae.encode(picture).latent_dist.mean, plain.encode(picture).latent_dist.mean
        assert float(sqnr_db(wanted, latents)) > NEAR
        assert float(sqnr_db(plain.decode(latents).sample, vae.decode(latents).sample)) > NEAR
        resnets = sum(type(m).__name__ == "ResnetBlock2D" for m in vae.decoder.modules())
        calls = served(lambda: vae.decode(latents))
        assert calls["group_norm_silu_quantize"] >= 2 * resnets, "a decoder's blocks call their norms group"
    padded: list[torch.dtype] = []
    down = next(m for m in vae.modules() if type(m).__name__ == "Downsample2D")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        real = nn.functional.pad
        patch.setattr("torch.nn.functional.pad", lambda x, *a, **k: padded.append(x.dtype) or real(x, *a, **k))
        down(torch.randn(1, 32, 6, 6))
    assert torch.float32 not in padded
