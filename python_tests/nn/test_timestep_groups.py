"""Stepped layers take the scale of the timestep's group, wherever the model goes and however it is called."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import pickle
import threading
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmq_kernels.conversion import ConversionError, convert
from ldmq_kernels.integrations.diffusers.fused import unfuse
from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear, timestep_groups
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, model_record
from python_tests.tiny import SHALLOW, mixed_plan, tiny_unet, unet_inputs

BOUNDARIES = [750.0, 300.5, 20.0]
SCALES = [0.031, 0.023, 0.017, 0.013]
# on both sides of each boundary, and the group that holds the timestep
TIMES = {999: 0, 750: 0, 749: 1, 301: 1, 300: 2, 20: 2, 19: 3, 0: 3}


def timestep_plan(unet: nn.Module, scheme: str = "w8a8-timestep") -> Plan:
    """Every layer timestep, each with scales of its own, every third one smoothed."""
    plan = Plan(model_record(unet), [{"pattern": "*", "scheme": scheme}], timestep_groups=list(BOUNDARIES))
    generator = torch.Generator().manual_seed(3)
    for index, (name, layer) in enumerate(quantizable_layers(unet).items()):
        plan.input_scales[name] = [scale * (1 + index % 5 / 10) for scale in SCALES]
        if index % 3 == 0:
            exponents = torch.randint(-1, 2, (layer.weight.shape[1],), generator=generator)
            plan.smoothing[name] = torch.exp2(exponents.float())
    return plan


def static_plan_of(plan: Plan, group: int) -> Plan:
    rules = [{"pattern": "*", "scheme": plan.rules[0]["scheme"].replace("timestep", "static")}]
    scales: dict[str, Any] = {name: scale[group] for name, scale in plan.input_scales.items()}  # type: ignore[index]
    return dataclasses.replace(plan, rules=rules, input_scales=scales, timestep_groups=[])


def timestep_unet(scheme: str = "w8a8-timestep") -> Any:
    unet = tiny_unet(**SHALLOW)
    convert(unet, timestep_plan(unet, scheme))
    return unet


def run(unet: Any, timestep: Any) -> Tensor:
    with torch.no_grad():
        return unet(**(unet_inputs() | {"timestep": timestep})).sample


@pytest.fixture(scope="module")
def by_group() -> list[Any]:
    """The model with each group's scales, static."""
    unets = []
    for group in range(len(SCALES)):
        unet = tiny_unet(**SHALLOW)
        convert(unet, static_plan_of(timestep_plan(unet), group))
        unets.append(unet)
    return unets


def expected(by_group: list[Any], timestep: int) -> Tensor:
    return run(by_group[TIMES[timestep]], timestep)


def test_groups_differ(by_group: list[Any]) -> None:
    outputs = [run(unet, 500) for unet in by_group]
    assert len({float(out.double().sum()) for out in outputs}) == len(outputs)


@pytest.mark.parametrize(
    "form", [int, float, torch.tensor, lambda t: torch.tensor([t, t]), lambda t: torch.tensor(t * 1.0)]
)
def test_a_time_step_on_either_side_of_a_boundary_is_bit_equal_to_its_groups_static_scales(
    by_group: list[Any], form: Any
) -> None:
    unet = timestep_unet()
    for timestep in TIMES:
        assert torch.equal(run(unet, form(timestep)), expected(by_group, timestep)), timestep


def test_the_time_step_may_come_by_position(by_group: list[Any]) -> None:
    inputs = unet_inputs()
    unet = timestep_unet()
    with torch.no_grad():
        out = unet(inputs["sample"], 20, inputs["encoder_hidden_states"]).sample
    assert torch.equal(out, expected(by_group, 20))


@pytest.mark.parametrize("scheme", ["w8a8-timestep", "w4a8-timestep"])
def test_unfused_blocks_and_unpacked_weights_follow_the_time_step_too(scheme: str) -> None:
    unet = timestep_unet(scheme)
    plan = timestep_plan(tiny_unet(**SHALLOW), scheme)
    with use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda _: False)
        unet = copy.deepcopy(unet)  # q, k and v are merged now
        for timestep, group in TIMES.items():
            static = tiny_unet(**SHALLOW)
            convert(static, static_plan_of(plan, group))
            wanted = run(static, timestep)
            assert torch.equal(run(unet, timestep), wanted)
            assert torch.equal(run(unfuse(copy.deepcopy(unet)), timestep), run(unfuse(static), timestep))


