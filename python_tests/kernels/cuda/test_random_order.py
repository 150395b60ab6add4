"""Kernels whose blocks, warps and copies meet give the same in any order of these, by seed, in the emulator.

A seed also decides which copies and products are done long before they must be. A kernel whose wait or barrier is left
out gives something else under some seed. LDMQ_SEEDS=1000 looks at a thousand seeds where a test looks at a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import tiles
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.numerics.formats.int4 import pack_int4
from python_tests.kernels.cuda.emulation import emulate
from python_tests.kernels.operands import (
    exact_conv2d,
    exact_linear,
    folded,
    random_int4,
    random_int8,
    random_multiplier,
)

SEEDS = range(1, 1 + int(os.environ.get("LDMQ_SEEDS", "2")))
ONE = torch.ones(1)
SAME = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The emulated backend, in its usual order again at the end."""
    binding = emulate(monkeypatch)
    yield binding
    binding.set_seed(0)
    binding.set_fault(0)


def tile_of(op: str, name: str) -> tiles.Tile:
    (found,) = [tile for tile in tiles.candidates(op, 64, 64, 64, torch.device("cpu")) if tile.name == name]
    return found


def linear(name: str, k: int = 144) -> tuple[Callable[[], Tensor], Tensor]:
    """A product of several tiles, and more steps for a block than its ring has stages."""
    tile = tile_of("linear_w8a8", name)
    x, weight = random_int8(2 * tile.m + 5, k), random_int8(tile.n + 8, k)

    def call() -> Tensor:
        with tiles.forced(tile):
            return cuda.linear_w8a8(x, ONE, weight, torch.ones(len(weight)), None, None, torch.float32)

    return call, exact_linear(x, weight)


