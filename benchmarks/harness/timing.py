"""Times of several calls in turns, on the device that is measured."""

from __future__ import annotations

from benchmarks.harness.machine import device
from ldmq_kernels.timing import ROUNDS, Call, Samples
from ldmq_kernels.timing import interleaved as _interleaved

Variants = dict[str, Call]


def interleaved(variants: Variants, rounds: int = ROUNDS) -> dict[str, Samples]:
    """Samples of each variant, as `ldmq_kernels.timing.interleaved` takes them."""
    return _interleaved(variants, device(), rounds=rounds)


def medians(variants: Variants, rounds: int = ROUNDS) -> dict[str, float]:
    """The median milliseconds of each variant."""
    return {name: samples.median for name, samples in interleaved(variants, rounds).items()}
