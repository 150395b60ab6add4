"""The low-rank correction is the best of its rank, for the layer's own inputs."""

import pytest
import torch
from torch import Tensor

from ldmq_kernels.numerics.low_rank import low_rank_correction
from python_tests.numerics.test_gptq import correlated, output_error

SHAPES = [(12, 40), (40, 12), (20, 20)]


def _pair(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight, torch.round(weight * 2) / 2


def _least_error(weight: Tensor, quantized: Tensor, rank: int, hessian: Tensor) -> float:
    """What no correction of this rank falls below: the squares of the singular values beyond it, in float64."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = vectors * values.clamp_min(0).sqrt()
    singular = torch.linalg.svdvals((weight - quantized).flatten(1).double() @ root)
    return float(singular[rank:].square().sum())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_correction_of_the_rank_is_better(shape, rank):
    weight, quantized = _pair(shape)
    hessian = correlated(shape[1])
    hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    down, up = low_rank_correction(weight, quantized, rank, hessian)
    assert down.shape == (rank, shape[1])
    assert up.shape == (shape[0], rank)
    assert down.dtype == up.dtype == torch.float32
    found = output_error(weight - quantized - up @ down, hessian)
    assert found <= 1.001 * _least_error(weight, quantized, rank, hessian)
    plain_down, plain_up = low_rank_correction(weight, quantized, rank)
    assert found < output_error(weight - quantized - plain_up @ plain_down, hessian)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_hessian_the_weight_itself_is_approached(shape):
    weight, quantized = _pair(shape)
    down, up = low_rank_correction(weight, quantized, 5)
    left = float((weight - quantized - up @ down).square().sum())
    assert left == pytest.approx(_least_error(weight, quantized, 5, torch.eye(shape[1])), rel=1e-4)


@pytest.mark.parametrize("with_hessian", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_and_more_is_zeros(shape, with_hessian):
    weight, quantized = _pair(shape)
    hessian = correlated(shape[1]) if with_hessian else None
    for rank in (min(shape), min(shape) + 3):
        down, up = low_rank_correction(weight, quantized, rank, hessian)
        assert torch.allclose(quantized + up @ down, weight, atol=1e-5)
        assert down.shape == (rank, shape[1])
        assert not down[min(shape) :].any()
        assert not up[:, min(shape) :].any()


def test_the_directions_are_orthonormal_and_the_strongest_comes_first():
    weight, quantized = _pair((30, 50))
    down, up = low_rank_correction(weight, quantized, 6)
    assert torch.allclose(up.t() @ up, torch.eye(6), atol=1e-5)
    assert down.norm(dim=1).diff().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_dead_inputs_and_a_weight_without_error_leave_it_finite(shape):
    weight, quantized = _pair(shape)
    hessian = correlated(shape[1])
    hessian[:4], hessian[:, :4] = 0, 0
    for other in (quantized, weight):
        down, up = low_rank_correction(weight, other, 4, hessian)
        assert torch.isfinite(down).all()
        assert torch.isfinite(up).all()


def test_a_convolution_is_taken_as_a_matrix():
    weight, quantized = _pair((8, 3, 3, 5))
    down, up = low_rank_correction(weight, quantized, 2, correlated(45))
    flat_down, flat_up = low_rank_correction(weight.flatten(1), quantized.flatten(1), 2, correlated(45))
    assert torch.equal(up @ down, flat_up @ flat_down)


def test_what_does_not_fit_is_refused():
    weight, quantized = _pair((4, 6))
    with pytest.raises(ValueError, match=r"\(4, 6\) and its quantized form \(4, 5\)"):
        low_rank_correction(weight, quantized[:, :5], 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        low_rank_correction(weight, quantized, 0)
    with pytest.raises(ValueError, match="has 6 inputs"):
        low_rank_correction(weight, quantized, 1, torch.eye(5))
    with pytest.raises(ValueError, match="NaN or infinite"):
        low_rank_correction(weight * float("nan"), quantized, 1)
