"""Rotation by Hadamard matrices: what it computes, how it is undone, and that products keep their value."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from ldmq_kernels.numerics.hadamard import block_size, rotate, rotated_hessian, rotated_weight, unrotate


@pytest.mark.parametrize(
    ("channels", "size"), [(0, 1), (1, 1), (3, 1), (4, 4), (20, 4), (48, 16), (96, 32), (320, 32), (1280, 32)]
)
def test_blocks_divide_the_channels(channels: int, size: int) -> None:
    assert block_size(channels) == size


@pytest.mark.parametrize("channels", [1, 3, 4, 20, 96])
def test_each_block_is_multiplied_by_a_hadamard_matrix_with_signs(channels: int) -> None:
    size = block_size(channels)
    matrix = rotate(torch.eye(size, dtype=torch.float64)).t()
    assert torch.equal(matrix.abs(), torch.ones(size, size, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))
    signs = matrix[0]
    assert torch.equal(matrix, torch.from_numpy(hadamard(size)).double() * signs)
    x = torch.randn(2, 5, channels, dtype=torch.float64)
    wanted = (x.unflatten(-1, (-1, size)) @ matrix.t()).flatten(-2)
    torch.testing.assert_close(rotate(x), wanted)


@pytest.mark.parametrize(("channels", "gain"), [(4, 2), (16, 4), (32, 8)])
def test_a_constant_is_spread_over_a_block(channels: int, gain: int) -> None:
    assert rotate(torch.ones(channels)).abs().amax() == gain


@pytest.mark.parametrize("channels", [1, 20, 96])
def test_unrotate_undoes_it_and_products_keep_their_value(channels: int) -> None:
    x, weight = torch.randn(7, channels, dtype=torch.float64), torch.randn(5, 3, channels, dtype=torch.float64)
    torch.testing.assert_close(unrotate(rotate(x)), x * block_size(channels))
    torch.testing.assert_close(unrotate(rotated_weight(weight)), weight)
    torch.testing.assert_close(rotate(x) @ rotated_weight(weight)[:, 1].t(), x @ weight[:, 1].t())


def test_the_hessian_is_that_of_rotated_inputs() -> None:
    x = torch.randn(40, 3, 20, dtype=torch.float64)
    of_plain, of_rotated = x.flatten(1), rotate(x).flatten(1)
    torch.testing.assert_close(rotated_hessian(of_plain.t() @ of_plain, 20), of_rotated.t() @ of_rotated)


def test_a_weight_of_many_blocks_is_rotated_row_by_row():
    weight = torch.randn(700, 3, 384)
    assert torch.equal(rotated_weight(weight)[500:], rotated_weight(weight[500:]))
    assert torch.equal(rotated_weight(weight), rotate(weight) / block_size(384))
