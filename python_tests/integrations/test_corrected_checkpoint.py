"""A model with every correction that a plan can give survives its file, and is made while loading where that can be."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import ldmq_kernels as ldmq
from ldmq_kernels.calibration.redrawn import NoAdjoint
from ldmq_kernels.conversion import ConversionError, convert, summarize
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.integrations.diffusers.fused import unfuse
from ldmq_kernels.nn import QuantizedLayer, timestep_groups
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, PlanError
from python_tests.tiny import PROMPTS, SHALLOW, mixed_plan, run_unet, same_bits, tiny_pipeline, tiny_unet


def corrected_plan(unet: Any) -> Plan:
    """Every scheme, and every correction in turn on what can have it."""
    plan = mixed_plan(unet)
    generator = torch.Generator().manual_seed(2)
    for index, (name, layer) in enumerate(quantizable_layers(unet).items()):
        scheme = plan.layer(name).scheme
        if not scheme.quantizes:
            continue
        has_product = scheme.format.first_token_op is not None or not scheme.quantizes_activations
        if name.endswith(("attn2.to_k", "attn2.to_v")) and has_product:
            plan.details[name] = {"first_token": True}
        if index % 5 < 2:
            plan.bias_correction[name] = 0.1 * torch.randn(layer.weight.shape[0], generator=generator)
    assert any(quantizable_layers(unet)[name].bias is None for name in plan.bias_correction)
    return plan


def gptq_plan(unet: Any) -> Plan:
    plan = mixed_plan(unet)
    for index, name in enumerate(quantizable_layers(unet)):
        if plan.layer(name).scheme.quantizes and index % 3 == 0:
            plan.details[name] = {"rounding": "gptq"}
    plan.calibration = {"texts": PROMPTS, "num_inference_steps": 2, "guidance_scale": 5.0, "seed": 3}
    return plan


@pytest.fixture(scope="module")
def quantized() -> Any:
    unet = tiny_unet()
    convert(unet, corrected_plan(unet))
    return unet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_round_trip_is_bit_identical(dtype: torch.dtype, tmp_path: Any) -> None:
    unet = tiny_unet().to(dtype)
    convert(unet, corrected_plan(unet))
    unet.save_pretrained(tmp_path / "first")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "first", dtype=dtype)
    saved = unet.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == saved[name].dtype, name
        assert same_bits(tensor, saved[name]), name
    assert torch.equal(run_unet(loaded, dtype), run_unet(unet, dtype))
    assert summarize(loaded) == summarize(unet)
    loaded.save_pretrained(tmp_path / "second")
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert set(configs[0]["quantization_config"]["plan"]["bias_correction"].values()) == {""}


def test_a_float_checkpoint_is_corrected_while_it_loads(quantized: Any, tmp_path: Any) -> None:
    for shard in ("10GB", "100KB"):
        tiny_unet().save_pretrained(tmp_path / shard, max_shard_size=shard)
        config = LdmqConfig(plan=corrected_plan(tiny_unet()))
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / shard, quantization_config=config)
        for name, tensor in loaded.state_dict().items():
            assert same_bits(tensor, quantized.state_dict()[name]), name
        assert torch.equal(run_unet(loaded), run_unet(quantized))
        assert summarize(loaded) == summarize(quantized)


def test_fused_blocks_leave_corrected_layers_to_themselves(quantized: Any) -> None:
    assert float(sqnr_db(run_unet(unfuse(copy.deepcopy(quantized))), run_unet(quantized))) > 60


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_compute_the_same(quantized: Any, duplicate: Any) -> None:
    assert torch.equal(run_unet(duplicate(quantized)), run_unet(quantized))


@pytest.mark.slow
def test_it_compiles_without_a_graph_break_to_the_same_result() -> None:
    unet = tiny_unet(**SHALLOW)
    convert(unet, corrected_plan(unet))
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(unet), fullgraph=True, backend="eager")
    assert torch.equal(run_unet(compiled), run_unet(unet))


def test_the_plan_predicts_the_bytes_of_the_fp16_checkpoint(tmp_path: Any) -> None:
    unet = tiny_unet().half()
    plan = corrected_plan(unet)
    predicted = summarize(unet, plan)
    convert(unet, plan)
    assert summarize(unet) == predicted
    assert predicted.bytes_after == sum(t.numel() * t.element_size() for t in unet.state_dict().values())


def test_a_pipeline_quantizes_with_gptq_and_what_it_saves_loads(tmp_path: Any) -> None:
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    plan = gptq_plan(pipe.unet)
    nearest = tiny_unet()
    convert(nearest, mixed_plan(nearest))
    ldmq.quantize(pipe, plan.to_dict(), show_progress=False)
    differ = {
        name
        for name, layer in nearest.named_modules()
        if isinstance(layer, QuantizedLayer) and not torch.equal(layer.weight, pipe.unet.get_submodule(name).weight)
    }
    assert differ <= set(plan.details)
    assert len(differ) > 0.9 * len(plan.details)
    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(run_unet(loaded), run_unet(pipe.unet))


def test_a_pipeline_quantizes_by_the_end_of_its_trajectory_and_what_it_saves_loads(tmp_path: Any) -> None:
    pipe, plain = tiny_pipeline(tmp_path / "tokenizer"), tiny_pipeline(tmp_path / "other")
    plan = gptq_plan(pipe.unet)
    ldmq.quantize(plain, plan, show_progress=False)
    names = list(plan.details)[::3]
    for name in names:
        plan.details[name]["rounding"] = "gptq-end"
    ldmq.quantize(pipe, plan, show_progress=False)
    differ = {
        name
        for name, layer in plain.unet.named_modules()
        if isinstance(layer, QuantizedLayer) and not torch.equal(layer.weight, pipe.unet.get_submodule(name).weight)
    }
    assert differ <= set(names)
    assert len(differ) > 0.9 * len(names)
    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(run_unet(loaded), run_unet(pipe.unet))


def test_a_trajectory_without_a_gradient_says_what_to_round_by(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise NoAdjoint("its scheduler rounds")

    monkeypatch.setattr("ldmq_kernels.calibration.end_hessian.sampler_adjoint", refuse)
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    plan = gptq_plan(pipe.unet).with_gptq(pipe.unet, end=True)
    with pytest.raises(PlanError, match=r"has no gradient: its scheduler rounds: .*`plan\.with_gptq\(model\)`"):
        ldmq.quantize(pipe, plan, show_progress=False)
    assert not any(isinstance(m, QuantizedLayer) for m in pipe.unet.modules())


def test_gptq_without_a_pipeline_or_without_texts_says_what_to_do(tmp_path: Any) -> None:
    unet = tiny_unet()
    plan = gptq_plan(unet)
    with pytest.raises(ConversionError, match=r"conv_in: the plan rounds it by GPTQ.*ldmq\.quantize\(pipe, plan\)"):
        ldmq.quantize(unet, plan)
    assert not any(isinstance(m, QuantizedLayer) for m in unet.modules())
    unet.save_pretrained(tmp_path / "float")
    with pytest.raises(ConversionError, match=r"in full precision and call `ldmq\.quantize\(pipe, plan\)`"):
        UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=LdmqConfig(plan=plan))
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    plan.calibration = {}
    with pytest.raises(PlanError, match=r"conv_in by GPTQ, but holds no calibration texts.*plan again"):
        ldmq.quantize(pipe, plan)
    assert timestep_groups.attached(pipe.unet) is None
