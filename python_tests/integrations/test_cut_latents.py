"""A video's latent in overlapping parts over two processes, guidance over two, shards: the numbers of one process."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import ldmq_kernels as ldmq
from ldmq_kernels.conversion import convert
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.nn.cuts import depends_on_cuts
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.plan import uniform_plan
from python_tests.breadth.matrix import all_rows
from python_tests.integrations.transformers import noise, wan
from python_tests.tiny import mixed_plan

HEIGHT, PARTS = 12, (slice(0, 8), slice(4, 12))  # of a latent, which overlap by four rows
TEXT = noise(2, 7, 24, seed=1)
STEPS = (900, 600, 300)


def quantized_wan() -> nn.Module:
    """Every scheme whose scales do not depend on cuts, with timestep groups that the steps pass through."""
    model, _ = wan()
    plan = mixed_plan(model)
    if "patch_embedding" in plan.layers(model):
        plan.exceptions["patch_embedding"] = {"scheme": "w8a16", "reason": "it sees whole patches"}
        plan.smoothing.pop("patch_embedding", None)
        plan.input_scales.pop("patch_embedding", None)
    convert(model, plan)
    ldmq.check_cut_latents(model)
    return model


def blended(parts: list[Tensor]) -> Tensor:
    """(B, C, T, H, W) of overlapping parts, each fading out where the other one begins."""
    ramp = torch.linspace(0, 1, 6)[1:-1, None]
    first, second = parts
    middle = first[..., 4:, :] * (1 - ramp) + second[..., :4, :] * ramp
    return torch.cat([first[..., :4, :], middle, second[..., 4:, :]], dim=-2)


@torch.no_grad()
def sample(model: nn.Module, parts_of: Callable[[Callable[[int], Tensor]], list[Tensor]]) -> Tensor:
    """A video drawn in parts; `parts_of` computes the output of each part by its number."""
    latent = noise(1, 4, 2, HEIGHT, 4)

    with dispatch.use_backend("reference"):
        for step in STEPS:

            def output(part: int, latent: Tensor = latent, step: int = step) -> Tensor:
                cut = latent[..., PARTS[part], :]
                return model(cut, torch.tensor([step]), TEXT[:1], return_dict=False)[0]

            latent = latent - 0.3 * blended(parts_of(output))
    return latent


@torch.no_grad()
def guided(model: nn.Module, halves_of: Callable[[Callable[[int], Tensor]], list[Tensor]]) -> Tensor:
    """A video under classifier-free guidance; `halves_of` computes each half by its number."""
    latent = noise(1, 4, 2, HEIGHT, 4)
    with dispatch.use_backend("reference"):
        for step in STEPS:

            def output(half: int, latent: Tensor = latent, step: int = step) -> Tensor:
                return model(latent, torch.tensor([step]), TEXT[half : half + 1], return_dict=False)[0]

            without, conditional = halves_of(output)
            latent = latent - 0.3 * (without + 4.0 * (conditional - without))
    return latent


def one_after_the_other(output: Callable[[int], Tensor]) -> list[Tensor]:
    return [output(0), output(1)]


def each_its_own(output: Callable[[int], Tensor]) -> list[Tensor]:
    """Of two processes: each computes one, and both gather."""
    own = output(distributed.get_rank()).contiguous()
    gathered = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(gathered, own)
    return gathered


def sharded(model: nn.Module) -> Tensor:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = distributed.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sample(model, one_after_the_other)


def split_by_tensors(model: nn.Module) -> str:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = distributed.init_device_mesh("cpu", (2,))
    try:
        parallelize_module(model, mesh, {"blocks.0.attn1.to_q": ColwiseParallel()})
    except ValueError as error:
        return str(error)
    return "it was taken"


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "parts": lambda model: sample(model, each_its_own),
    "guidance": lambda model: guided(model, each_its_own),
    "tensor parallel": split_by_tensors,
    "fully sharded": sharded,
}


def in_process(rank: int, folder: Path, connection: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", timedelta(minutes=5), rank=rank, world_size=2
    )
    found = {}
    try:
        for name, way in WAYS.items():
            result = way(quantized_wan())
            found[name] = result.numpy() if isinstance(result, Tensor) else result
    except BaseException:
        found["error"] = traceback.format_exc()
        connection.send(found)
        raise
    connection.send(found)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    folder, context = tmp_path_factory.mktemp("two"), multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=in_process, args=(rank, folder, pipes[rank][1]), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert all(near.poll(240) for near, _ in pipes), "a process has stopped"
        found = [near.recv() for near, _ in pipes]
        assert not [one["error"] for one in found if "error" in one]
        return found
    finally:
        for process in processes:
            process.join(10)
            process.kill()


@pytest.mark.parametrize(("way", "alone"), [("parts", sample), ("guidance", guided), ("fully sharded", sample)])
def test_two_processes_draw_what_one_does(of_two: list[dict[str, Any]], way: str, alone: Callable[..., Tensor]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = alone(quantized_wan(), one_after_the_other)
    torch.set_num_threads(threads)
    assert all(torch.equal(torch.from_numpy(found[way]), expected) for found in of_two)


def test_tensor_parallelism_is_refused_by_name(of_two: list[dict[str, Any]]) -> None:
    for found in of_two:
        assert "patch_embedding is quantized (w8a16), and tensor parallelism splits float" in found["tensor parallel"]
        assert "use fully_shard" in found["tensor parallel"]


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic", "w8a8x2", "w4a8-dynamic", "w8a16"])
def test_layers_of_tokens_round_a_part_as_the_whole(scheme: str) -> None:
    layer = nn.ModuleDict({"layer": nn.Linear(32, 16)})
    plan = uniform_plan(layer, "w8a8-dynamic")
    plan.rules[0]["scheme"] = scheme
    plan.input_scales.update({"layer": 0.03} if "static" in scheme or "x2" in scheme else {})
    convert(layer, plan)
    tokens = noise(2, 10, 32)
    with dispatch.use_backend("reference"), torch.no_grad():
        whole = layer["layer"](tokens)
        assert torch.equal(layer["layer"](tokens[:, 3:7]), whole[:, 3:7])
    ldmq.check_cut_latents(layer)


@pytest.mark.parametrize(("scheme", "kernel", "is_dependent"), [
    ("w8a8-dynamic", 3, True), ("w8a8-dynamic", 1, False), ("w8a8-static", 3, False), ("w8a16", 3, False),
])  # fmt: skip
def test_a_convolution_that_measures_its_scale_depends_on_cuts_and_is_refused(
    scheme: str, kernel: int, is_dependent: bool
) -> None:
    layer = nn.ModuleDict({"layer": nn.Conv2d(16, 8, kernel)})
    plan = uniform_plan(layer, "w8a8-dynamic")
    plan.rules[0]["scheme"] = scheme
    plan.input_scales.update({"layer": 0.03} if "static" in scheme else {})
    convert(layer, plan)
    assert depends_on_cuts(layer["layer"]) == is_dependent
    picture = noise(1, 16, 12, 8)
    picture[..., 10:, :] *= 5  # which the part does not see
    with dispatch.use_backend("reference"), torch.no_grad():
        whole, part = layer["layer"](picture), layer["layer"](picture[..., :8, :])
    assert torch.equal(part, whole[..., : part.shape[-2], :]) != is_dependent
    if is_dependent:
        with pytest.raises(ValueError, match="layer measure their scale over all"):
            ldmq.check_cut_latents(layer)
    else:
        ldmq.check_cut_latents(layer)


def test_a_plan_for_cut_latents_has_no_scale_that_depends_on_them() -> None:
    pipe, calls = all_rows()["sd turbo, 1 step"].build()
    pipe.set_progress_bar_config(disable=True)
    formats = ["w8a8-dynamic", "fp16"]
    plan = ldmq.plan(pipe, calls=calls[:2], formats=formats, target_sqnr_db=10, cut_latents=True, show_progress=False)
    assert {str(layer_plan.scheme) for layer_plan in plan.layers(pipe.unet).values()} == set(formats)
    ldmq.quantize(pipe, plan)
    ldmq.check_cut_latents(pipe.unet)


def test_token_counts_may_change_from_call_to_call() -> None:
    model = quantized_wan()
    exact, _ = wan()
    with torch.no_grad():
        for frames, height in ((1, 4), (3, 8), (2, 6), (1, 4)):
            call = noise(1, 4, frames, height, 4), torch.tensor([600]), TEXT[:1]
            assert float(sqnr_db(exact(*call).sample, model(*call).sample)) > 15