def through_load_state_dict(unet: Any) -> Any:
    other = tiny_unet(4, **SHALLOW)
    plan = timestep_plan(other)
    plan.input_scales = {name: [0.5, 0.4, 0.3, 0.2] for name in plan.input_scales}
    convert(other, plan)
    run(other, 20)
    other.load_state_dict(unet.state_dict())
    return other


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda unet: pickle.loads(pickle.dumps(unet)),
        lambda unet: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(unet)))),
        lambda unet: unet.to(torch.float64).to(torch.float32),
        through_load_state_dict,
    ],
    ids=["deepcopy", "pickle", "all three", "to", "load_state_dict"],
)
def test_a_copied_moved_or_loaded_model_follows_the_time_step(by_group: list[Any], change: Any) -> None:
    unet = timestep_unet()
    run(unet, 20)
    other = change(unet)
    for timestep in TIMES:
        assert torch.equal(run(other, timestep), expected(by_group, timestep))
        if change is copy.deepcopy:  # neither moves the other
            assert torch.equal(run(unet, 999 - timestep), run(copy.deepcopy(unet), 999 - timestep))


def test_a_saved_model_follows_the_time_step_after_loading(by_group: list[Any], tmp_path: Any) -> None:
    unet = timestep_unet()
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for timestep in TIMES:
        assert torch.equal(run(loaded, timestep), expected(by_group, timestep))


def test_a_layer_called_by_itself_takes_the_first_group() -> None:
    torch.manual_seed(0)
    float_layer, x = nn.Linear(70, 33), torch.randn(3, 5, 70)
    layer = QuantLinear.from_float(float_layer, SCHEMES["w8a8-timestep"], input_scale=torch.tensor(SCALES))
    for group in (0, 3, 1):
        static = QuantLinear.from_float(
            float_layer, SCHEMES["w8a8-static"], input_scale=torch.tensor(SCALES[group : group + 1])
        )
        if group:
            layer.use_timestep_group(group)
        assert torch.equal(layer(x), static(x))
    assert "input_scale=0.031/0.023/0.017/0.013" in repr(layer)


def test_the_group_stays_when_the_model_moves_between_the_hook_and_the_call(by_group: list[Any]) -> None:
    """As accelerate's offloading does: it moves the model inside of its forward."""
    unet = timestep_unet()
    forward = unet.forward

    def moved(*args: Any, **kwargs: Any) -> Any:
        unet.to(torch.float64).to(torch.float32)
        return forward(*args, **kwargs)

    unet.forward = moved
    for timestep in TIMES:
        assert torch.equal(run(unet, timestep), expected(by_group, timestep))


@pytest.mark.slow
@pytest.mark.parametrize("compiled_blocks", [False, True])
def test_threads_that_share_a_model_are_each_at_their_own_time_step(by_group: list[Any], compiled_blocks: bool) -> None:
    """All begin before the first layer runs, and none ends before all came to the last."""
    unet, times = timestep_unet(), (999, 500, 100, 0)
    wanted = {timestep: run(unet, timestep) for timestep in times}
    assert len({float(out.double().sum()) for out in wanted.values()}) == len(times)
    unet = copy.deepcopy(unet)  # the scales are found in the threads' first calls
    if compiled_blocks:
        torch._dynamo.reset()
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        together = threading.Barrier(len(times))

        def wait(*_: Any) -> None:
            together.wait(timeout=60)

        unet.conv_in.register_forward_pre_hook(wait)
        unet.conv_out.register_forward_pre_hook(wait)
    with concurrent.futures.ThreadPoolExecutor(len(times)) as pool:
        for _ in range(3):
            for timestep, out in zip(times, pool.map(lambda t: run(unet, t), times), strict=True):
                assert torch.equal(out, wanted[timestep]), timestep


