"""Smoothing changes nothing in exact arithmetic and much after quantization."""

import torch

from ldmq_kernels.numerics.formats.int8 import quantize_weight_int8
from ldmq_kernels.numerics.smoothing import smoothing_vector, weight_absmax
from ldmq_kernels.numerics.sqnr import sqnr_db


def _outliers() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=random)
    x[:, ::16] *= 50
    return x, torch.randn(32, 64, generator=random) * 0.1


def _quantized_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    integers, scale = quantize_weight_int8(weight)
    step = x.abs().max() / 127
    return torch.round(x / step) * step @ (integers * scale[:, None]).T


def test_the_vector_is_made_of_powers_of_two():
    x, weight = _outliers()
    vector = smoothing_vector(x.abs().amax(0), weight_absmax(weight), 0.5)
    mantissa, _ = torch.frexp(vector)
    assert (mantissa == 0.5).all()


def test_it_raises_sqnr_where_channels_have_outliers():
    x, weight = _outliers()
    vector = smoothing_vector(x.abs().amax(0), weight_absmax(weight), 0.5)
    exact = x @ weight.T
    plain = sqnr_db(exact, _quantized_product(x, weight))
    smoothed = sqnr_db(exact, _quantized_product(x / vector, weight * vector))
    assert smoothed > plain + 6


def test_dead_channels_are_left_alone():
    x, weight = _outliers()
    x[:, 5] = 0
    weight[:, 7] = 0
    vector = smoothing_vector(x.abs().amax(0), weight_absmax(weight), 0.75)
    assert vector[5] == 1
    assert vector[7] == 1
    assert torch.isfinite(vector).all()
