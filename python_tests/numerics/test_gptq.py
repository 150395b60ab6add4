"""GPTQ makes the error of a layer's output small, not that of its weight."""

import itertools

import pytest
import torch
from torch import Tensor

from ldmq_kernels.numerics.gptq import damped_cholesky, gptq_round, integers_up_to, rounding_order

WIDTHS = [1, 20, 63, 64, 65, 129, 320]


def correlated(width: int, rows: int = 4096, seed: int = 0) -> Tensor:
    """(width, width), the sum of x x^T of inputs that share a few directions, of uneven power."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, max(1, width // 8), generator=random)
    mix = torch.randn(shared.shape[1], width, generator=random)
    x = shared @ mix + 0.3 * torch.randn(rows, width, generator=random)
    x *= torch.exp(torch.randn(width, generator=random))
    return x.t() @ x


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) in float64."""
    flat = difference.flatten(1).double()
    return float(((flat @ hessian.double()) * flat).sum())


def _weight(out: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def _nearest(weight: Tensor, steps: Tensor, largest: int) -> Tensor:
    return torch.round(weight / steps).clamp(-largest, largest)


def _column_by_column(weight: Tensor, steps: Tensor, largest: int, hessian: Tensor) -> Tensor:
    """The published algorithm: round a column, spread its error by the inverse of what is left, in float64."""
    weight, integers = weight.double(), torch.zeros_like(weight)
    left = torch.argsort(hessian.diagonal(), stable=True).flip(0).tolist()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        first = left[0]
        integers[:, first] = _nearest(weight[:, first], steps[:, first], largest).float()
        error = (weight[:, first] - integers[:, first] * steps[:, first]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return integers.to(torch.int8)


@pytest.mark.parametrize("width", [5, 64, 150])
def test_it_is_the_published_algorithm(width):
    weight, hessian = _weight(6, width), correlated(width)
    steps = 0.2 + 0.2 * torch.rand(6, width, generator=torch.Generator().manual_seed(2))
    found = gptq_round(weight, steps, integers_up_to(7), rounding_order(hessian, width))
    expected = _column_by_column(weight, steps, 7, hessian)
    assert (found != expected).float().mean() < 0.005  # a tie may fall otherwise in float32
    assert (found != _nearest(weight, steps, 7)).any()


@pytest.mark.parametrize("largest", [7, 127])
@pytest.mark.parametrize("width", [w for w in WIDTHS if w > 1])
def test_the_output_error_is_less_than_that_of_the_nearest(width, largest):
    weight, hessian = _weight(16, width), correlated(width)
    steps = (weight.abs().amax(1, keepdim=True) / largest).expand_as(weight)
    found = gptq_round(weight, steps, integers_up_to(largest), rounding_order(hessian, width))
    assert torch.equal(found, found.round())
    assert found.abs().max() <= largest
    better = output_error(weight - found * steps, hessian)
    assert better < 0.8 * output_error(weight - _nearest(weight, steps, largest) * steps, hessian)


@pytest.mark.parametrize("width", WIDTHS)
def test_inputs_that_share_nothing_are_rounded_to_nearest(width):
    weight = _weight(9, width)
    powers = torch.rand(width, generator=torch.Generator().manual_seed(3)) * 100
    powers[::3] = 0  # dead
    steps = torch.full_like(weight, 0.31)
    found = gptq_round(weight, steps, integers_up_to(7), rounding_order(torch.diag(powers), width))
    assert torch.equal(found, _nearest(weight, steps, 7).to(torch.int8))


def test_dead_inputs_are_rounded_to_nearest_and_the_others_as_ever():
    weight, hessian = _weight(8, 40), correlated(40)
    dead = torch.arange(0, 40, 5)
    hessian[dead], hessian[:, dead] = 0, 0
    steps = torch.full_like(weight, 0.4)
    found = gptq_round(weight, steps, integers_up_to(7), rounding_order(hessian, 40))
    assert torch.equal(found[:, dead], _nearest(weight, steps, 7)[:, dead].to(torch.int8))
    assert (found != _column_by_column(weight, steps, 7, hessian)).float().mean() < 0.005


def test_two_equal_inputs_take_the_best_pair_of_integers():
    hessian = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) * 50
    weight = torch.tensor([[0.4, 0.4], [1.3, -0.4], [0.7, 0.7]])
    steps = torch.ones_like(weight)
    found = gptq_round(weight, steps, integers_up_to(7), rounding_order(hessian, 2))
    assert found.sum(1).tolist() == [1, 1, 1]  # nearest gives 0, 1 and 2 for sums of 0.8, 0.9 and 1.4


def test_against_all_roundings_of_tiny_weights():
    random = torch.Generator().manual_seed(7)
    found, nearest, best = 0.0, 0.0, 0.0
    for seed in range(20):
        hessian = correlated(4, seed=seed)
        hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
        weight, steps = torch.rand(1, 4, generator=random) * 4 - 2, torch.ones(1, 4)
        every = torch.tensor([*itertools.product(range(-3, 4), repeat=4)], dtype=torch.float32)
        errors = [output_error(weight - integers, hessian) for integers in every]
        mine = output_error(weight - gptq_round(weight, steps, integers_up_to(3), rounding_order(hessian, 4)), hessian)
        assert mine >= min(errors) * 0.9999
        found, best = found + mine, best + min(errors)
        nearest += output_error(weight - _nearest(weight, steps, 3), hessian)
    assert found < 1.5 * best
    assert nearest > 2 * best


def test_fewer_rows_than_inputs_are_enough():
    x = torch.randn(30, 200, generator=torch.Generator().manual_seed(4))
    weight, hessian = _weight(8, 200), x.t() @ x
    steps = torch.full_like(weight, 0.4)
    found = gptq_round(weight, steps, integers_up_to(7), rounding_order(hessian, 200))
    error = output_error(weight - found * steps, hessian)
    assert error < 0.3 * output_error(weight - _nearest(weight, steps, 7) * steps, hessian)


def test_the_power_of_the_inputs_does_not_matter():
    weight, hessian = _weight(8, 65), correlated(65)
    steps = torch.full_like(weight, 0.4)
    rounded = [
        gptq_round(weight, steps, integers_up_to(7), rounding_order(hessian * p, 65)) for p in (2.0**-60, 1.0, 2.0**60)
    ]
    assert torch.equal(rounded[0], rounded[1])
    assert torch.equal(rounded[2], rounded[1])


def test_a_hessian_of_zeros_rounds_to_nearest():
    weight = _weight(3, 10)
    found = gptq_round(weight, torch.full_like(weight, 0.5), integers_up_to(7), rounding_order(torch.zeros(10, 10), 10))
    assert torch.equal(found, _nearest(weight, torch.tensor(0.5), 7).to(torch.int8))


def test_damping_grows_until_the_factor_exists():
    hessian = correlated(30)
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(30)  # as rounding in float16 leaves it
    factor = damped_cholesky(hessian)
    scaled = hessian / hessian.diagonal().mean()
    added = (factor @ factor.t() - scaled).diagonal()
    assert torch.allclose(added, torch.full((30,), 0.1), atol=1e-4)


def test_importance_is_the_power_that_lesser_inputs_do_not_share():
    hessian = torch.tensor([[4.0, 2.0, 0.0], [2.0, 1.01, 0.0], [0.0, 0.0, 2.0]])
    importance = rounding_order(hessian, 3).importance
    mean = 7.01 / 3
    damped = hessian.double() / mean + 0.01 * torch.eye(3)
    expected = torch.tensor([damped[0, 0] - damped[0, 1] ** 2 / damped[1, 1], damped[1, 1], damped[2, 2]])
    assert torch.allclose(importance, (expected / expected.mean()).float(), rtol=1e-4)


@pytest.mark.parametrize(
    ("hessian", "told"),
    [
        (torch.eye(4), r"has 5 inputs: \(5, 5\)"),
        (torch.eye(5) * float("nan"), "NaN or infinite"),
        (torch.eye(5).index_fill(0, torch.tensor(2), float("inf")), "NaN or infinite"),
        (torch.diag(torch.tensor([1.0, 1, -1, 1, 1])), "negative diagonal"),
        (torch.eye(5) + 3 * (1 - torch.eye(5)), "not positive semidefinite"),
    ],
)
def test_a_hessian_that_cannot_be_one_is_refused(hessian, told):
    with pytest.raises(ValueError, match=told):
        rounding_order(hessian, 5)
