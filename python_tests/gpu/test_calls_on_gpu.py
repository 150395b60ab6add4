"""What only a device can show of the kernels: repeatability, graphs, streams, synchronization, memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import backend as cuda_backend
from ldmq_kernels.kernels.gpu import gpu_of
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.ops import specs
from python_tests.gpu.calls import CALLS, Call

pytestmark = pytest.mark.gpu
PARTIAL_SUMS = 512 * 1024  # bytes; those of a norm and of a sample's maxima, whatever its size


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, device: torch.device) -> Call:
    """One op at one shape."""
    torch.manual_seed(0)
    found = CALLS[request.param](device)
    if found.backend == "cuda" and not cuda_backend.serves(device):
        pytest.skip("the package was built without its CUDA kernels")
    if "fp8" in found.op and gpu_of(device).capability < 89:
        pytest.skip("FP8 needs compute capability 8.9")
    return found


@contextmanager
def synchronization_forbidden() -> Iterator[None]:
    """Whatever waits for the GPU inside the block raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def equal(outs: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(out, other) for out, other in zip(outs, wanted, strict=True))


def test_repeats_bit_for_bit(call: Call) -> None:
    first = call()
    assert all(equal(call(), first) for _ in range(20))


def test_a_cuda_graph_replays_it(call: Call) -> None:
    wanted = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    for out in outs:
        out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert equal(outs, wanted)


def test_runs_on_the_current_stream(call: Call) -> None:
    """A launch on another stream would not wait for the sleep, nor the event for the launch."""
    wanted = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    done = torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        outs = call()
        done.record()
    assert not done.query()
    done.synchronize()
    assert equal(outs, wanted)


def test_two_streams_at_once_do_not_disturb_each_other(call: Call) -> None:
    """Launches that shared a workspace would add up each other's splits and sums."""
    wanted = call()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    outs = []
    for _, stream in itertools.product(range(10), streams):
        with torch.cuda.stream(stream):
            outs.append(call())
    torch.cuda.synchronize()
    assert all(equal(out, wanted) for out in outs)


def test_synchronization_is_seen(device: torch.device) -> None:
    value = torch.ones(1, device=device)
    with synchronization_forbidden(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


def test_never_waits_for_the_gpu(call: Call) -> None:
    wanted = call()
    with synchronization_forbidden():
        outs = call()
    assert equal(outs, wanted)


def test_allocates_its_outputs_and_its_workspace_alone(call: Call, device: torch.device) -> None:
    """A copy of an operand, or an input in another layout, would be more."""
    workspace = PARTIAL_SUMS + call.intermediate

    def recorded(op: str, problem: tile_choice.Problem) -> tile_choice.Tile:
        nonlocal workspace
        gpu = gpu_of(device)
        plain = [tile for tile in tile_choice.candidates(op, problem, gpu) if not tile.persistent]
        tile = call.tile or min(plain, key=lambda tile: tile_choice.estimate(tile, problem, gpu))
        if tile.split_k > 1:
            workspace += tile.split_k * problem.m * problem.n * problem.groups * 4
        return tile

    call(recorded)  # the first launch of a kernel may allocate for good
    workspace = PARTIAL_SUMS + call.intermediate
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    outs = call(recorded)
    peak = torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before
    assert peak <= sum(out.nbytes for out in outs) + workspace


def test_runs_where_its_operands_are(call: Call) -> None:
    """On a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    moved = tuple(a.to(other) if isinstance(a, Tensor) else a for a in call.arguments)
    outs = replace(call, arguments=moved)()
    assert all(out.device == other for out in outs)
    assert equal(tuple(out.to(call.arguments[0].device) for out in outs), call())


@pytest.mark.parametrize("op", specs())
def test_is_one_graph_for_torch_compile(op: str, device: torch.device) -> None:
    call = CALLS[op](device)
    function, x, rest = getattr(torch.ops.ldmq, op), call.arguments[0], call.arguments[1:]
    torch._dynamo.reset()
    out = torch.compile(lambda x: function(x, *rest), fullgraph=True)(x)
    assert equal(out if isinstance(out, tuple) else (out,), call())