def test_a_compilation_that_ends_in_another_thread_leaves_a_call_at_its_own_time_step(
    by_group: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, flag = timestep_unet(), "_is_compiling_flag"  # of the process
    unet.conv_in.register_forward_pre_hook(lambda *_: monkeypatch.setattr(torch.compiler, flag, False))
    for timestep in TIMES:
        monkeypatch.setattr(torch.compiler, flag, True)
        assert torch.equal(run(unet, timestep), expected(by_group, timestep))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_call_costs_one_bucketize_and_one_gather_and_waits_for_nothing() -> None:
    unet = timestep_unet()
    groups = timestep_groups.attached(unet)
    assert groups is not None
    with Seen() as seen:
        groups.before(unet, (None, torch.tensor(321)), {})
    names = [op.split(".")[1] for op in seen.ops]
    assert names.count("bucketize") == names.count("index_select") == 1
    assert len(names) < 8
    assert not {"_local_scalar_dense", "item", "is_nonzero"} & set(names)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_follows_the_time_step_without_a_graph_break(by_group: list[Any], backend: str) -> None:
    unet = timestep_unet()
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    run(unet, 20)  # an earlier call, which is not compiled, leaves nothing behind
    for timestep in reversed(TIMES):
        wanted, out = run(unet, timestep), run(compiled, torch.tensor(timestep))
        assert torch.equal(wanted, expected(by_group, timestep))
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
        others = [run(by_group[group], timestep) for group in range(4) if group != TIMES[timestep]]
        assert all(float((out - other).abs().mean()) > 4 * float((out - wanted).abs().mean()) for other in others)


@pytest.mark.slow
def test_a_model_that_was_loaded_and_copied_before_a_compiled_call_follows_the_time_step(by_group: list[Any]) -> None:
    unet = copy.deepcopy(through_load_state_dict(timestep_unet()))
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, torch.tensor(20)), expected(by_group, 20))
    other = tiny_unet(**SHALLOW)
    plan = timestep_plan(other)
    plan.input_scales = {name: scale[::-1] for name, scale in plan.input_scales.items()}  # type: ignore[index]
    convert(other, plan)
    unet.load_state_dict(other.state_dict())
    for timestep in (0, 999):
        assert torch.equal(run(compiled, torch.tensor(timestep)), run(other, timestep))


@pytest.mark.slow
def test_compiled_blocks_of_an_eager_model_follow_the_time_step(by_group: list[Any]) -> None:
    unet = timestep_unet()
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    for timestep in TIMES:
        assert torch.equal(run(unet, timestep), expected(by_group, timestep))


def test_copies_in_a_float_model_follow_the_time_step_inside_the_block(by_group: list[Any]) -> None:
    unet = unfuse(timestep_unet())
    timestep_groups.detach(unet)
    assert torch.equal(run(unet, 20), run(unfuse(copy.deepcopy(by_group[0])), 20))
    with timestep_groups.following(unet, BOUNDARIES):
        assert torch.equal(run(unet, 20), run(unfuse(copy.deepcopy(by_group[2])), 20))
    assert timestep_groups.attached(unet) is None
    assert not unet._forward_pre_hooks


def test_attaching_again_takes_the_place_of_the_first(by_group: list[Any]) -> None:
    unet = timestep_unet()
    hooks = len(unet._forward_pre_hooks)
    timestep_groups.attach(unet, [1000.0, 999.5, 999.2])
    assert len(unet._forward_pre_hooks) == hooks == 1
    assert torch.equal(run(unet, 500), run(by_group[3], 500))


def test_a_model_without_timestep_scales_or_without_a_timestep() -> None:
    plain = nn.Sequential(nn.Linear(8, 8))
    timestep_groups.attach(plain, BOUNDARIES)
    assert not plain._forward_pre_hooks
    plan = Plan(model_record(plain), [{"pattern": "*", "scheme": "w8a8-timestep"}], input_scales={"0": [0.1]})
    with pytest.raises(ConversionError, match=r"Sequential is called without a timestep.*static"):
        convert(plain, plan)
    assert type(plain[0]) is nn.Linear
    with pytest.raises((TypeError, ValueError), match="timestep"):
        timestep_unet()(unet_inputs()["sample"])


def test_scales_lie_where_kernels_read_them_in_pieces_of_16_bytes() -> None:
    unet = timestep_unet()
    run(unet, 20)
    layers = [m for m in unet.modules() if isinstance(m, QuantLinear | QuantConv2d)]
    assert all(isinstance(layer, QuantizedLayer) for layer in layers)
    for layer in layers:
        assert layer.call_scale.shape == (1,)
        assert layer.call_scale.data_ptr() % 16 == layer.input_inv_scale.data_ptr() % 16 == 0
        assert layer.input_inv_scale.is_contiguous()


def test_the_mixed_plan_takes_its_middle_group() -> None:
    unet = tiny_unet()
    convert(unet, mixed_plan(unet))
    run(unet, unet_inputs()["timestep"])
    timestep = [m for m in unet.modules() if isinstance(m, QuantizedLayer) and m.scheme.has_timestep_scales]
    assert timestep
    assert all(torch.equal(layer.call_scale, layer.input_scale[1:2]) for layer in timestep)


def test_inference_mode_and_no_grad_may_alternate(by_group: list[Any]) -> None:
    with torch.inference_mode():
        unet = timestep_unet()
    for timestep in TIMES:
        with torch.inference_mode():
            out = run(unet, timestep)
        assert torch.equal(out, run(unet, timestep))
        assert torch.equal(out, expected(by_group, timestep))
