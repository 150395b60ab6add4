"""One call quantizes a model or a pipeline, by a plan or in one scheme."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import PlanError, uniform_plan
from python_tests.tiny import run_unet, tiny_pipeline, tiny_unet

UNIFORM = [name for name, scheme in SCHEMES.items() if scheme.quantizes and not scheme.is_static]
STATIC = [name for name, scheme in SCHEMES.items() if scheme.is_static]


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("scheme", UNIFORM)
def test_a_scheme_gives_every_layer_that_can_have_it_that_scheme(scheme: str) -> None:
    unet, expected = tiny_unet(), tiny_unet()
    convert(expected, uniform_plan(expected, scheme))
    assert ldmq.quantize(unet, scheme=scheme) is unet
    assert same_tensors(unet, expected)


def test_of_a_pipeline_the_unet_is_quantized_and_nothing_else(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    others = [sum(p.numel() for p in part.parameters()) for part in (pipe.vae, pipe.text_encoder)]
    assert ldmq.quantize(pipe, scheme="w8a16") is pipe
    assert same_tensors(pipe.unet, ldmq.quantize(tiny_unet(), scheme="w8a16"))
    assert [sum(p.numel() for p in part.parameters()) for part in (pipe.vae, pipe.text_encoder)] == others


def test_it_saves_and_loads_as_a_model_that_was_quantized_while_loading(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "float")
    ldmq.quantize(unet, scheme="w4a8-dynamic").save_pretrained(tmp_path / "called")
    config = LdmqConfig(scheme="w4a8-dynamic")
    UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(
        tmp_path / "loaded"
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("called", "loaded")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    called, loaded = (UNet2DConditionModel.from_pretrained(tmp_path / name) for name in ("called", "loaded"))
    assert same_tensors(called, loaded)
    assert torch.equal(run_unet(called), run_unet(unet))


@pytest.mark.parametrize("scheme", STATIC)
def test_a_static_scheme_says_that_it_needs_a_calibration(scheme: str) -> None:
    unet = tiny_unet()
    with pytest.raises(PlanError, match=rf"{scheme} needs activation scales.*`ldmq\.plan`"):
        ldmq.quantize(unet, scheme=scheme)
    assert same_tensors(unet, tiny_unet())


@pytest.mark.parametrize("scheme", ["w3a8", "w8a8", ""])
def test_an_unknown_scheme_is_refused_with_those_that_there_are(scheme: str) -> None:
    with pytest.raises(PlanError, match=r"unknown scheme.*w8a8-dynamic.*w8a16"):
        ldmq.quantize(tiny_unet(), scheme=scheme)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static"])
def test_the_name_of_a_scheme_in_place_of_a_plan_says_where_it_belongs(scheme: str) -> None:
    with pytest.raises(PlanError, match=f"scheme='{scheme}'"):
        ldmq.quantize(tiny_unet(), scheme)


def test_either_a_plan_or_a_scheme_is_taken() -> None:
    unet = tiny_unet()
    with pytest.raises(PlanError, match="either a plan, or a scheme"):
        ldmq.quantize(unet)
    with pytest.raises(PlanError, match="either a plan, or a scheme"):
        ldmq.quantize(unet, uniform_plan(unet, "w8a16"), scheme="w8a16")
