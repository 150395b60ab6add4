"""A format that is registered in a test alone serves everywhere: only its object says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.integrations.diffusers.quantizer import CheckpointError
from ldmq_kernels.nn import QuantLinear
from ldmq_kernels.numerics.formats import (
    FORMATS,
    SCHEMES,
    ActivationFormat,
    Buffer,
    Format,
    WeightFormat,
    parse_schemes,
    register,
    unregister,
)
from ldmq_kernels.numerics.formats.int8 import INT8_ACTIVATIONS, W8A8
from ldmq_kernels.numerics.formats.rounding import not_positive, order_of, per_channel, rounded
from ldmq_kernels.planning.options import make_options
from ldmq_kernels.plans.cost import layer_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan, PlanError, uniform_plan
from ldmq_kernels.report.rows import layer_rows
from ldmq_kernels.report.sections import chip
from ldmq_kernels.report.svg import draw, scheme_colour, scheme_variables
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from python_tests.report.analyses import made_up_analysis
from python_tests.tiny import run_unet, tiny_unet


class Int3Weight(WeightFormat):
    """int8 integers in [-3, 3] with a step for each output channel: value = weight * step."""

    is_coarse = True

    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        return {"weight": Buffer(tuple(shape), torch.int8), "step": Buffer((shape[0],), torch.float32)}

    def quantize(self, weight: Tensor, hessian: Tensor | None = None) -> dict[str, Tensor]:
        step = (weight.float().flatten(1).abs().amax(1) / 3).clamp_min(1e-30)
        return {
            "weight": rounded(weight.float(), per_channel(step, weight), 3, order_of(weight, hessian)),
            "step": step,
        }

    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        return stored["weight"] * per_channel(stored["step"], stored["weight"])

    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        return (stored.abs() > 3, "in [-3, 3]") if name == "weight" else not_positive(stored)


ACTIVATIONS = tuple(a for a in INT8_ACTIVATIONS if a.name in ("static", "dynamic"))
PRODUCTS = {"linear": "linear_w8a8", "conv2d": "conv2d_w8a8"}
W3A8 = Format("w3a8", Int3Weight(), ACTIVATIONS, PRODUCTS, ("step",), operation_cost=0.75, like="w8a8")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = list(FORMATS), list(SCHEMES)
    register(W3A8)
    yield
    unregister("w3a8")
    assert (list(FORMATS), list(SCHEMES)) == before


def toy_plan(model: nn.Module) -> Plan:
    """Dynamic but for every third layer, which is static."""
    plan = uniform_plan(model, "w3a8-dynamic")
    for index, name in enumerate(quantizable_layers(model)):
        if index % 3 == 0:
            plan.set(name, LayerPlan(SCHEMES["w3a8-static"], "every third", 0.03))
    return plan


@pytest.fixture
def quantized() -> Any:
    unet = tiny_unet()
    ldmq.quantize(unet, toy_plan(unet))
    return unet


def test_its_names_are_known_wherever_names_are_read() -> None:
    assert [str(s) for s in parse_schemes(["w3a8"])] == ["w3a8-static", "w3a8-dynamic"]
    assert SCHEMES["w3a8-static"].is_static
    assert SCHEMES["w3a8-static"].finer is SCHEMES["w8a8-static"]
    assert str(LdmqConfig("w3a8-dynamic").scheme) == "w3a8-dynamic"


def test_a_quantized_layer_computes_what_its_integers_and_steps_stand_for() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(70, 33), torch.randn(5, 70)
    quantized = QuantLinear.from_float(layer, SCHEMES["w3a8-dynamic"])
    assert int(quantized.plain_weight.abs().max()) == 3
    exact = nn.functional.linear(x, quantized.real_weight(), layer.bias)
    torch.testing.assert_close(quantized(x), exact, rtol=0.02, atol=0.02)


def test_a_plan_with_it_survives_its_file(tmp_path: Path) -> None:
    unet = tiny_unet()
    plan = toy_plan(unet)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    assert {str(choice.scheme) for choice in loaded.layers(unet).values()} == {"w3a8-static", "w3a8-dynamic"}


def test_a_saved_model_loads_to_the_same_bits(quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    stored = quantized.state_dict()
    assert any(name.endswith(".step") for name in stored)
    assert loaded.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(run_unet(loaded), run_unet(quantized))


def test_a_value_that_it_never_stores_is_refused(quantized: Any, tmp_path: Path) -> None:
    quantized.conv_in.unpack()
    quantized.conv_in.quantized_weight[0, 0, 0, 0] = 4
    with pytest.raises(ValueError, match=r"conv_in\.weight holds a value that is not in \[-3, 3\]"):
        quantized.load_state_dict(quantized.state_dict())
    with pytest.raises(CheckpointError, match=r"conv_in: weight holds a value that is not in \[-3, 3\]"):
        quantized.save_pretrained(tmp_path)


def test_its_bytes_and_its_cost_are_the_planners(quantized: Any) -> None:
    model, plan = tiny_unet(), toy_plan(tiny_unet())
    for name, layer in quantizable_layers(model).items():
        stored = quantized.get_submodule(name).state_dict()
        bytes_stored = sum(t.numel() * t.element_size() for key, t in stored.items() if key != "bias")
        assert layer_bytes(layer, plan.layer(name)) == bytes_stored
    analysis = made_up_analysis(model)
    candidate = LayerCandidate(LayerPlan(SCHEMES["w3a8-dynamic"]), 1e-5, "plain")
    found = {name: [candidate] for name in analysis.candidates}
    output = {(name, "w3a8-dynamic"): analysis.output[name, "w8a8-dynamic"] for name in found}
    options = make_options(model, replace(analysis, candidates=found, output=output), ["w3a8", "fp16"])
    assert {option.scheme for option in options} == {"w3a8-dynamic", "fp16"}
    assert all(o.operations == pytest.approx(1000 * 0.75 * 1.1) for o in options if not o.is_float)


def test_a_report_shows_it_in_colours_of_its_own(quantized: Any) -> None:
    model = tiny_unet()
    rows = layer_rows(model, made_up_analysis(model), toy_plan(model))
    assert {row.scheme for row in rows} == {"w3a8-static", "w3a8-dynamic"}
    assert 'var(--w3a8-static)">w3a8-static' in chip("w3a8-static")
    for dark in (False, True):
        assert f"--w3a8-static: {SCHEMES['w3a8-static'].colours[dark]};" in scheme_variables(dark=dark)
    picture = draw("toy", 1, 1, lambda f: f.add_subplot().plot([0, 1], [0, 1], color=scheme_colour("w3a8-static")))
    assert "var(--w3a8-static)" in picture
    assert len({s.colours for s in SCHEMES.values()}) == len(SCHEMES)


def test_what_is_registered_no_more_is_refused_by_name(tmp_path: Path) -> None:
    unet = tiny_unet()
    plan = toy_plan(unet)
    plan.save(tmp_path / "plan.json")
    unregister("w3a8")
    try:
        with pytest.raises(PlanError, match="'w3a8-dynamic' is not one of"):
            Plan.load(tmp_path / "plan.json")
    finally:
        register(W3A8)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a format or scheme 'w3a8' already"):
        register(W3A8)
    with pytest.raises(ValueError, match="there is a format or scheme 'w8a8-static' already"):
        register(replace(W3A8, name="w8a8-static", activations=(ActivationFormat("float"),)))


def test_a_format_without_an_implementation_is_an_error_that_says_what_is_missing() -> None:
    bits: Any = 8
    with pytest.raises(TypeError, match="operation_cost"):
        Format("fp8", bits, bits)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"format 'fp8' has no implementation: weight must be a WeightFormat.*this is 8"
    ):
        Format("fp8", bits, bits, {}, (), 1.0)
    with pytest.raises(TypeError, match="products must name the op that multiplies"):
        replace(W8A8, name="fp8", products={})

    class Unfinished(WeightFormat):
        def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
            return {}

    with pytest.raises(TypeError, match=r"dequantize.*quantize.*wrong_values"):
        Unfinished()  # type: ignore[abstract]


def test_an_op_that_does_not_exist_is_an_error_before_anything_is_computed() -> None:
    unfinished = replace(W3A8, name="w3a3", products={"linear": "linear_w3a3"})
    register(unfinished)
    try:
        with pytest.raises(ValueError, match=r"w3a3-dynamic is computed by the op linear_w3a3, which .* does not have"):
            QuantLinear.from_float(nn.Linear(4, 4), SCHEMES["w3a3-dynamic"])
    finally:
        unregister("w3a3")
