"""SQNR is the ratio of sums that its docstring says."""

import math

import pytest
import torch

from ldmq_kernels.numerics.sqnr import from_db, relative_noise_power, sqnr_db, to_db


def test_a_tenth_of_the_amplitude_is_twenty_decibels():
    signal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(signal, signal * 1.1) == pytest.approx(20.0, abs=1e-4)


def test_no_noise_is_infinite():
    signal = torch.ones(3)
    assert sqnr_db(signal, signal) == math.inf


def test_sums_are_over_all_elements_and_not_a_mean_of_ratios():
    reference = torch.tensor([[1.0, 1.0], [10.0, 10.0]])
    test = reference + torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert relative_noise_power(reference, test) == pytest.approx(2 / 202)


def test_half_precision_inputs_do_not_overflow():
    signal = torch.full((4096,), 60000.0, dtype=torch.float16)
    assert sqnr_db(signal, signal) == math.inf


def test_decibels_convert_both_ways():
    assert to_db(from_db(37.5)) == pytest.approx(37.5)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="equal shapes"):
        sqnr_db(torch.ones(2), torch.ones(3))


def test_a_reference_of_zeros_has_no_sqnr():
    with pytest.raises(ValueError, match="all zero"):
        sqnr_db(torch.zeros(2), torch.ones(2))
