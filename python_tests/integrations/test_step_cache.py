"""Tabulated time embeddings: the same bits as computed ones, and computed wherever a row would not be right."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from ldmq_kernels import graphs
from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import fuse, unfuse
from ldmq_kernels.integrations.diffusers.step_cache import (
    TRAIN_STEPS,
    TabulatedTimesteps,
    cache_time_embeddings,
    uncache_time_embeddings,
)
from ldmq_kernels.nn import QuantLinear, step_groups
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.planning.plan import uniform_plan
from python_tests.test_graphs import FakeGpu
from python_tests.tiny import draw, mixed_plan, tiny_unet, unet_inputs

SCHEMES = ("float", "w8a8-dynamic", "w4a8-dynamic", "w8a16", "w4a16", "mixed")
STEPS = [7, 321, 17.25, 998.6]
RESNET = "mid_block.resnets.0"


def made(scheme: str = "w8a8-dynamic", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny UNet with fused blocks."""
    unet = tiny_unet(**changes)
    if scheme == "float":
        fuse(unet)
    else:
        convert(unet, mixed_plan(unet) if scheme == "mixed" else uniform_plan(unet, scheme))
    return unet.to(dtype)


def run(unet: nn.Module, timestep: Any = 321, batch: int = 2) -> Tensor:
    dtype = unet.conv_in.bias.dtype
    arguments = {**unet_inputs(dtype, batch), "timestep": timestep}
    with torch.no_grad():
        return unet(**arguments, return_dict=False)[0]


