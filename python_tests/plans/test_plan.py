"""The plan file: what it accepts, what it refuses and how it says so."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from ldmq_kernels.numerics.formats import FORMER_NAMES, SCHEMES
from ldmq_kernels.plans.layers import fingerprint
from ldmq_kernels.plans.plan import LayerPlan, Plan, PlanError, model_record, uniform_plan
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
        ({"ldmq_plan": 4}, "upgrade"),
        ({"ldmq_plan": "one"}, "ldmq_plan"),
        ({"rules": [{"pattern": "*", "scheme": "int3"}]}, "int3"),
        ({"exceptions": {"conv_in": {"bits": 3}}}, "conv_in"),
        ({"input_scales": {"conv_in": -1.0}}, "conv_in"),
        ({"input_scales": {"conv_in": float("inf")}}, "conv_in"),
        ({"input_scales": {"conv_in": "wide"}}, "conv_in"),
        ({"smoothing": {"conv_in": "not base64!"}}, "conv_in"),
        ({"smoothing": {"conv_in": "AAAAAA=="}}, "conv_in holds values that are not positive"),
        ({"smoothing": {"conv_in": "AADAfw=="}}, "conv_in holds values that are not finite"),
        ({"bias_correction": {"conv_in": "not base64!"}}, "bias correction of conv_in"),
        ({"bias_correction": {"conv_in": "AADAfw=="}}, "bias correction of conv_in holds values that are not finite"),
        ({"input_scales": {"conv_in": []}}, "conv_in"),
        ({"input_scales": {"conv_in": [0.1, 0.0]}}, "conv_in"),
        ({"input_scales": {"conv_in": [0.1, float("inf")]}}, "conv_in"),
        ({"timestep_groups": [300.0, 600.0]}, "descending"),
        ({"timestep_groups": [300.0, 300.0]}, "descending"),
        ({"timestep_groups": [float("inf"), 300.0]}, "finite"),
        ({"timestep_groups": ["late"]}, "timestep_groups"),
        ({"details": {"conv_in": {"rank": -1}}}, r"conv_in has a low-rank correction \(rank -1\).*remove the rank"),
        ({"details": {"conv_in": {"rank": 16}}}, r"conv_in has a low-rank correction \(rank 16\).*more precise scheme"),
        ({"details": {"conv_in": {"rounding": "up"}}}, "rounding"),
        ({"details": {"conv_in": {"bits": 4}}}, "bits"),
        ({"surprise": 1}, "surprise"),
        ({"ldmq_plan": 3.0}, r"\$\.ldmq_plan: 3.0 is not of type 'integer'"),
        ({"input_scales": {"conv_in": 1e-42}}, "input scale of conv_in is 1e-42.*as its inverse is"),
        ({"input_scales": {"conv_in": 1e39}}, "input scale of conv_in is 1e\\+39"),
        ({"input_scales": {"conv_in": [0.1, True]}}, "input scale of conv_in is True"),
        ({"input_scales": {"conv_in": [0.1] * 1001}}, "conv_in has 1001 input scales"),
        ({"smoothing": {"conv_in": "AQAAAA=="}}, "smoothing of conv_in holds values whose inverse is not finite"),
        ({"timestep_groups": [10**24 * 10**20, 300.0]}, "plan.json.*whole number of 45 digits"),
        ({"details": {"conv_in": {"rank": 2.0}}}, r"conv_in has a low-rank correction \(rank 2.0\)"),
        ({"details": {"conv_in": {"rank": 0.0}}}, r"conv_in has a low-rank correction \(rank 0.0\)"),
        ({"calibration": {"texts": "a dog"}}, r"calibration.texts: 'a dog' is not of type 'array'"),
        ({"calibration": {"num_inference_steps": 0}}, "num_inference_steps: 0 is less than"),
        ({"rules": [{"pattern": "*", "scheme": "fp16"}] * 2001}, "rules.*too long"),
        ({"rules": [{"pattern": "*a" * 251, "scheme": "fp16"}]}, r"rules\[0\].pattern.*too long"),
        ({"rules": [{"pattern": "*", "scheme": "x" * 10**6}]}, r"rules\[0\].scheme: 'xxx.* \.\.\. "),
    ],
)
def test_a_file_edited_into_nonsense_says_where(saved, changes, said):
    with pytest.raises(PlanError, match=said) as raised:
        Plan.load(_edited(saved, **changes))
    assert "plan.json" in str(raised.value)
    assert len(str(raised.value)) < 1100


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


LINEAR = "time_embedding.linear_1"
RICH = LayerPlan(
    SCHEMES["w4a8-timestep"],
    "by hand",
    (0.3, 0.2, 0.1),
    torch.full((32,), 0.5),
    first_token=True,
    bias_correction=torch.linspace(-1, 1, 128),
    rounding="gptq",
)


def assert_same_choice(found, wanted):
    for part in fields(LayerPlan):
        a, b = getattr(found, part.name), getattr(wanted, part.name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, part.name


def rich_plan(unet):
    plan = uniform_plan(unet, "w8a8-dynamic")
    plan.timestep_groups = [700.0, 300.0]
    plan.calibration = {"texts": ["a red circle"], "prompts": 1}
    plan.set(LINEAR, RICH)
    return plan


def test_what_is_set_is_what_a_layer_becomes_also_after_the_file(unet, tmp_path):
    plan = rich_plan(unet)
    plan.save(tmp_path / "plan.json")
    for found in (plan, Plan.load(tmp_path / "plan.json")):
        assert_same_choice(found.layers(unet)[LINEAR], RICH)
        assert found.needs_inputs
        assert found.to_dict() == plan.to_dict()
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["ldmq_plan"] == 3
    assert written["input_scales"] == {LINEAR: [0.3, 0.2, 0.1]}
    assert written["details"] == {LINEAR: {"first_token": True, "rounding": "gptq"}}


def test_setting_again_leaves_nothing_of_before(unet):
    plan, untouched = rich_plan(unet), uniform_plan(unet, "w8a8-dynamic")
    plan.set(LINEAR, LayerPlan(SCHEMES["w8a8-dynamic"], "as all"))
    untouched.timestep_groups, untouched.calibration = plan.timestep_groups, plan.calibration
    assert plan.to_dict() == untouched.to_dict()
    assert not plan.needs_inputs


def test_a_scale_is_kept_for_the_scheme_that_was_not_chosen(unet):
    plan = uniform_plan(unet, "w8a8-dynamic")
    plan.set(LINEAR, LayerPlan(SCHEMES["w8a8-dynamic"], "", 0.25))
    plan.rules[0]["scheme"] = "w8a8-static"
    assert plan.layer(LINEAR).input_scale == 0.25


def test_gptq_of_a_layer_that_stays_float_needs_no_inputs(unet):
    plan = rich_plan(unet)
    plan.exceptions[LINEAR] = {"scheme": "fp16"}
    assert not plan.needs_inputs


def test_gptq_is_asked_for_every_weight_that_is_quantized_and_known_to_its_layer(unet):
    plan = rich_plan(unet)
    plan.exceptions["conv_in"] = {"scheme": "fp16"}
    before = plan.to_dict()
    rounded = plan.with_gptq(unet)
    found = {name for name, entry in rounded.details.items() if entry["rounding"] == "gptq"}
    assert found == {name for name, layer_plan in plan.layers(unet).items() if layer_plan.scheme.quantizes}
    assert "conv_in" not in found
    assert rounded.details[LINEAR] == {"first_token": True, "rounding": "gptq"}
    assert rounded.needs_inputs
    assert plan.to_dict() == before


def test_gptq_by_the_end_of_the_trajectory_is_said_of_each_layer_and_read_again(unet):
    rounded = Plan.from_dict(rich_plan(unet).with_gptq(unet, end=True).to_dict())
    assert {entry["rounding"] for entry in rounded.details.values()} == {"gptq-end"}
    assert rounded.needs_inputs
    assert rounded.layer(LINEAR).rounding == "gptq-end"


def test_gptq_is_not_asked_for_a_grouped_convolution_below_an_adapter():
    model, adapter = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)), nn.Module()
    adapter.base_layer, model[0] = model[0], adapter
    assert list(uniform_plan(model, "w8a8-dynamic").with_gptq(model).details) == ["1"]


def test_a_config_leaves_out_vectors_and_texts_but_names_who_has_them(unet):
    plan = rich_plan(unet).without_vectors().to_dict()
    assert plan["smoothing"] == plan["bias_correction"] == {LINEAR: ""}
    assert plan["calibration"] == {"prompts": 1}
    assert plan["details"] == {LINEAR: {"first_token": True, "rounding": "gptq"}}


def test_the_plan_of_a_checkpoint_knows_that_its_vectors_are_elsewhere(unet):
    plan = rich_plan(unet)
    assert plan.has_vectors
    read = Plan.from_dict(plan.without_vectors().to_dict())
    assert not read.has_vectors
    assert (read.smoothing, read.bias_correction) == ({LINEAR: None}, {LINEAR: None})
    with pytest.raises(PlanError, match=r"the plan of a checkpoint.*load the checkpoint"):
        read.layers(unet)
    layer_plan = read.layers(unet, vectors_elsewhere=True)[LINEAR]
    assert layer_plan == replace(plan.layer(LINEAR), smoothing=None, bias_correction=None)
    assert plan.has_vectors


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (LINEAR, {"input_scale": (0.3, 0.2)}, r"linear_1: input_scales has 2 values.*each of the 3 timestep groups"),
        (LINEAR, {"input_scale": 0.3}, r"linear_1: input_scales has 1 values.*each of the 3 timestep groups"),
        (LINEAR, {"input_scale": None}, "linear_1: w4a8-timestep needs an entry in input_scales"),
        (LINEAR, {"scheme": SCHEMES["w8a8-static"]}, "linear_1: input_scales has a list of 3.*takes one number"),
        (LINEAR, {"smoothing": torch.ones(31)}, "linear_1: smoothing has 31 values, the layer takes 32"),
        (LINEAR, {"bias_correction": torch.ones(32)}, "linear_1: bias_correction has 32 values, the layer takes 128"),
        (LINEAR, {"rounding": "up"}, "linear_1: details has rounding 'up': choose one of nearest, gptq"),
        (LINEAR, {"scheme": SCHEMES["fp16"]}, "linear_1: details has a rounding, but fp16.*remove"),
        ("conv_in", {"smoothing": None, "bias_correction": None}, "conv_in: details has first_token.*only a linear"),
    ],
)
def test_a_layer_that_cannot_become_what_is_set_is_named(unet, name, changes, said):
    plan = rich_plan(unet)
    plan.set(name, replace(RICH, **changes))
    with pytest.raises(PlanError, match=said):
        plan.layers(unet)


def test_timestep_groups_out_of_order_are_refused(unet):
    plan = rich_plan(unet)
    plan.timestep_groups = [300.0, 700.0]
    with pytest.raises(PlanError, match=r"timestep groups \[300.0, 700.0\]"):
        plan.layers(unet)


def test_a_file_of_version_1_still_loads(unet, tmp_path):
    plan = uniform_plan(unet, "w8a16")
    plan.set("conv_in", LayerPlan(SCHEMES["w8a8-static"], "by hand", 0.02, torch.full((4,), 2.0)))
    old = plan.to_dict() | {"ldmq_plan": 1}
    for new in ("timestep_groups", "bias_correction", "details"):
        del old[new]
    (tmp_path / "old.json").write_text(json.dumps(old))
    loaded = Plan.load(tmp_path / "old.json")
    assert loaded.to_dict() == plan.to_dict()
    assert_same_choice(loaded.layers(unet)["conv_in"], plan.layer("conv_in"))


def test_a_file_of_version_2_is_read_in_the_words_of_today(unet, tmp_path):
    plan = rich_plan(unet)
    plan.set("conv_in", LayerPlan(SCHEMES["w8a8x2"], "by hand", 0.02))
    plan.rules.append({"pattern": "mid_block.*.to_k", "scheme": "w8a8-timestep"})
    old = plan.to_dict() | {"ldmq_plan": 2}
    old["step_groups"] = old.pop("timestep_groups")
    text = json.dumps(old)
    for former, name in FORMER_NAMES.items():
        text = text.replace(f'"{name}"', f'"{former}"')
    assert "w8a8-stepped" in text
    assert "w8a8x2" not in text
    (tmp_path / "old.json").write_text(text)
    assert Plan.load(tmp_path / "old.json").to_dict() == plan.to_dict()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_rank_of_0_in_an_older_file_is_dropped(unet, tmp_path, version):
    plan = rich_plan(unet)
    old = plan.to_dict() | {"ldmq_plan": version}
    old["details"] = {LINEAR: {**old["details"][LINEAR], "rank": 0}, "conv_in": {"rank": 0}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Plan.load(tmp_path / "old.json").to_dict() == plan.to_dict()


def test_a_plan_records_the_model_it_was_made_for(unet):
    assert rich_plan(unet).model == model_record(unet)
