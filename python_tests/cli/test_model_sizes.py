"""ldmq doctor compares the tiles that models spend their time in."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldmq_kernels.cli import model_sizes
from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.backend import Backend, backends
from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.cuda import tiles as cuda_tiles
from ldmq_kernels.kernels.cuda.compiled_tiles import compiled_tiles
from ldmq_kernels.kernels.gpu import FLOAT8_FROM, Gpu
from ldmq_kernels.tuning.calls import Call
from ldmq_kernels.tuning.shapes import Input, Linear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
CUDA_OPS = ("linear_w8a8", "conv2d_w8a8", "linear_fp8", "conv2d_fp8")
GPUS = {
    80: Gpu("A100", 80, 108),
    86: Gpu("RTX 3090", 86, 82),
    89: Gpu("RTX 4090", 89, 128),
    90: Gpu("H200", 90, 132),
    100: Gpu("B200", 100, 148),
    120: Gpu("RTX 5090", 120, 170),
}


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The CPU passes for a GPU that nothing was measured on."""
    for place in ("kernels.triton.tile_choice", "kernels.cuda.tiles"):
        monkeypatch.setattr(f"ldmq_kernels.{place}.gpu_of", lambda _: GPUS[request.param])
    measurements.forget()
    yield GPUS[request.param]
    measurements.forget()


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A backend, with the list of CUDA's tiles in place of an extension that is built."""
    listed = [tuple(tile)[1:] for op in CUDA_OPS for tile in compiled_tiles(op)]
    built = SimpleNamespace(tiles=lambda: listed, architectures=lambda: "80;86;89;90a")
    monkeypatch.setattr(extension, "binding", lambda: built)
    cuda_tiles.forget()
    yield backends()[request.param]
    cuda_tiles.forget()


@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_tiles_that_are_compared_carry_most_of_the_work_of_sd15_and_sdxl(
    op: str, gpu: Gpu, backend: Backend
) -> None:
    tiles = backend.tiles
    assert tiles is not None
    found = model_sizes.compared(op, backend, CPU)
    if op.endswith("fp8") and gpu.capability < FLOAT8_FROM and backend.name == "cuda":
        assert not found  # and the kernels refuse the call
        return
    # counted anew, from the shapes: what a call of this size would take is what the model's calls take
    proved = {tiles.chosen(key(call), CPU) for call in found}
    every = [call for call in model_sizes.calls((op,), model_sizes.MODELS, CPU) if _channels(call) % 16 == 0]
    carried = sum(call.work for call in every if tiles.chosen(key(call), CPU) in proved)
    assert carried >= 0.9 * sum(call.work for call in every)
    assert len(found) == len(proved) > 0


def key(call: Call) -> str:
    assert not isinstance(call.shape, Input)
    return f"{call.op} {'x'.join(map(str, call.shape.product))}"


def _channels(call: Call) -> int:
    assert not isinstance(call.shape, Input)
    return call.shape.k if isinstance(call.shape, Linear) else call.shape.c


def test_a_tile_that_was_measured_to_be_the_fastest_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path))
    measurements.forget()
    triton = backends()["triton"]
    tiles = triton.tiles
    assert tiles is not None
    usual = model_sizes.compared("linear_w8a8", triton, CPU)[0]
    other = next(t for t in tiles.candidates(key(usual), CPU) if t != tiles.chosen(key(usual), CPU) and t.persistent)
    every = {key(call): tiles.written(other) for call in model_sizes.calls(("linear_w8a8",), model_sizes.MODELS, CPU)}
    content = {"gpu": "no GPU", "tiles": every}
    measurements.user_file(CPU).write_text(json.dumps(content))
    measurements.forget()
    (found,) = model_sizes.compared("linear_w8a8", triton, CPU)
    assert tiles.chosen(key(found), CPU) == other
    measurements.forget()


def test_a_producer_is_compared_at_the_largest_input_of_each_way_to_scale_it() -> None:
    found = model_sizes.compared("group_norm_silu_quantize", backends()["triton"], CPU)
    assert {call.shape.scale for call in found if isinstance(call.shape, Input)} == {
        "static",
        "per sample",
        "per token",
    }
    assert all(torch.Size(call.shape.sizes).numel() > 10**7 for call in found if isinstance(call.shape, Input))
