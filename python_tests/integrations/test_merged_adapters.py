"""Adapters merged into quantized layers: dequantized, added, quantized again by the same scheme, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.peft import RoundedToNearestWarning
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import Plan, uniform_plan
from python_tests.integrations.test_adapters import LAYERS, METHODS, TARGETS, adapted, quantized_two
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, same_bits, tiny_unet

peft = pytest.importorskip("peft")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapters_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "merge")]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_the_adapter_computes_and_comes_out_again_to_the_bit(method: str, safe: bool) -> None:
    made, model, x = quantized_two("w8a8-dynamic")
    with torch.no_grad():
        base, plain = model(x), made(x)
        exact = adapted(model, method)(x)
        wrapped = adapted(made, method)
        unmerged, state = wrapped(x), state_of(wrapped)
        layers = adapters_of(wrapped)
        assert len(layers) == len(TARGETS.get(method, LAYERS))
        for layer in layers:
            layer.merge(safe_merge=safe)
        assert sqnr_db(exact, wrapped(x)) > sqnr_db(base, plain) - 3
        changed = [name for name, tensor in wrapped.state_dict().items() if not same_bits(tensor, state[name])]
        integers_or_scales = {name.rpartition(".")[0] for name in changed if "base_layer.weight" in name}
        assert len(integers_or_scales) == len(layers)
        for layer in layers:
            layer.unmerge()
        assert torch.equal(wrapped(x), unmerged)
    assert all(same_bits(tensor, state[name]) for name, tensor in wrapped.state_dict().items())


def unet_with_lora(plan_of, layers=("to_q", "to_k", "conv1", "ff.net.2"), **config) -> tuple[nn.Module, Tensor]:
    """A quantized UNet with an adapter that changes it, and its output before."""
    unet = tiny_unet(**SHALLOW)
    ldmq.quantize(unet, plan_of(unet))
    before = run_unet(unet)
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=list(layers), **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(unet.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet.eval(), before


def every_quantizing_scheme(unet: nn.Module) -> Plan:
    """PEFT adds to float layers and subtracts again, to other bits."""
    plan = mixed_plan(unet)
    plan.exceptions = {name: entry for name, entry in plan.exceptions.items() if entry["scheme"] != "fp16"}
    return plan


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_unet_of_every_scheme_is_fused_and_unfused(dora: bool) -> None:
    unet, before = unet_with_lora(every_quantizing_scheme, use_dora=dora)
    unfused, state = run_unet(unet), state_of(unet)
    assert sqnr_db(before, unfused) < 20
    unet.fuse_lora(safe_fusing=True)
    assert sqnr_db(unfused, run_unet(unet)) > 15
    assert sqnr_db(before, run_unet(unet)) < 20
    unet.unfuse_lora()
    assert torch.equal(run_unet(unet), unfused)
    assert all(same_bits(tensor, state[name]) for name, tensor in unet.state_dict().items())
    unet.unload_lora()
    assert torch.equal(run_unet(unet), before)


def test_a_fused_adapter_stays_when_it_is_unloaded_and_is_saved_with_the_model(tmp_path) -> None:
    unet, plain = unet_with_lora(lambda unet: uniform_plan(unet, "w8a8-dynamic"))
    unfused, bound = run_unet(unet), sqnr_db(run_unet(tiny_unet(**SHALLOW)), plain)
    unet.fuse_lora()
    unet.unload_lora()
    fused = run_unet(unet)  # in fused blocks again
    assert sqnr_db(unfused, fused) > bound - 3
    unet.save_pretrained(tmp_path / "fused")
    loaded = type(unet).from_pretrained(tmp_path / "fused")
    assert torch.equal(run_unet(loaded), fused)
    assert not any("_ldmq" in name for module in unet.modules() for name in vars(module))


def test_layers_that_gptq_rounded_are_named_once_when_an_adapter_is_fused_into_them() -> None:
    unet, _ = unet_with_lora(lambda unet: uniform_plan(unet, "w4a8-dynamic"), layers=["to_q", "to_k"])
    unfused, names = run_unet(unet), [name for name, module in unet.named_modules() if hasattr(module, "merge")]
    plan = unet.hf_quantizer.quantization_config.plan
    elsewhere = names[0].rpartition(".")[0] + ".to_v"  # by GPTQ too, and with no adapter
    plan.details |= {name: {"rounding": "gptq"} for name in (*names[1:], elsewhere)}
    with pytest.warns(RoundedToNearestWarning) as told:
        unet.fuse_lora()
    (text,) = [str(one.message) for one in told if one.category is RoundedToNearestWarning]
    assert f": {', '.join(names[1:])}. unfuse_lora" in text
    assert text.startswith(f"{len(names) - 1} layers")
    unet.unfuse_lora()
    assert torch.equal(run_unet(unet), unfused)


def test_two_are_fused_with_scales_one_after_the_other_and_both_come_out() -> None:
    unet, _ = unet_with_lora(lambda unet: uniform_plan(unet, "w8a16"), layers=["to_q"])
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="second")
    unet.set_adapters(["default", "second"], [0.5, 2.0])
    unfused = run_unet(unet)
    unet.fuse_lora(adapter_names=["default"])
    unet.fuse_lora(adapter_names=["second"])
    assert sqnr_db(unfused, run_unet(unet)) > 35
    unet.unfuse_lora()
    assert torch.equal(run_unet(unet), unfused)


def test_a_copy_of_a_fused_model_is_unfused_too() -> None:
    unet, _ = unet_with_lora(lambda unet: uniform_plan(unet, "w4a8-dynamic"), layers=["to_q"])
    unfused = run_unet(unet)
    unet.fuse_lora()
    twin = copy.deepcopy(unet)
    twin.unfuse_lora()
    assert torch.equal(run_unet(twin), unfused)


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_not_finite_is_refused_by_the_layers_name(safe: bool) -> None:
    unet, _ = unet_with_lora(lambda unet: uniform_plan(unet, "w8a8-dynamic"), layers=["attn1.to_q"])
    state = state_of(unet)
    (layer,) = adapters_of(unet)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
        kept = layer.lora_A["default"].weight.clone()
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.to_q: .*its adapters are not merged"):
            unet.fuse_lora(safe_fusing=safe)
        layer.lora_A["default"].weight.nan_to_num_()
    assert bool(kept.isnan().any())
    assert not layer.merged
    base = "attn1.to_q.base_layer"
    after = unet.state_dict()
    assert all(same_bits(after[name], tensor) for name, tensor in state.items() if base in name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(16, 20, 3, padding=1), (2, 16, 7)), (nn.Conv3d(16, 20, 3, padding=(1, 0, 1)), (2, 16, 4, 5, 3))],
    ids=["Conv1d", "Conv3d"],
)
def test_lora_of_other_convolutions_runs_and_is_merged(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(shape)
    made = ldmq.quantize(copy.deepcopy(model), scheme="w8a8-dynamic")
    base, plain = model["layer"](x), made["layer"](x)
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
    for each in (model, made):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, each).eval()
    exact, adapted_output = model["layer"](x), made["layer"](x)
    assert sqnr_db(base, exact) < 25
    assert sqnr_db(exact, adapted_output) > sqnr_db(base, plain) - 3
    made["layer"].merge()
    assert sqnr_db(exact, made["layer"](x)) > sqnr_db(base, plain) - 3
    made["layer"].unmerge()
    assert torch.equal(made["layer"](x), adapted_output)
