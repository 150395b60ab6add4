"""FP8 weights: each within half a step of e4m3, by GPTQ nearer to the layer's output, and nothing else stored."""

from __future__ import annotations

import pytest
import torch

from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.numerics.test_gptq import correlated, output_error

FORMAT = SCHEMES["fp8-dynamic"].format.weight


def weight_of(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=random) + 0.05
    return torch.randn(shape, generator=random) * rows


def real(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    return FORMAT.dequantize(stored, stored["weight"].shape[-1])


@pytest.mark.parametrize("shape", [(64, 320), (17, 20), (8, 3, 3, 130)])
def test_errors_stay_within_half_a_step(shape: tuple[int, ...]) -> None:
    weight = weight_of(*shape)
    stored = FORMAT.quantize(weight)
    scale = stored["weight_scale"].view(-1, *[1] * (weight.dim() - 1))
    assert (stored["weight"].float().abs().flatten(1).amax(1) == 448).all()
    error = (real(stored) - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, scale * 2.0**-10) * 1.0001).all()
    assert sqnr_db(weight, real(stored)) > 31


def test_a_channel_of_zeros_is_zero_and_has_a_positive_scale() -> None:
    weight = weight_of(8, 16)
    weight[3] = 0
    stored = FORMAT.quantize(weight)
    assert not stored["weight"][3].float().any()
    assert (stored["weight_scale"] > 0).all()


def test_gptq_lowers_the_error_of_the_output_on_the_grid_of_e4m3() -> None:
    weight = weight_of(16, 65)
    hessian = correlated(65)
    nearest, found = FORMAT.quantize(weight), FORMAT.quantize(weight, hessian)
    assert output_error(weight - real(found), hessian) < 0.8 * output_error(weight - real(nearest), hessian)
    apart = FORMAT.quantize(weight, 5 * torch.eye(65))
    assert torch.equal(apart["weight"].view(torch.uint8), nearest["weight"].view(torch.uint8))


def test_nan_is_refused_in_a_weight_and_in_what_is_stored() -> None:
    weight = weight_of(8, 16)
    stored = FORMAT.quantize(weight)
    stored["weight"].view(torch.uint8)[2, 3] = 0xFF
    scheme = SCHEMES["fp8-static"]
    with pytest.raises(ValueError, match="weight holds a value that is not finite"):
        scheme.check("weight", stored["weight"])
    with pytest.raises(ValueError, match=r"weight is torch.int8, torch.float8_e4m3fn is needed"):
        scheme.check("weight", stored["weight"].view(torch.int8))
    weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        FORMAT.quantize(weight)
