"""The corners where oneDNN's int8 convolution is wrong are refused, and nothing that models do."""

from __future__ import annotations

from typing import Any

import pytest

from ldmq_kernels.kernels.cpu.conv2d_w8a8 import why_wrong

Geometry = tuple[Any, ...]  # size, kernel, stride, padding, dilation


@pytest.mark.parametrize(
    ("geometry", "why"),
    [
        (((6, 6), (5, 5), (1, 1), (5, 5), (1, 1)), "only padding"),
        (((6, 6), (1, 3), (1, 1), (1, 1), (1, 1)), "only padding"),
        (((8, 1), (2, 2), (1, 1), (1, 1), (2, 2)), "only padding"),
        (((8, 4), (4, 4), (4, 4), (0, 0), (1, 1)), "one pixel wide"),
        (((9, 3), (3, 3), (1, 2), (0, 0), (1, 1)), "one pixel wide"),
    ],
)
def test_a_corner_is_refused_with_the_reason(geometry: Geometry, why: str) -> None:
    assert why in why_wrong(*geometry)


@pytest.mark.parametrize(
    "geometry",
    [
        ((64, 64), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((64, 64), (3, 3), (2, 2), (1, 1), (1, 1)),
        ((1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((64, 64), (1, 1), (1, 1), (0, 0), (1, 1)),
        ((32, 32), (7, 7), (1, 1), (3, 3), (1, 1)),
        ((16, 16), (3, 3), (1, 1), (2, 2), (2, 2)),
    ],
)
def test_what_models_do_is_taken(geometry: Geometry) -> None:
    assert not why_wrong(*geometry)
