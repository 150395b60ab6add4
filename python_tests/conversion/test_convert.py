"""Conversion puts in all of a plan or nothing, and refuses what it cannot do by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldmq_kernels.conversion import ConversionError, convert, quantize
from ldmq_kernels.conversion import hessian as hessian_module
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import fingerprint, quantizable_layers
from ldmq_kernels.plans.plan import Plan, PlanError, model_record, uniform_plan
from python_tests.tiny import mixed_plan, run_unet, tiny_pipeline, tiny_unet


def quantized_names(model: nn.Module) -> dict[str, str]:
    return {n: str(m.scheme) for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def test_each_layer_gets_the_scheme_the_plan_gives_it_and_float_ones_stay_the_same_objects():
    unet = tiny_unet()
    plan = mixed_plan(unet)
    before = quantizable_layers(unet)
    chosen = plan.layers(unet)
    convert(unet, plan)
    assert quantized_names(unet) == {n: str(c.scheme) for n, c in chosen.items() if c.scheme.quantizes}
    assert {str(c.scheme) for c in chosen.values()} > {"w4a16", "w4a8-static", "w8a8-dynamic", "w8a16", "fp16"}
    for name, choice in chosen.items():
        now = unet.get_submodule(name)
        if not choice.scheme.quantizes:
            assert now is before[name]
        else:
            assert isinstance(now, QuantLinear if isinstance(before[name], nn.Linear) else QuantConv2d)
            assert now.bias is before[name].bias
            assert (now.smoothing is not None) == (name in plan.smoothing)
            if choice.scheme.is_static:
                assert torch.equal(now.input_scale, torch.tensor(plan.input_scales[name]).reshape(-1))
    assert fingerprint(unet) == plan.model["fingerprint"]


def test_weight_only_int8_everywhere_keeps_the_output_within_quantization_noise():
    unet = tiny_unet()
    reference = run_unet(unet)
    convert(unet, uniform_plan(unet, "w8a16"))
    assert 35 < sqnr_db(reference, run_unet(unet)) < 70


def test_a_layer_used_in_two_places_stays_one_layer():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.blocks = nn.ModuleList([nn.Linear(32, 32), self.first])

    model = Tied()
    convert(model, uniform_plan(model, "w8a16"))
    assert isinstance(model.first, QuantLinear)
    assert model.blocks[1] is model.first
    assert model.blocks[0] is not model.first
    assert list(quantizable_layers(model)) == ["first", "blocks.0"]
    assert model.state_dict()["blocks.1.weight"].equal(model.state_dict()["first.weight"])


def spoil_last_layer(unet: nn.Module) -> None:
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] = float("nan")


def test_a_weight_with_nan_is_named_and_nothing_is_converted():
    unet = tiny_unet()
    spoil_last_layer(unet)
    with pytest.raises(ConversionError, match=r"conv_out: the weight holds NaN"):
        convert(unet, uniform_plan(unet, "w8a8-dynamic"))
    assert quantized_names(unet) == {}
    assert not hasattr(unet, "hf_quantizer")


def test_a_weight_with_all_zero_channels_converts_and_gives_zero_there():
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.weight[1] = 0
        unet.conv_out.bias[1] = 0
    convert(unet, uniform_plan(unet, "w8a8-dynamic"))
    out = run_unet(unet)
    assert bool((out[:, 1] == 0).all())
    assert bool(torch.isfinite(out).all())


def test_a_quantized_model_is_refused():
    unet = tiny_unet()
    plan = uniform_plan(unet, "w8a8-dynamic")
    convert(unet, plan)
    weight = unet.conv_in.weight
    with pytest.raises(ConversionError, match=r"UNet2DConditionModel is quantized already \(conv_in is w8a8-dynamic\)"):
        convert(unet, plan)
    assert torch.equal(unet.conv_in.weight, weight)


def test_a_layer_with_its_own_forward_is_refused_by_name_unless_the_plan_leaves_it():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(nn.Linear(16, 16), Scaled(16, 16))
    plan = uniform_plan(model, "w8a16")
    assert "Scaled has a forward of its own, not Linear's" in plan.exceptions.pop("1")["reason"]
    with pytest.raises(ConversionError, match=r"1: a .*Scaled has a forward of its own"):
        convert(model, plan)
    plan.exceptions["1"] = {"scheme": "fp16"}
    convert(model, plan)
    assert isinstance(model[0], QuantLinear)
    assert type(model[1]) is Scaled


def test_a_hooked_layer_and_one_without_its_weight_are_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 16))
    plan = uniform_plan(model, "w8a16")
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConversionError, match="0: its forward is hooked"):
        convert(model, plan)
    handle.remove()
    model.to("meta")
    with pytest.raises(ConversionError, match="0: its weight is not in memory"):
        convert(model, plan)


class Tiling(nn.Conv2d):
    """A convolution with a convolution of its own."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight, bias)


def replaced() -> nn.Conv2d:
    layer = nn.Conv2d(4, 4, 3)
    layer._conv_forward = Tiling._conv_forward.__get__(layer)
    return layer


@pytest.mark.parametrize("make", [replaced, lambda: Tiling(4, 4, 3)], ids=["of the layer", "of its class"])
def test_a_convolution_that_is_replaced_is_refused_by_name(make):
    model = nn.Sequential(nn.Linear(8, 8), make())
    with pytest.raises(ConversionError, match=r"1: its _conv_forward is replaced.*quantize first"):
        convert(model, uniform_plan(model, "w8a16"))
    assert quantized_names(model) == {}


