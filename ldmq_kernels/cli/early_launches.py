"""Whether kernels may be launched before the one in front of them has ended on this GPU: equal results, and no slower.

A chain of the ops of a transformer block and of a residual block is run without and with dependent launches, eagerly
and in a CUDA graph. Its tensors take each other's places in memory, so a kernel that did not wait would be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels import ops
from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.dependent_launch import FROM, dependent_launches
from ldmq_kernels.kernels.gpu import gpu_of
from ldmq_kernels.timing import interleaved

Chain = Callable[[], tuple[Tensor, ...]]
ROWS, CHANNELS, HIDDEN, SIZE = 1024, 640, 2560, 32  # small kernels, whose starts are a large share of their time
LAYERS, REPEATS = 8, 8


def chain(device: torch.device) -> Chain:
    """A call of many ops, each of which needs what the one before wrote; its tensors are half precision."""
    generator = torch.Generator(device).manual_seed(0)
    half: dict[str, Any] = {"dtype": torch.float16, "device": device}

    def weight(*shape: int) -> tuple[Tensor, Tensor]:
        integers = torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
        return integers, torch.full((shape[0],), 1e-3, device=device)

    wide, narrow, kernel = weight(HIDDEN, CHANNELS), weight(CHANNELS, HIDDEN), weight(CHANNELS, 3, 3, CHANNELS)
    tokens = torch.randn(ROWS, CHANNELS, generator=generator, **half)
    one = torch.ones(CHANNELS, **half)

    def convolved(q: Tensor, scale: Tensor, residual: Tensor | None) -> Tensor:
        ones = 1, 1
        padding = 1, 1, 1, 1
        return ops.conv2d_w8a8(
            q, scale, *kernel, None, None, residual, (3, 3), ones, padding, ones, 1, 1, torch.float16
        )

    def run() -> tuple[Tensor, ...]:
        x = tokens
        for _ in range(LAYERS):
            q, scale = ops.layer_norm_quantize(x, one, None, 1e-5, None, None)
            hidden = ops.linear_w8a8(q, scale, *wide, None, None, torch.float16)
            q, scale = ops.gelu_quantize(hidden, True, None, None)
            x = ops.linear_w8a8(q, scale, *narrow, None, x, torch.float16)
            picture = x.view(1, SIZE, SIZE, CHANNELS).permute(0, 3, 1, 2)
            q, scale = ops.group_norm_silu_quantize(picture, one, None, 32, 1e-5, True, None, None, False)
            picture = convolved(q, scale, picture)
            q, scale = ops.quantize_per_sample(picture, None)
            picture = convolved(q, scale, None)
            x = picture.permute(0, 2, 3, 1).reshape(ROWS, CHANNELS).clone()  # a copy, no kernel, before the next one
        return x, scale

    return run


def recorded(call: Chain) -> Chain:
    """A call that replays a CUDA graph of another one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def _outputs(call: Chain) -> Iterator[tuple[Tensor, ...]]:
    for _ in range(REPEATS):
        yield tuple(out.clone() for out in call())


def compared(call: Chain, device: torch.device) -> tuple[str, float]:
    """Run a call without and with dependent launches.

    Returns:
        What differs, empty where all results are equal to the bit, and how many times as fast the graph is with them.
    """
    replays: dict[bool, Chain] = {}
    expected: tuple[Tensor, ...] = ()
    for early in (False, True):
        with dependent_launches(early):
            found = list(_outputs(call))
            replays[early] = recorded(call)
        expected = expected or found[0]
        for way, results in (("eagerly", found), ("in a CUDA graph", list(_outputs(replays[early])))):
            if not all(
                torch.equal(one, other) for result in results for one, other in zip(result, expected, strict=True)
            ):
                return f"results {'with' if early else 'without'} dependent launches differ {way}", 0.0
    taken = interleaved(replays, device)
    return "", taken[False].median / taken[True].median


@torch.inference_mode()
def check_early_launches(device: torch.device) -> str:
    """Find out whether kernels may be launched early, and let them, or not, on devices of this kind.

    Returns:
        A line that says so; empty where the device has no such launches.
    """
    if device.type != "cuda" or gpu_of(device).capability < FROM:
        return ""
    try:
        problem, gain = compared(chain(device), device)
    except Exception as error:
        problem, gain = f"{type(error).__name__}: {error}", 0.0
    return note(device, problem, gain)


def note(device: torch.device, problem: str, gain: float) -> str:
    """Let kernels be launched early on devices of this kind where that is right and no slower, or not.

    Args:
        device: one of the kind.
        problem: what is wrong; empty where results are equal.
        gain: how many times as fast a CUDA graph of small kernels is.

    Returns:
        A line that says so.
    """
    is_on = not problem and gain >= 1.0
    reason = problem or f"results are equal, and a CUDA graph of small kernels is {gain:.2f}x as fast"
    line = f"kernels are {'' if is_on else 'not '}launched before the one in front of them has ended: {reason}"
    try:
        measurements.launch_early(device, is_on, reason)
    except (OSError, ValueError) as error:
        return f"{line}; this could not be written down: {error}"
    return line