def layer_calls(unet: nn.Module, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many linears of the time embedding and of its projections are computed while `call` runs."""
    resnets = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    layers = {unet.time_embedding.linear_1, unet.time_embedding.linear_2, *(r.time_emb_proj for r in resnets)}
    calls: list[Any] = []
    with monkeypatch.context() as patch:
        for kind, name in ((nn.Linear, "forward"), (QuantLinear, "forward"), (QuantLinear, "linear")):
            real = getattr(kind, name)

            def counted(self: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
                calls.extend([self] if self in layers else [])
                return real(self, *args, **kwargs)

            patch.setattr(kind, name, counted)
        call()
    return len(set(calls))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cached_unet_gives_the_same_bits(scheme: str, dtype: torch.dtype) -> None:
    unet = made(scheme, dtype)
    timesteps = [7, 321.0, torch.tensor(321), torch.tensor([17.25]), torch.tensor(998.6), torch.tensor([7, 7])]
    wanted = [run(unet, timestep) for timestep in timesteps]
    count = cache_time_embeddings(unet, STEPS)
    assert count == sum(type(module).__name__ == "ResnetBlock2D" for module in unet.modules())
    for timestep, output in zip(timesteps, wanted, strict=True):
        assert torch.equal(run(unet, timestep), output)
    uncache_time_embeddings(unet)
    assert type(unet.time_proj) is Timesteps
    assert type(unet.time_embedding) is TimestepEmbedding
    assert torch.equal(run(unet, 321), wanted[2])


def test_rows_are_gathered_and_no_layer_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made()
    assert layer_calls(unet, lambda: run(unet), monkeypatch) == 10
    assert cache_time_embeddings(unet, STEPS) == 8
    assert layer_calls(unet, lambda: run(unet), monkeypatch) == 0


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_other_batches_differ_by_rounding_at_most(batch: int) -> None:
    unet = made("float")
    wanted = run(unet, 321, batch)
    cache_time_embeddings(unet, STEPS)
    assert float(sqnr_db(wanted, run(unet, 321, batch))) > 100


@pytest.mark.parametrize("scheme", ["float", "w8a8-dynamic"])
def test_each_sample_may_have_a_time_step_of_its_own(scheme: str) -> None:
    unet = made(scheme)
    each = torch.tensor([321, 7])
    wanted = run(unet, each)
    cache_time_embeddings(unet, STEPS)
    assert torch.equal(run(unet, each), wanted)
    assert not torch.equal(run(unet, each.flip(0)), wanted)


def test_by_default_the_table_holds_the_training_steps() -> None:
    unet = made("float")
    wanted = [run(unet, step) for step in (0, 1, 999)]
    cache_time_embeddings(unet)
    assert unet.time_proj.table.shape[0] == TRAIN_STEPS + 1
    assert all(torch.equal(run(unet, step), out) for step, out in zip((0, 1, 999), wanted, strict=True))


# -- time steps that are not in the table --------------------------------------------------------------


@pytest.mark.parametrize("timestep", [8, -1, 5000, 321.5, 17.2500001, 17.250002, float("inf"), torch.tensor([321, 8])])
def test_a_time_step_that_is_not_in_the_table_is_computed(timestep: Any) -> None:
    unet = made()
    wanted = run(unet, timestep)
    cache_time_embeddings(unet, STEPS)
    assert torch.equal(run(unet, timestep), wanted) or bool(wanted.isnan().any())


def test_where_the_device_is_not_waited_for_an_absent_time_step_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made()
    cache_time_embeddings(unet, STEPS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: no look at values
    for absent in (-4.0, 8.0, 321.5, 1e9, float("nan"), float("inf")):
        with torch.no_grad():
            rows = unet.time_proj(torch.tensor([321.0, absent]))
        assert bool(torch.isfinite(rows[0]).all())
        assert bool(rows[1].isnan().all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_a_device_other_than_the_cpu_is_not_waited_for(dtype: torch.dtype) -> None:
    """Meta tensors refuse whatever reads their values."""
    unet = made("float")
    cache_time_embeddings(unet, STEPS)
    unet.to("meta")
    with torch.no_grad():
        rows = unet.time_proj(torch.zeros((), dtype=dtype, device="meta").expand(2))
        assert rows.shape == (2, unet.time_embedding.row_width)
        assert unet.time_embedding(rows) is rows


def test_time_steps_that_are_none_or_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="found nan, finite numbers"):
        cache_time_embeddings(made(), [3, float("nan")])
    with pytest.raises(ValueError, match="found none"):
        cache_time_embeddings(made(), torch.empty(0))


def test_a_pipeline_with_fractional_time_steps_draws_the_same(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    convert(pipe.unet, uniform_plan(pipe.unet, "w8a8-dynamic"))
    wanted = draw(pipe, steps=3)
    assert not torch.equal(pipe.scheduler.timesteps, pipe.scheduler.timesteps.round())
    cache_time_embeddings(pipe.unet, pipe.scheduler.timesteps)
    images: list[Tensor] = []
    assert layer_calls(pipe.unet, lambda: images.append(draw(pipe, steps=3)), monkeypatch) == 0
    assert float(sqnr_db(wanted, images[0])) > 60


# -- models that do not qualify ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"num_class_embeds": 3}, "num_class_embeds=3"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn='silu'"),
        ({"time_embedding_type": "fourier"}, "time_proj is a GaussianFourierProjection"),
        ({"resnet_time_scale_shift": "scale_shift"}, "a scale and a shift"),
        ({"down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D")}, "ResnetDownsampleBlock2D"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "addition_embed_type='text_time'",
        ),
    ],
)
def test_what_depends_on_more_than_the_time_step_is_not_cached(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    unet = fuse(tiny_unet(**changes))
    with caplog.at_level(logging.WARNING):
        assert cache_time_embeddings(unet, STEPS) == 0
    assert reason in caplog.text
    assert type(unet.time_embedding) is TimestepEmbedding
    assert not any("time_columns" in vars(module) for module in unet.modules())


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda: tiny_unet(), "call fuse"),
        (lambda: made("float").train(), "training mode"),
        (lambda: nn.Linear(3, 3), "UNet2DConditionModel"),
        (lambda: made("float").to("meta"), "not in memory"),
    ],
)
def test_a_model_that_is_not_ready_is_left_as_it_is(
    prepare: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepare()
    with caplog.at_level(logging.WARNING):
        assert cache_time_embeddings(model, STEPS) == 0
    assert reason in caplog.text


@pytest.mark.parametrize(
    "name", ["time_proj", "time_embedding", "time_embedding.linear_2", "time_embedding.act", RESNET]
)
def test_a_model_hooked_before_is_not_cached(name: str, caplog: pytest.LogCaptureFixture) -> None:
    unet = made()
    unet.get_submodule(name).register_forward_hook(lambda *_: None)
    assert cache_time_embeddings(unet, STEPS) == 0
    assert "hooked" in caplog.text


def test_stepped_layers_take_the_scales_of_their_row(caplog: pytest.LogCaptureFixture) -> None:
    unet = made("mixed")
    layers = [unet.time_embedding.linear_1, unet.time_embedding.linear_2]
    layers += [module.time_emb_proj for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    assert any(isinstance(layer, QuantLinear) and layer.scheme.is_stepped for layer in layers)
    steps = [900, 450, 100]  # one in each group
    wanted = [run(unet, step) for step in steps]
    cache_time_embeddings(unet, steps)
    assert all(torch.equal(run(unet, step), out) for step, out in zip(steps, wanted, strict=True))
    step_groups.detach(unet)
    assert cache_time_embeddings(unet, steps) == 0
    assert "attach" in caplog.text


def test_a_block_of_another_kind_projects_the_time_embedding_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made()
    unet.get_submodule(RESNET).nonlinearity = nn.ReLU()
    wanted = run(unet)
    assert cache_time_embeddings(unet, STEPS) == 7
    assert layer_calls(unet, lambda: run(unet), monkeypatch) == 1
    assert torch.equal(run(unet), wanted)


# -- what happens to a cached model --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("time_proj", "time_embedding", "time_embedding.linear_1", "time_embedding.act", RESNET),
        *(f"{RESNET}.{part}" for part in ("time_emb_proj", "nonlinearity", "conv1", "norm1", "dropout")),
    ],
)
def test_a_hook_sees_what_it_would_see_without_the_table(name: str) -> None:
    def inputs_seen(unet: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        handle = unet.get_submodule(name).register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))
        out = run(unet)
        handle.remove()
        return [*seen, out]

    unet = made()
    wanted = inputs_seen(unet)
    cache_time_embeddings(unet, STEPS)
    found = inputs_seen(unet)
    assert len(found) == len(wanted) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gradients_and_autocast_are_computed_without_the_table() -> None:
    unet = made("float")
    cache_time_embeddings(unet, STEPS)
    unet(**unet_inputs()).sample.sum().backward()
    assert unet.time_embedding.linear_1.weight.grad is not None
    assert unet.get_submodule(RESNET).time_emb_proj.weight.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = run(unet)
        uncache_time_embeddings(unet)
        assert torch.equal(run(unet), cached)


def test_training_drops_the_table(caplog: pytest.LogCaptureFixture) -> None:
    unet = made("float")
    cache_time_embeddings(unet, STEPS)
    unet.eval()
    assert type(unet.time_proj) is TabulatedTimesteps
    unet.train()
    assert type(unet.time_proj) is Timesteps
    assert "trained" in caplog.text


@pytest.mark.parametrize("scheme", ["float", "w8a8-dynamic"])
def test_another_dtype_drops_the_table(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    unet = made(scheme)
    wanted = run(copy.deepcopy(unet).to(torch.bfloat16))
    cache_time_embeddings(unet, STEPS)
    unet.to(torch.bfloat16)
    assert "cache_time_embeddings again" in caplog.text
    assert not dict(unet.time_proj.named_buffers())
    assert torch.equal(run(unet), wanted)
    assert cache_time_embeddings(unet, STEPS)
    assert torch.equal(run(unet), wanted)


def test_a_move_takes_the_table_along(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made(dtype=torch.bfloat16)
    cache_time_embeddings(unet, STEPS)
    wanted, steps = run(unet, 998.6), unet.time_proj.steps.clone()
    unet.to("cpu", torch.bfloat16)
    assert unet.time_proj.steps.dtype == torch.float32
    assert torch.equal(unet.time_proj.steps[:-1], steps[:-1])
    assert layer_calls(unet, lambda: run(unet, 998.6), monkeypatch) == 0
    assert torch.equal(run(unet, 998.6), wanted)
    unet.to("meta")
    assert {tensor.device.type for tensor in unet.time_proj.buffers()} == {"meta"}


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
@pytest.mark.parametrize("scheme", ["float", "w8a8-dynamic"])
def test_a_copy_has_a_table_of_its_own(
    twin: Callable[[Any], Any], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = made(scheme)
    wanted = run(unet)
    cache_time_embeddings(unet, STEPS)
    other = twin(unet)
    assert layer_calls(other, lambda: run(other), monkeypatch) == 0
    assert torch.equal(run(other), wanted)
    other.get_submodule(RESNET).register_forward_hook(lambda *_: None)
    assert layer_calls(unet, lambda: run(unet), monkeypatch) == 0
    uncache_time_embeddings(other)
    assert torch.equal(run(unet), wanted)
    assert unet.time_proj.table.shape[0] == len(STEPS) + 1


def test_checkpoints_hold_nothing_of_the_table(tmp_path: Any) -> None:
    unet = made()
    before, wanted = set(unet.state_dict()), run(unet)
    cache_time_embeddings(unet, STEPS)
    assert set(unet.state_dict()) == before
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(loaded.time_proj) is Timesteps
    assert torch.equal(run(loaded), wanted)


@pytest.mark.parametrize("scheme", ["float", "w8a8-dynamic"])
@pytest.mark.parametrize("place", ["", "time_embedding", RESNET])
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_computed_with(scheme: str, place: str, assign: bool) -> None:
    unet, other = made(scheme), made(scheme, seed=1)
    cache_time_embeddings(unet, STEPS)
    before = run(unet)
    part = unet.get_submodule(place)
    part.load_state_dict(other.get_submodule(place).state_dict(), assign=assign)
    found = run(unet)
    assert not torch.equal(found, before)
    uncache_time_embeddings(unet)
    assert torch.equal(run(unet), found)


@pytest.mark.parametrize("name", ["time_embedding.linear_1", f"{RESNET}.time_emb_proj"])
def test_a_replaced_layer_is_computed(name: str) -> None:
    unet = made()
    cache_time_embeddings(unet, STEPS)
    before, old = run(unet), unet.get_submodule(name)
    unet.set_submodule(name, nn.Linear(old.in_features, old.out_features))
    found = run(unet)
    assert not torch.equal(found, before)
    uncache_time_embeddings(unet)
    assert torch.equal(run(unet), found)


@pytest.mark.parametrize("target", ["time_emb_proj", "linear_2", "to_q"])
def test_lora_is_computed_before_and_after_it_is_merged(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")

    def adapted(unet: Any) -> Any:
        unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=[target]), adapter_name="style")
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return unet.eval()

    unet, plain = made("float"), made("float")
    cache_time_embeddings(unet, STEPS)
    base = run(unet)
    for step in (adapted, lambda unet: unet.fuse_lora(), lambda unet: unet.unload_lora()):
        step(unet), step(plain)
        assert torch.equal(run(unet), run(plain))
        assert not torch.equal(run(unet), base)
    assert cache_time_embeddings(unet, STEPS) == 8
    assert torch.equal(run(unet), run(plain))
    assert layer_calls(unet, lambda: run(unet), monkeypatch) == 0


def test_unfused_blocks_compute_and_fused_again_read_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made("float")
    wanted = run(unet)
    cache_time_embeddings(unet, STEPS)
    assert torch.equal(run(unfuse(unet)), wanted)
    assert layer_calls(fuse(unet), lambda: run(unet), monkeypatch) == 0
    uncache_time_embeddings(unfuse(unet))
    assert not any("time_columns" in vars(module) for module in unet.modules())


def test_a_float_unet_that_is_quantized_later_computes_with_its_quantized_layers() -> None:
    unet, wanted = made("float"), run(made("w8a8-dynamic"))
    cache_time_embeddings(unet, STEPS)
    convert(unet, uniform_plan(unet, "w8a8-dynamic"))
    assert torch.equal(run(unet), wanted)


def test_caching_again_takes_the_new_time_steps() -> None:
    unet = made()
    wanted = run(unet, 500)
    assert cache_time_embeddings(unet, STEPS) == cache_time_embeddings(unet, [500, 500, 3]) == 8
    assert unet.time_proj.table.shape[0] == 3
    assert torch.equal(run(unet, 500), wanted)


def test_a_table_made_in_inference_mode_serves_outside_of_it() -> None:
    unet = made()
    with torch.inference_mode():
        cache_time_embeddings(unet, STEPS)
        wanted = run(unet)
    assert not any(tensor.is_inference() for tensor in unet.time_proj.buffers())
    assert torch.equal(run(unet), wanted)
    assert torch.equal(run(unet.to(torch.float64).to(torch.float32)), wanted)


def test_a_block_called_by_itself_takes_a_time_embedding() -> None:
    unet = made()
    block, plain = unet.get_submodule(RESNET), copy.deepcopy(unet.get_submodule(RESNET))
    cache_time_embeddings(unet, STEPS)
    x, embedding = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    with torch.no_grad():
        assert torch.equal(block(x, embedding), plain(x, embedding))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["float", "w8a8-dynamic"])
def test_a_cached_unet_is_one_graph_for_a_compiler(scheme: str) -> None:
    unet = made(scheme)
    wanted = {step: run(unet, torch.tensor(step)) for step in (321, 7)}
    cache_time_embeddings(unet, STEPS)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for step, output in wanted.items():
        inputs = {**unet_inputs(), "timestep": torch.tensor(step)}
        with torch.no_grad():
            assert torch.equal(compiled(**inputs).sample, output)
    with torch.no_grad():
        assert bool(compiled(**{**unet_inputs(), "timestep": torch.tensor(8)}).sample.isnan().all())
        unet.load_state_dict(made(scheme, seed=1).state_dict())
        inputs["timestep"] = torch.tensor(8)
        assert torch.equal(compiled(**inputs).sample, unet(**inputs).sample)


def test_a_captured_unet_replays_one_graph_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made()
    wanted = {step: run(unet, step) for step in STEPS}
    cache_time_embeddings(unet, STEPS)
    monkeypatch.setattr(graphs, "_Gpu", FakeGpu)
    monkeypatch.setattr(FakeGpu, "recorded", 0)
    unet.forward = graphs._Replayer(unet, torch.device("cpu"))
    for step, output in wanted.items():
        assert torch.equal(run(unet, float(step)), output)
    assert FakeGpu.recorded == 1
    uncache_time_embeddings(unet)  # its memory may be another's now: a recorded graph must not read it
    with pytest.raises(graphs.CaptureError, match="release it first"):
        run(unet, 321.0)
