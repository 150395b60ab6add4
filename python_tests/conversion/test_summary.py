"""The summary's counts and bytes are those of the checkpoint that is written."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from ldmq_kernels.conversion import convert, quantize, summarize
from ldmq_kernels.conversion.left_in_float import lines_of
from ldmq_kernels.plans.plan import PlanError, uniform_plan
from python_tests.tiny import mixed_plan, tiny_unet


def checkpoint_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def test_the_plan_predicts_the_bytes_of_the_fp16_checkpoint_before_and_after():
    unet = tiny_unet().to(torch.float16)
    plan = mixed_plan(unet)
    predicted = summarize(unet, plan)
    assert predicted.bytes_before == checkpoint_bytes(unet)
    convert(unet, plan)
    assert predicted.bytes_after == checkpoint_bytes(unet)
    assert summarize(unet) == predicted


def test_a_float_model_has_nothing_quantized_and_the_same_bytes():
    summary = summarize(tiny_unet())
    assert (summary.quantized_convolutions, summary.quantized_linears) == (0, 0)
    assert summary.bytes_after == summary.bytes_before


def test_layers_are_counted_by_kind_and_scheme():
    unet = tiny_unet()
    summary = summarize(unet, uniform_plan(unet, "w4a16"))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in unet.modules())
    linears = sum(isinstance(m, nn.Linear) for m in unet.modules())
    assert (summary.convolutions, summary.linears) == (convolutions, linears)
    assert (summary.quantized_convolutions, summary.quantized_linears) == (0, linears)
    assert (summary.schemes["w4a16"].linears, summary.schemes["fp16"].convolutions) == (linears, convolutions)
    text = f"0 of {convolutions} convolutions and {linears} of {linears} linears quantized"
    assert text in str(summary)


def test_the_table_says_what_the_summary_says():
    unet = tiny_unet()
    summary = summarize(unet, mixed_plan(unet))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary.table())
    text = console.export_text()
    for name in summary.schemes:
        assert name in text
    assert f"{summary.quantized_linears} of {summary.linears}" in text
    assert f"{summary.bytes_after / summary.bytes_before:.3f}x" in text


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(PlanError, match="make a plan for this model"):
        summarize(tiny_unet(), uniform_plan(tiny_unet(block_out_channels=(32, 32)), "w8a16"))


def test_whatever_stays_in_float_is_named_with_its_reason():
    class Scaled(nn.Conv3d):
        def forward(self, x):
            return nn.functional.conv3d(x, 2 * self.weight)

    model = nn.Sequential(nn.Linear(4, 4), Scaled(2, 3, 1), nn.ConvTranspose1d(4, 2, 3), nn.LayerNorm(4))
    model.extend([nn.Embedding(9, 4), nn.Linear(4, 2), nn.Conv3d(2, 3, 1), nn.Conv1d(2, 3, 1)])
    plan = uniform_plan(model, "w8a8-dynamic")
    plan.exceptions["5"] = {"scheme": "fp16", "reason": "too noisy"}
    predicted = summarize(model, plan)
    assert [(module.name, module.kind, module.has_scheme, module.reason) for module in predicted.in_float] == [
        ("1", "Scaled", False, f"a {Scaled.__qualname__} has a forward of its own, not Conv3d's"),
        ("2", "ConvTranspose1d", False, "there is no scheme for a ConvTranspose1d"),
        ("5", "Linear", True, "too noisy"),
    ]
    assert str(predicted).startswith("2 of 3 convolutions and 1 of 2 linears quantized")
    assert "1 Scaled in float, 0.00 MB; 1 ConvTranspose1d in float" in str(predicted)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(predicted.table())
    assert "no scheme: 1 Scaled" in console.export_text()
    assert lines_of(predicted.in_float)[2] == "in float, too noisy: 5"
    convert(model, plan)
    assert summarize(model).in_float == predicted.in_float  # reasons apart
    assert [type(model[place]).__name__ for place in (1, 6, 7)] == ["Scaled", "QuantConv3d", "QuantConv1d"]


def test_quantizing_says_what_there_is_no_scheme_for(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose3d(2, 3, 1), nn.ConvTranspose3d(2, 3, 1))
    quantize(model, scheme="w8a16")
    assert "2 ConvTranspose3d of this Sequential stay in float" in caplog.text
    assert "1, 2" in caplog.text


def test_a_model_without_any_layer_for_it_is_refused():
    with pytest.raises(PlanError, match=r"ConvTranspose3d has no linear and no convolution"):
        quantize(nn.ConvTranspose3d(2, 3, 1), scheme="w8a16")