def test_a_plan_for_another_model_is_refused():
    unet = tiny_unet()
    with pytest.raises(PlanError, match="this plan is for a UNet2DConditionModel"):
        convert(unet, uniform_plan(tiny_unet(block_out_channels=(32, 32)), "w8a16"))
    assert quantized_names(unet) == {}


def test_smoothing_of_a_grouped_convolution_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    plan = uniform_plan(model, "w8a8-dynamic")
    plan.smoothing["0"] = torch.ones(4)
    with pytest.raises(ConversionError, match="0: a grouped convolution cannot be smoothed"):
        convert(model, plan)


@pytest.mark.parametrize("form", ["plan", "path", "text", "dict"])
def test_quantize_takes_a_plan_in_any_form_and_returns_the_pipeline(form, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    expected = copy.deepcopy(pipe.unet)
    plan = mixed_plan(expected)
    plan.save(tmp_path / "plan.json")
    forms = {"plan": plan, "path": tmp_path / "plan.json", "text": str(tmp_path / "plan.json"), "dict": plan.to_dict()}
    assert quantize(pipe, forms[form]) is pipe
    convert(expected, plan)
    assert torch.equal(run_unet(pipe.unet), run_unet(expected))


def test_quantize_takes_a_model_itself_and_refuses_what_is_neither():
    unet = tiny_unet()
    plan = uniform_plan(unet, "w8a16")
    assert quantize(unet, plan) is unet
    assert set(quantized_names(unet).values()) == {"w8a16"}
    with pytest.raises(TypeError, match="dict has neither a unet nor a transformer"):
        quantize({}, plan)
    with pytest.raises(PlanError, match="no plan file"):
        quantize(tiny_unet(), "missing.json")
    with pytest.raises(PlanError, match="not an ldmq plan"):
        quantize(tiny_unet(), {"rules": []})


def test_a_plan_with_nothing_to_quantize_leaves_the_output_bit_identical():
    unet = tiny_unet()
    reference = run_unet(unet)
    convert(unet, Plan(model_record(unet), [{"pattern": "*", "scheme": "fp16"}]))
    assert torch.equal(run_unet(unet), reference)


def test_hessians_are_asked_for_in_order_and_only_where_rounding_is_gptq():
    unet = tiny_unet()
    plan = uniform_plan(unet, "w8a8-dynamic")
    wanted = ["conv_in", "mid_block.resnets.0.conv1", "conv_out"]
    wanted.sort(key=list(quantizable_layers(unet)).index)
    plan.details = {name: {"rounding": "gptq"} for name in wanted}
    asked = []

    def hessian_of(name: str) -> torch.Tensor:
        asked.append(name)
        width = quantizable_layers(unet)[name].weight[0].numel()
        x = torch.randn(2 * width, 5) @ torch.randn(5, width)
        return x.T @ x

    plain = copy.deepcopy(unet)
    convert(plain, uniform_plan(plain, "w8a8-dynamic"))
    convert(unet, plan, hessian_of)
    assert asked == wanted
    differ = [n for n in quantized_names(unet) if not torch.equal(*(m.get_submodule(n).weight for m in (unet, plain)))]
    assert differ == wanted


def test_recorded_hessians_come_in_chunks_that_fit_and_are_those_of_all_layers_at_once(tmp_path, monkeypatch):
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    plan = uniform_plan(pipe.unet, "w8a8-dynamic")
    layers = quantizable_layers(pipe.unet)
    names = [name for name, layer in layers.items() if layer.weight[0].numel() <= 64][:7]
    plan.details = {name: {"rounding": "gptq"} for name in names}
    plan.calibration = {"texts": ["a red circle"], "num_inference_steps": 2, "guidance_scale": 5.0, "seed": 1}
    chunks = []
    real = hessian_module.input_hessians

    def spied(model, trajectory, chunk):
        chunks.append(list(chunk))
        return real(model, trajectory, chunk)

    monkeypatch.setattr(hessian_module, "input_hessians", spied)
    most = 4 * (64**2 + 32**2)
    few = hessian_module.RecordedHessians(pipe, plan, bytes_at_once=most)
    found = {name: few(name) for name in names}
    assert [name for chunk in chunks for name in chunk] == names
    assert len(chunks) == 2
    assert all(sum(4 * layers[n].weight[0].numel() ** 2 for n in c) <= most or len(c) == 1 for c in chunks)
    chunks.clear()
    whole = hessian_module.RecordedHessians(pipe, plan)
    assert all(torch.equal(whole(name), found[name]) for name in names)
    assert chunks == [names]


def test_smoothing_and_scales_of_a_scheme_that_was_edited_by_hand_do_no_harm():
    """A plan keeps scales and smoothing that 16-bit activations have no use for."""
    unet = tiny_unet()
    plan = uniform_plan(unet, "w8a8-dynamic")
    for name, layer in quantizable_layers(unet).items():
        plan.smoothing[name] = torch.full((layer.weight.shape[1],), 0.25)
        plan.input_scales[name] = 0.1
    plan.rules[0]["scheme"] = "w8a16"
    plain = copy.deepcopy(unet)
    convert(unet, plan)
    convert(plain, uniform_plan(plain, "w8a16"))
    assert torch.equal(run_unet(unet), run_unet(plain))
