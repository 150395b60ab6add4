"""Signal-to-quantization-noise ratio, the measure behind every choice in this package."""

from __future__ import annotations

import math

from torch import Tensor


def relative_noise_power(reference: Tensor, test: Tensor) -> float:
    """sum (test - reference)^2 / sum reference^2 over all elements, in float64.

    Raises:
        ValueError: the shapes differ, or the reference is all zero and the test is not.
    """
    if reference.shape != test.shape:
        raise ValueError(f"SQNR needs equal shapes, got {tuple(reference.shape)} and {tuple(test.shape)}")
    exact = reference.double()
    noise = float((test.double() - exact).square().sum())
    signal = float(exact.square().sum())
    if signal == 0.0:
        if noise == 0.0:
            return 0.0
        raise ValueError("SQNR is not defined: the reference is all zero and the test is not")
    return noise / signal


def to_db(noise_power: float) -> float:
    """Relative noise power to SQNR in dB; no noise is infinite dB."""
    return math.inf if noise_power == 0.0 else -10.0 * math.log10(noise_power)


def from_db(decibels: float) -> float:
    """SQNR in dB to relative noise power."""
    return 10.0 ** (-decibels / 10.0)


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """SQNR in dB: 10 log10( sum reference^2 / sum (test - reference)^2 ), over all elements.

    The definition is this package's own; the paper (arXiv 2312.05431) gives the idea, not the sum.

    Raises:
        ValueError: the shapes differ, or the reference is all zero and the test is not.
    """
    return to_db(relative_noise_power(reference, test))
