"""What happens to a UNet with tabulated time embeddings: hooks, moves, copies, checkpoints, LoRA, compilers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from ldmq_kernels import graphs
from ldmq_kernels.conversion import convert
from ldmq_kernels.integrations.diffusers.fused import fuse, unfuse
from ldmq_kernels.integrations.diffusers.step_cache import (
    TabulatedTimesteps,
    cache_time_embeddings,
    uncache_time_embeddings,
)
from ldmq_kernels.nn.quantized import QuantizedLayer
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.integrations.cached_unets import RESNET, STEPS, layer_calls, made, run
from python_tests.test_graphs import FakeGpu
from python_tests.tiny import SHALLOW, unet_inputs


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


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
@pytest.mark.parametrize("scheme", ["float", "w8a8-dynamic"])
def test_a_copy_has_a_table_of_its_own(
    clone: Callable[[Any], Any], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = made(scheme)
    wanted = run(unet)
    cache_time_embeddings(unet, STEPS)
    other = clone(unet)
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
    unet = made(scheme, **SHALLOW)
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
        unet.load_state_dict(made(scheme, seed=1, **SHALLOW).state_dict())
        inputs["timestep"] = torch.tensor(8)
        assert torch.equal(compiled(**inputs).sample, unet(**inputs).sample)


def test_a_captured_unet_replays_one_graph_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = made()
    wanted = {step: run(unet, step) for step in STEPS}
    cache_time_embeddings(unet, STEPS)
    for module in unet.modules():
        if isinstance(module, QuantizedLayer):
            module.unpack()  # a graph's weights are a GPU's, which packs none
    monkeypatch.setattr(graphs, "_Gpu", FakeGpu)
    monkeypatch.setattr(FakeGpu, "recorded", 0)
    unet.forward = graphs._Replayer(unet, torch.device("cpu"))
    for step, output in wanted.items():
        assert torch.equal(run(unet, float(step)), output)
    assert FakeGpu.recorded == 1
    uncache_time_embeddings(unet)  # its memory may be another's now: a recorded graph must not read it
    with pytest.raises(graphs.CaptureError, match="release it first"):
        run(unet, 321.0)
