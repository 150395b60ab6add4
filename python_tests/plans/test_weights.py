"""A plan knows the weights that it was made from, in every dtype that they may be loaded in, and says so of others."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.plans.plan import Plan, PlanError, model_record, uniform_plan
from ldmq_kernels.plans.weights import OtherWeightsWarning, WeightsCheck, weights_record
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = {torch.float16, torch.bfloat16}


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))


def plan_of(model: nn.Module) -> Plan:
    return Plan({**model_record(model), "weights": weights_record(model)}, [{"pattern": "*", "scheme": "w8a8-dynamic"}])


def warned(plan: Plan, model: nn.Module) -> bool:
    check = WeightsCheck(plan, model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            check.add(name, layer.weight)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check.finish()
    return any(warning.category is OtherWeightsWarning for warning in seen)


@pytest.mark.parametrize(("stored", "planned", "held"), [*itertools.product(DTYPES, repeat=3)], ids=str)
def test_no_dtype_of_the_same_weights_makes_an_alarm(
    stored: torch.dtype, planned: torch.dtype, held: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    file, other = small().to(stored), small(1).to(stored)
    plan = plan_of(copy.deepcopy(file).to(planned))
    with caplog.at_level(logging.INFO):
        assert not warned(plan, copy.deepcopy(file).to(held))
        cannot_be_told = {planned, held} == HALVES
        assert ("cannot be told" in caplog.text) == cannot_be_told
        assert warned(plan, other.to(held)) != cannot_be_told


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
def test_one_changed_weight_is_noticed_and_layouts_are_not(held: torch.dtype) -> None:
    model = small()
    plan = plan_of(model)
    model.to(held)
    assert not warned(plan, model.to(memory_format=torch.channels_last))
    with torch.no_grad():
        model[2].weight[0, 0] *= 1.01
    assert warned(plan, model)


def test_weights_that_are_kept_wider_than_the_model_are_known_again() -> None:
    plan = plan_of(small())
    mixed = small().to(torch.bfloat16)
    mixed[2] = small()[2]
    assert not warned(plan, mixed)
    assert not warned(plan_of(mixed), small())
    with torch.no_grad():
        mixed[2].weight.mul_(2)
    assert warned(plan, mixed)


def test_a_plan_that_was_made_from_no_weights_warns_of_nothing() -> None:
    assert not warned(uniform_plan(small(), "w8a8-dynamic"), small(1))
    assert "weights" not in uniform_plan(small(), "w8a8-dynamic").model


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that was made from the weights of seed 0."""
    unet = tiny_unet(**SHALLOW)
    made = mixed_plan(unet)
    made.model["weights"] = weights_record(unet)
    return made


def test_quantizing_other_weights_warns_and_quantizes(plan: Plan) -> None:
    other = tiny_unet(1, **SHALLOW)
    with pytest.warns(OtherWeightsWarning, match="other weights than those of this UNet2DConditionModel") as seen:
        ldmq.quantize(other, plan)
    assert seen[0].filename == __file__
    expected = ldmq.quantize(tiny_unet(1, **SHALLOW), mixed_plan(tiny_unet(**SHALLOW)))
    assert torch.equal(run_unet(other), run_unet(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_loading_warns_of_other_weights_alone(plan: Plan, seed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_unet(seed, **SHALLOW).save_pretrained(tmp_path / "float", max_shard_size="100KB")
    load = UNet2DConditionModel.from_pretrained
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quantized = load(tmp_path / "float", torch_dtype=dtype, quantization_config=LdmqConfig(plan=plan))
    assert [w.category for w in seen].count(OtherWeightsWarning) == seed
    quantized.save_pretrained(tmp_path / "quantized")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherWeightsWarning)
        again = load(tmp_path / "quantized", torch_dtype=dtype)
    assert again.config.quantization_config.plan.model["weights"] == plan.model["weights"]


def test_the_record_survives_the_file_and_nonsense_in_it_does_not(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").model == plan.model
    for nonsense in ("yes", {"int8": "0" * 16}, {"float32": "short"}, {"float32": 7}):
        content = plan.to_dict()
        content["model"] = {**content["model"], "weights": nonsense}
        with pytest.raises(PlanError, match="weights"):
            Plan.from_dict(content)
