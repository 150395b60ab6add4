"""Rounding by two Hessians makes small what errors of all outputs make together."""

import pytest
import torch
from torch import Tensor

from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.numerics.gptq import damped_cholesky, gptq_round, integers_up_to, rounding_order
from ldmq_kernels.numerics.hadamard import rotated_weight
from ldmq_kernels.numerics.kronecker import KroneckerHessian
from ldmq_kernels.numerics.smoothing import fitted
from python_tests.numerics.test_gptq import correlated


def hessians(out: int, width: int) -> KroneckerHessian:
    return KroneckerHessian(correlated(width), correlated(out, seed=1))


def weight(out: int, width: int) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(2))


def noise(error: Tensor, of: KroneckerHessian) -> float:
    flat = error.flatten(1).double()
    return float(torch.trace(of.outputs.double() @ flat @ of.inputs.double() @ flat.t()))


def rounded(w: Tensor, step: float, largest: int, hessian: Tensor | KroneckerHessian) -> Tensor:
    order = rounding_order(hessian, w.shape[1], w.shape[0])
    return gptq_round(w, torch.full_like(w, step), integers_up_to(largest), order) * step


def place_by_place(w: Tensor, step: float, of: KroneckerHessian) -> Tensor:
    """GPTQ of one row that is the whole weight, whose inputs are all of its places, in their order."""
    rows, columns = (torch.argsort(h.diagonal(), stable=True) for h in (of.outputs, of.inputs))
    by_row = damped_cholesky(of.outputs[rows[:, None], rows]).double()
    by_column = damped_cholesky(of.inputs[columns[:, None], columns]).double()
    factor, exact = torch.kron(by_row, by_column), w[rows][:, columns].flatten().double()
    error = torch.zeros_like(exact)
    for place in range(len(exact) - 1, -1, -1):
        target = exact[place] + error[place + 1 :] @ factor[place + 1 :, place] / factor[place, place]
        error[place] = exact[place] - torch.round(target / step) * step
    found = torch.empty_like(w)
    found[rows[:, None], columns] = (exact - error).view(len(rows), -1).float()
    return found


@pytest.mark.parametrize(("out", "width"), [(1, 1), (7, 12), (20, 5)])
def test_every_place_is_rounded_by_all_that_were_rounded_before(out: int, width: int) -> None:
    w, of = weight(out, width), hessians(out, width)
    assert torch.allclose(rounded(w, 0.2, 1000, of), place_by_place(w, 0.2, of), atol=1e-5)


def test_tiles_hand_their_errors_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    w, of = weight(19, 23), hessians(19, 23)
    whole = rounded(w, 0.2, 1000, of)
    monkeypatch.setattr("ldmq_kernels.numerics.kronecker.TILE", 5)
    assert (rounded(w, 0.2, 1000, of) != whole).float().mean() < 0.01  # a tie may fall otherwise in float32


@pytest.mark.parametrize("largest", [7, 127])
def test_the_error_is_less_than_by_the_inputs_alone(largest: int) -> None:
    w, of = weight(48, 63), hessians(48, 63)
    step = float(w.abs().max()) / largest
    both, inputs = (noise(w - rounded(w, step, largest, h), of) for h in (of, of.inputs))
    assert both < 0.7 * inputs


def test_outputs_that_share_nothing_are_rounded_as_by_the_inputs_alone() -> None:
    w, of = weight(20, 30), hessians(20, 30)
    alone = KroneckerHessian(of.inputs, torch.diag(torch.rand(20, generator=torch.Generator().manual_seed(3))))
    assert (rounded(w, 0.1, 127, alone) != rounded(w, 0.1, 127, of.inputs)).float().mean() < 0.005


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-rotated", "w4a8-rotated", "w4a16", "fp8-dynamic"])
def test_every_format_rounds_by_them_smoothed_and_rotated(scheme: str) -> None:
    made, w, of = SCHEMES[scheme], weight(32, 64), hessians(32, 64)
    smoothing = torch.exp2(torch.arange(64) % 3 - 1.0)
    inputs, outputs = of.inputs, of.outputs
    for_layer, given = fitted(w, of, smoothing, rotated_weight if made.is_rotated else None)
    assert isinstance(given, KroneckerHessian)
    assert torch.equal(given.outputs, outputs)
    assert torch.equal(given.inputs, fitted(w, inputs, smoothing, rotated_weight if made.is_rotated else None)[1])
    errors = {}
    for kind, hessian in (("both", given), ("nearest", None)):
        stored = made.format.weight.quantize(for_layer, hessian)
        errors[kind] = noise(for_layer - made.format.weight.dequantize(stored, 64), given)
    assert errors["both"] < 0.7 * errors["nearest"]


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_hessians_of_outputs_that_are_none_are_refused(value: float) -> None:
    of = hessians(5, 4)
    with pytest.raises(ValueError, match=r"the weight has 6 outputs: \(6, 6\) is needed"):
        rounding_order(of, 4, 6)
    of.outputs[0, 0] = value
    with pytest.raises(ValueError, match=r"NaN|negative diagonal"):
        rounding_order(of, 4, 5)