def geglu(name: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Values of several tiles, beside gates of 10 that GELU hands on: half of each step's weight is n rows away."""
    tile = tile_of("linear_geglu_w8a8", name)
    x, weight = random_int8(2 * tile.m + 5, 528), random_int8(tile.n + 16, 528).sign()
    n = len(weight) // 2
    x[:, 0], weight[n:], weight[n:, 0] = 10, 0, 1

    def call() -> Tensor:
        with tiles.forced(tile):
            scale = torch.ones(2 * n)
            return cuda.linear_geglu_w8a8(x, ONE, weight, scale, None, None, torch.float32)

    return call, exact_linear(x, weight[:n]) * 10


def small_integers(*shape: int) -> Tensor:
    """Of which 128 products are summed exactly with 14 bits."""
    return torch.randint(-4, 5, shape).to(torch.float8_e4m3fn)


def linear_fp8(name: str, m: int, n: int, k: int) -> tuple[Callable[[], Tensor], Tensor]:
    tile = tile_of("linear_fp8", name)
    x, weight = small_integers(m, k), small_integers(n, k)

    def call() -> Tensor:
        with tiles.forced(tile):
            return cuda.linear_fp8(x, ONE, weight, torch.ones(n), None, None, torch.float32)

    return call, exact_linear(x, weight).long()


def linear_int4(name: str, m: int, n: int, k: int) -> tuple[Callable[[], Tensor], Tensor]:
    tile = tile_of("linear_w4a8", name)
    x, integers, multiplier = random_int8(m, k), random_int4(n, k), random_multiplier(n, k)

    def call() -> Tensor:
        with tiles.forced(tile):
            return cuda.linear_w4a8(x, ONE, pack_int4(integers), multiplier, torch.ones(n), None, None, torch.float32)

    return call, exact_linear(x, folded(integers, multiplier))


def conv2d(name: str) -> tuple[Callable[[], Tensor], Tensor]:
    tile = tile_of("conv2d_w8a8", name)
    x, weight = random_int8(2, 32, 6, 5).contiguous(memory_format=torch.channels_last), random_int8(24, 3, 3, 32)

    def call() -> Tensor:
        with tiles.forced(tile):
            return cuda.conv2d_w8a8(x, ONE, weight, torch.ones(24), None, None, None, *SAME, torch.float32)

    return call, exact_conv2d(x, weight, SAME)


PRODUCTS = {
    "in turns": lambda: linear("sm90 128x128x128x7", 528),
    "in turns, cluster": lambda: linear("sm90 128x160x64x10 cluster 2"),
    "cooperative, cluster": lambda: linear("sm90 128x256x128x4 cooperative cluster 2"),
    "mma.sync": lambda: linear("sm80 64x64x64x6", 528),
    "gates, cluster": lambda: geglu("sm90 128x128x128x7 cluster 2"),
    "gates": lambda: geglu("sm90 128x128x128x7"),
    "im2col": lambda: conv2d("sm90 128x160x128x6 cluster 2"),
    "fp8, two steps in flight": lambda: linear_fp8("sm90 128x64x128x8 cooperative", 133, 72, 1168),
    "fp8, one step in flight, cluster": lambda: linear_fp8("sm90 128x160x64x10 cooperative cluster 2", 261, 168, 80),
    "fp8, mma.sync": lambda: linear_fp8("sm89 64x64x64x6", 133, 72, 528),
    "int4": lambda: linear_int4("sm90 64x128x128x8 cooperative", 67, 136, 288),
    "int4, mma.sync": lambda: linear_int4("sm80 64x64x64x6", 67, 72, 544),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PRODUCTS)
def test_sums_are_exact_in_any_order(kind: str, ordered: ModuleType) -> None:
    call, exact = PRODUCTS[kind]()
    for seed in SEEDS:
        ordered.set_seed(seed)
        assert torch.equal(call().long(), exact), f"seed {seed}"


# bits of emulator::Fault, and the kernel that misses what is left out
LEFT_OUT = {
    "the loop's wait for products": (1, "fp8, two steps in flight"),
    "the wait for a full stage": (2, "fp8, two steps in flight"),
    "the wait for an empty stage": (4, "fp8, two steps in flight"),
    "the wait for copies": (8, "mma.sync"),
    "the barrier of a block": (16, "mma.sync"),
}


@pytest.mark.slow
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_what_a_kernel_leaves_out_is_missed_under_some_seed(left_out: str, ordered: ModuleType) -> None:
    fault, kind = LEFT_OUT[left_out]
    call, exact = PRODUCTS[kind]()
    ordered.set_fault(fault)
    assert any(is_wrong(call, exact, seed, ordered) for seed in range(1, 9))


def is_wrong(call: Callable[[], Tensor], exact: Tensor, seed: int, binding: ModuleType) -> bool:
    """Whether a launch ends with other sums, or not at all."""
    binding.set_seed(seed)
    try:
        return not torch.equal(call().nan_to_num(nan=0.5).double(), exact.double())
    except RuntimeError:
        return True


def norm() -> Callable[[], bool]:
    """Whether a norm is right whose pixels are so many that the statistics of a sample come from several blocks."""
    x = torch.randn(2, 32, 40, 30).contiguous(memory_format=torch.channels_last)
    arguments = (x, torch.randn(32), torch.randn(32), 4, 1e-5, True, None, torch.rand(32) + 0.5, False)
    wanted, scale = reference.group_norm_silu_quantize(*arguments)

    def is_right() -> bool:
        out, measured = cuda.group_norm_silu_quantize(*arguments)
        return bool((out.int() - wanted.int()).abs().max() <= 1) and torch.allclose(measured, scale, rtol=1e-4, atol=0)

    return is_right


@pytest.mark.slow
def test_a_cooperative_norm_is_right_in_any_order_and_wrong_without_its_barrier(ordered: ModuleType) -> None:
    is_right = norm()
    for seed in SEEDS:
        ordered.set_seed(seed)
        assert is_right(), f"seed {seed}"
    ordered.set_fault(32)
    ordered.set_seed(1)
    assert not is_right()


def test_a_seed_decides_the_order_and_0_is_the_usual_one(ordered: ModuleType) -> None:
    found = {}
    for name, seed in (("usual", 0), ("first", 7), ("again", 7), ("other", 8)):
        ordered.set_seed(seed)
        found[name] = [ordered.turn(place) for place in range(16)]
    assert found["usual"] == list(range(16))
    assert found["first"] == found["again"]
    assert len({tuple(turns) for turns in found.values()}) == 3
