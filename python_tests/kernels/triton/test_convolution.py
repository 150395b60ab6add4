"""What the convolutions' loops count with."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from ldmq_kernels.kernels.dispatch import Unsupported  # noqa: E402
from ldmq_kernels.kernels.triton.convolution import MOST_PRODUCTS, ConvShape, reciprocal, tap_of_step  # noqa: E402

STEPS = 512  # of a program


@triton.jit
def taps_of_steps(tap_ptr: tl.tensor, block_ptr: tl.tensor, blocks: tl.tensor, STEPS: tl.constexpr) -> None:
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    tap, block = tap_of_step(step, blocks, reciprocal(blocks))
    tl.store(tap_ptr + step, tap)
    tl.store(block_ptr + step, block)


@pytest.mark.parametrize(("taps", "blocks"), [(9, 1), (9, 3), (9, 20), (49, 7), (1, 32768), (9, 10922), (49, 4681)])
def test_the_tap_of_a_step_is_the_quotient(taps: int, blocks: int) -> None:
    """Where the largest sums are, all taps begin and end right."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    programs = -(-taps * blocks // STEPS)
    tap, block = torch.empty(2, programs * STEPS, dtype=torch.int32, device=device)
    taps_of_steps[programs,](tap, block, blocks, STEPS=STEPS)
    steps = torch.arange(taps * blocks)
    assert torch.equal(tap[: len(steps)].cpu(), (steps // blocks).int())
    assert torch.equal(block[: len(steps)].cpu(), (steps % blocks).int())


def test_a_sum_that_is_too_long_to_count_is_refused() -> None:
    geometry = (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1
    longest = MOST_PRODUCTS // 9
    ConvShape.of(torch.empty(1, longest, 8, 8, device="meta"), 8, *geometry)
    with pytest.raises(Unsupported, match=f"sums of {9 * (longest + 1)} products"):
        ConvShape.of(torch.empty(1, longest + 1, 8, 8, device="meta"), 8, *geometry)
