"""Float work on a CPU that sees all pictures of a batch at once gives each the bits of its own call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels import ops
from ldmq_kernels.kernels import dispatch

PICTURES = 4


def silu(x: Tensor) -> tuple[Tensor, ...]:
    return torch.nn.functional.silu(x), *ops.silu_quantize(x, None, None)


def gelu(x: Tensor) -> tuple[Tensor, ...]:
    return torch.nn.functional.gelu(x), *ops.gelu_quantize(x, False, None, None)


def geglu(x: Tensor) -> tuple[Tensor, ...]:
    return ops.geglu_quantize(x, None, None)


def group_norm(x: Tensor) -> tuple[Tensor, ...]:
    x = x.contiguous(memory_format=torch.channels_last)
    normed = torch.nn.functional.group_norm(x, 4)
    return normed, *ops.group_norm_silu_quantize(x, None, None, 4, 1e-5, True, None, None, False)


def layer_norm(x: Tensor) -> tuple[Tensor, ...]:
    return torch.nn.functional.layer_norm(x, x.shape[-1:]), *ops.layer_norm_quantize(x, None, None, 1e-5, None, None)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("work", "shape", "at_once"),
    [
        (silu, (8, 6, 32), {1, 3}),
        (silu, (24, 33), set()),
        (silu, (8, 64, 64, 16), {1}),  # three threads' runs end within a vector
        (gelu, (8, 6, 32), {1, 3}),
        (gelu, (8, 5, 9), set()),
        (geglu, (8, 6, 128), {1, 3}),
        (geglu, (8, 6, 96), set()),
        (group_norm, (8, 32, 16, 16), {1, 3}),
        (group_norm, (8, 32, 32, 32), {1}),  # three threads share the pixels of all samples
        (group_norm, (8, 20, 33, 33), set()),
        (layer_norm, (8, 77, 33), {1, 3}),
    ],
)
def test_a_picture_has_the_bits_of_its_own_call(
    shared_pipe: object,
    threads: int,
    work: Callable[[Tensor], tuple[Tensor, ...]],
    shape: tuple[int, ...],
    at_once: set[int],
) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    alone = [torch.cat(parts) for parts in zip(*map(work, x.chunk(PICTURES)), strict=True)]
    dispatch.reset_dispatch_report()
    with ldmq.batch_invariant(shared_pipe, PICTURES):
        together = work(x)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert sum(dispatch.calls_by_backend().values()) == (1 if threads in at_once else PICTURES)
