"""Captured UNets: bit for bit what the module itself gives, for every timestep and shape."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import ldmq_kernels as ldmq
from python_tests.gpu.unets import SCHEMES, inputs, on_device, output

pytestmark = pytest.mark.gpu
HALF = torch.float16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_replays_are_bit_for_bit_the_module_for_every_step_and_shape(scheme: str, device: torch.device) -> None:
    unet = on_device(scheme, device, HALF)
    shapes = {"batch": 2, "size": 8}, {"batch": 1, "size": 16}
    given = [inputs(device, HALF, timestep=step, **shape) for step in (981, 500, 1) for shape in shapes]
    wanted = [output(unet, arguments) for arguments in given]
    assert not torch.equal(wanted[0], wanted[2])
    ldmq.capture(unet)
    for _ in range(2):
        assert all(torch.equal(output(unet, a), w) for a, w in zip(given, wanted, strict=True))


def test_a_time_step_may_be_a_number_or_on_the_cpu(device: torch.device) -> None:
    unet = on_device("w8a8-dynamic", device, HALF)
    given = inputs(device, HALF)
    wanted = output(unet, given)
    ldmq.capture(unet)
    for timestep in (321, torch.tensor(321), given["timestep"]):
        assert torch.equal(output(unet, given | {"timestep": timestep}), wanted)


@pytest.mark.parametrize("first_in_inference_mode", [False, True])
def test_inference_mode_and_no_grad_share_graphs(first_in_inference_mode: bool, device: torch.device) -> None:
    unet, given = on_device("w8a8-dynamic", device, HALF), inputs(device, HALF)
    wanted = output(unet, given)
    ldmq.capture(unet)
    for in_inference_mode in (first_in_inference_mode, not first_in_inference_mode):
        with torch.inference_mode(in_inference_mode):
            assert torch.equal(output(unet, inputs(device, HALF)), wanted)


def test_outputs_stay_when_the_graph_is_replayed(device: torch.device) -> None:
    unet = ldmq.capture(on_device("w8a8-dynamic", device, HALF))
    first = output(unet, inputs(device, HALF, timestep=981))
    kept = first.clone()
    output(unet, inputs(device, HALF, timestep=1))
    assert torch.equal(first, kept)


def test_replays_on_two_streams_come_one_after_the_other(device: torch.device) -> None:
    unet = on_device("w8a8-dynamic", device, HALF)
    given = [inputs(device, HALF, timestep=step) for step in (981, 1)]
    wanted = [output(unet, arguments) for arguments in given]
    ldmq.capture(unet)
    output(unet, given[0])
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    outs: list[list[Tensor]] = [[], []]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        for stream, arguments, found in zip(streams, given, outs, strict=True):
            with torch.cuda.stream(stream):
                found.append(output(unet, arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for found, want in zip(outs, wanted, strict=True) for out in found)


def test_a_capture_lets_another_thread_work_on_the_gpu(device: torch.device) -> None:
    """What the other thread allocates and launches meanwhile does not spoil the recording."""
    unet, given = on_device("w8a8-dynamic", device, HALF), inputs(device, HALF)
    wanted = output(unet, given)
    ldmq.capture(unet)
    started, stop = threading.Event(), threading.Event()

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            while not stop.is_set():
                torch.ones(1000, device=device).sum().item()
                started.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert started.wait(10)
        out = output(unet, given)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(out, wanted)


def test_release_gives_the_module_and_its_memory_back(device: torch.device) -> None:
    unet, given = on_device("w8a8-dynamic", device, HALF), inputs(device, HALF)
    wanted = output(unet, given)
    ldmq.capture(unet)
    output(unet, given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    captured = torch.cuda.memory_reserved(device)
    ldmq.release(unet)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) < captured
    assert torch.equal(output(unet, given), wanted)


def test_weights_may_change_between_release_and_capture(device: torch.device) -> None:
    unet, given = on_device("w8a8-dynamic", device, HALF), inputs(device, HALF)
    ldmq.capture(unet)
    output(unet, given)
    ldmq.release(unet)
    unet.conv_out.weight_scale.mul_(2)
    wanted = output(unet, given)
    assert torch.equal(output(ldmq.capture(unet), given), wanted)


def test_each_gpu_has_its_graphs(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    unets = {where: on_device("w8a8-dynamic", where, HALF) for where in (device, other)}
    wanted = {where: output(unet, inputs(where, HALF)) for where, unet in unets.items()}
    for where, unet in unets.items():
        ldmq.capture(unet)
        for _ in range(2):
            out = output(unet, inputs(where, HALF))
            assert out.device == where
            assert torch.equal(out, wanted[where])
