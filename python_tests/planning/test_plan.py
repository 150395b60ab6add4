"""The plan file: what it accepts, what it refuses and how it says so."""

import json

import pytest
import torch

from ldmq_kernels.planning.plan import Plan, PlanError, fingerprint, uniform_plan
from python_tests.tiny import mixed_plan, tiny_unet


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture
def saved(unet, tmp_path):
    path = tmp_path / "plan.json"
    mixed_plan(unet).save(path)
    return path


def _edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_plan_survives_its_file_bit_for_bit(unet, saved):
    before, after = mixed_plan(unet), Plan.load(saved)
    assert after.to_dict() == before.to_dict()
    for name, vector in before.smoothing.items():
        assert torch.equal(after.smoothing[name], vector)


def test_an_exception_beats_rules_and_a_later_rule_an_earlier_one(unet):
    plan = uniform_plan(unet, "w8a16")
    plan.rules.append({"pattern": "mid_block.*", "scheme": "w8a8-dynamic"})
    plan.exceptions["mid_block.resnets.0.conv1"] = {"scheme": "fp16", "reason": "by hand"}
    assert str(plan.layer("conv_in").scheme) == "w8a16"
    assert str(plan.layer("mid_block.resnets.0.conv2").scheme) == "w8a8-dynamic"
    assert str(plan.layer("mid_block.resnets.0.conv1").scheme) == "fp16"


def test_the_fingerprint_tells_models_apart():
    assert fingerprint(tiny_unet(seed=0)) == fingerprint(tiny_unet(seed=1))
    assert fingerprint(tiny_unet()) != fingerprint(tiny_unet(block_out_channels=(32, 96)))


def test_a_plan_for_another_model_is_refused(saved):
    other = tiny_unet(block_out_channels=(32, 96))
    with pytest.raises(PlanError, match="make a plan for this model"):
        Plan.load(saved).layers(other)


def test_an_unknown_layer_is_named(unet, saved):
    plan = Plan.load(_edited(saved, exceptions={"conv_between": {"scheme": "fp16"}}))
    with pytest.raises(PlanError, match="conv_between"):
        plan.layers(unet)


def test_a_static_scheme_without_its_scale_names_the_layer(unet, saved):
    plan = Plan.load(_edited(saved, input_scales={}, exceptions={"conv_out": {"scheme": "w8a8-static"}}))
    with pytest.raises(PlanError, match=r"conv_out.*input_scales"):
        plan.layers(unet)


def test_w4a16_for_a_convolution_names_the_layer_and_what_is_accepted(unet):
    plan = uniform_plan(unet, "w8a16")
    plan.exceptions["conv_in"] = {"scheme": "w4a16"}
    with pytest.raises(PlanError, match=r"conv_in.*w4a8-dynamic"):
        plan.layers(unet)


def test_smoothing_of_the_wrong_length_names_the_layer(unet):
    plan = uniform_plan(unet, "w8a8-dynamic")
    plan.smoothing["conv_in"] = torch.ones(5)
    with pytest.raises(PlanError, match="conv_in"):
        plan.layers(unet)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ldmq_plan": 2}, "upgrade"),
        ({"ldmq_plan": "one"}, "ldmq_plan"),
        ({"rules": [{"pattern": "*", "scheme": "int3"}]}, "int3"),
        ({"exceptions": {"conv_in": {"bits": 3}}}, "conv_in"),
        ({"input_scales": {"conv_in": -1.0}}, "conv_in"),
        ({"input_scales": {"conv_in": float("inf")}}, "conv_in"),
        ({"input_scales": {"conv_in": "wide"}}, "conv_in"),
        ({"smoothing": {"conv_in": "not base64!"}}, "conv_in"),
        ({"smoothing": {"conv_in": "AAAAAA=="}}, "conv_in"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_file_edited_into_nonsense_says_where(saved, changes, said):
    with pytest.raises(PlanError, match=said):
        Plan.load(_edited(saved, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"other\.json"):
        Plan.load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanError, match="ldmq plan"):
        Plan.load(tmp_path / "none.json")


def test_a_uniform_plan_takes_no_static_scheme(unet):
    with pytest.raises(PlanError, match="w8a8-dynamic"):
        uniform_plan(unet, "w8a8-static")
