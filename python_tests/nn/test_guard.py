"""A guard names the first layer that gets NaN or infinity; without one a CPU refuses NaN that a scale would hide."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import ldmq_kernels as ldmq
from ldmq_kernels import graphs
from ldmq_kernels.conversion import convert, quantize
from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import Plan
from python_tests.nn.layers import quantized
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet, unet_inputs

QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.quantizes]


def plan_of(unet: nn.Module, scheme: str) -> Plan:
    """Every layer in one scheme where there is such a one."""
    plan = mixed_plan(unet)
    scale: Any = [0.03, 0.02, 0.01] if SCHEMES[scheme].has_timestep_scales else 0.02
    scales = dict.fromkeys(plan.layers(unet), scale) if SCHEMES[scheme].is_static else {}
    kinds = SCHEMES[scheme].format.layers
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Conv2d) and "conv2d" not in kinds}
    others: Any = {name: {"scheme": "fp16", "reason": "linears only"} for name in layers}
    return dataclasses.replace(
        plan, rules=[{"pattern": "*", "scheme": scheme}], exceptions=others, input_scales=scales, smoothing={}
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_first_layer_that_gets_such_a_value_is_named_for_every_scheme(scheme: str, value: float) -> None:
    unet = tiny_unet(**SHALLOW)
    convert(unet, plan_of(unet, scheme))
    inputs = unet_inputs()
    wanted, hooks = run_unet(unet), (len(unet._forward_pre_hooks), len(unet._forward_hooks))
    with ldmq.guard(unet), torch.no_grad():
        assert torch.equal(unet(**inputs).sample, wanted)
        for key, first in (("sample", "conv_in"), ("encoder_hidden_states", "attn2.to_k")):
            wrong = inputs[key].clone()
            wrong.view(-1)[37] = value
            with pytest.raises(ValueError, match=rf"{first}: its input holds NaN or infinity"):
                unet(**(inputs | {key: wrong}))
        assert torch.equal(unet(**inputs).sample, wanted)  # the guard of a call that raised is over
    assert (len(unet._forward_pre_hooks), len(unet._forward_hooks)) == hooks
    assert torch.equal(run_unet(unet), wanted)


@pytest.mark.parametrize(
    ("layer", "named"), [("down_blocks.0.resnets.0.conv1", "norm2"), ("mid_block.attentions.0.proj_in", "norm1")]
)
@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic", "w8a8-timestep"])
def test_a_value_that_arises_inside_of_a_fused_block_is_found_there(scheme: str, layer: str, named: str) -> None:
    unet = tiny_unet(**SHALLOW)
    convert(unet, plan_of(unet, scheme))
    bias: Any = unet.get_submodule(layer).bias
    bias.data[3] = torch.inf
    with ldmq.guard(unet), pytest.raises(ValueError, match=rf"^{layer}: its input|^.*{named}: its input"):
        run_unet(unet)


def test_a_guard_is_gone_after_remove_goes_with_copies_and_refuses_what_it_cannot_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(quantized(nn.Linear(8, 8), "w8a8-dynamic"), quantized(nn.Linear(8, 4), "w8a16"))
    x = torch.full((2, 8), torch.inf)
    held = ldmq.guard(model)
    for guarded in (model, copy.deepcopy(model)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"^0: its input"):
            guarded(x)
    held.remove()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(torch.ones(2, 8))
        held = ldmq.guard(model)
        with pytest.raises(ValueError, match=r"^0: its input"):  # not what was compiled without it
            compiled(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="runs in eager mode"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 8))
    monkeypatch.setattr(graphs, "is_captured", lambda module: True)
    with pytest.raises(RuntimeError, match=r"runs in eager mode.*ldmq\.capture"):
        model(x)
    held.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with torch.no_grad():
        assert not model(x).isfinite().all()


def test_the_environment_guards_what_is_quantized_and_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMQ_GUARD", "1")
    unet = tiny_unet(**SHALLOW)
    quantize(unet, scheme="w8a8-dynamic")
    unet.save_pretrained(tmp_path)
    wrong = unet_inputs() | {"sample": torch.full((2, 4, 8, 8), torch.nan)}
    for guarded in (unet, UNet2DConditionModel.from_pretrained(tmp_path)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"^conv_in: its input"):
            guarded(**wrong)
    monkeypatch.setenv("LDMQ_GUARD", "0")
    with torch.no_grad():
        assert UNet2DConditionModel.from_pretrained(tmp_path)(**wrong).sample.isnan().any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "scheme", [n for n in QUANTIZED if SCHEMES[n].is_static and SCHEMES[n].activations.dtype == torch.int8]
)
def test_a_cpu_refuses_nan_that_a_calibrated_scale_would_hide(
    scheme: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda device: backend == "cpu")
    x, picture = torch.randn(3, 8), torch.randn(1, 8, 4, 4)
    for layer, inputs in ((quantized(nn.Linear(8, 4), scheme), x), (quantized(nn.Conv2d(8, 4, 3), scheme), picture)):
        wrong = inputs.clone()
        wrong.view(-1)[5] = torch.nan
        with torch.no_grad(), pytest.raises(ValueError, match=r"holds NaN.*ldmq\.guard"):
            layer(wrong)
        wrong.view(-1)[5], wrong.view(-1)[6] = torch.inf, -torch.inf  # clipped, as other large values
        with torch.no_grad(), use_backend("reference"):
            assert layer(wrong).isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fp8_hands_nan_on_in_its_own_row(backend: str) -> None:
    x = torch.randn(3, 8)
    x[1, 5] = torch.nan
    for scheme in ("fp8-static", "fp8-dynamic"):
        with torch.no_grad(), use_backend(backend):
            out = quantized(nn.Linear(8, 4), scheme)(x)
        assert out.isnan().all(1).tolist() == out.isnan().any(1).tolist() == [False, True, False]
