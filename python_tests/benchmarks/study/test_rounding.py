"""Variations of GPTQ: each changes what it says, for as long as it is asked for, and nothing after it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.study import rounding
from ldmq_kernels.numerics.formats import int8

torch.manual_seed(0)
X = torch.randn(400, 24) @ torch.randn(24, 24) * torch.logspace(-1, 1, 24)
HESSIAN = X.t() @ X
WEIGHT = torch.randn(5, 24)
WEIGHT[:, 0] *= 4  # large, and of little account


def _rounded(words: str) -> tuple[torch.Tensor, torch.Tensor]:
    with rounding.VARIATIONS[words]():
        return int8.quantize_weight_int8(WEIGHT, HESSIAN)


@pytest.mark.parametrize("words", [words for words in rounding.VARIATIONS if words != rounding.BUILT_IN])
def test_a_variation_rounds_otherwise_and_only_while_it_is_asked_for(words: str) -> None:
    before, (integers, scale) = _rounded(rounding.BUILT_IN), _rounded(words)
    assert not torch.equal(integers * scale[:, None], before[0] * before[1][:, None])
    assert (integers * scale[:, None] - WEIGHT).abs().amax() < 40 * scale.amax()
    after = _rounded(rounding.BUILT_IN)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_scales_by_the_hessian_have_no_more_error_than_those_of_the_largest_weight() -> None:
    def error(words: str) -> torch.Tensor:
        integers, scale = _rounded(words)
        left = WEIGHT - integers * scale[:, None]
        return ((left @ HESSIAN) * left).sum(1)

    assert bool((error("scales by the Hessian") <= error(rounding.BUILT_IN) * 1.0001).all())


def test_the_table_has_a_line_for_each_way() -> None:
    row = {"model": "demo", "by_picture": {"psnr": [50.0, 60.0], "latent": [40.0, 40.0]}}
    rows = [row | {"by": "nearest", "variation": rounding.BUILT_IN}, row | {"by": "inputs", "variation": "damping 0.1"}]
    lines = rounding.table({"rows": rows, "device": "a device", "torch": "2"}).splitlines()[-2:]
    assert lines == [
        "| demo | nearest |  | 55.00 | 51.00 | 40.00 |",
        "| demo | inputs | damping 0.1 | 55.00 | 51.00 | 40.00 |",
    ]
