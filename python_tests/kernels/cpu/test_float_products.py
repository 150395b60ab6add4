"""float32 products in tiles are near exact ones, whatever the sizes; what cannot be multiplied so is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import float_products, products
from python_tests.kernels.cpu.test_products import CONVOLUTIONS

pytestmark = pytest.mark.skipif(not float_products.serves(), reason="float32 is multiplied in tiles where there is AMX")

LEAST_DB = 103.0  # of products whose operands have 16 bits


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decibels(found: Tensor, exact: Tensor) -> float:
    error = (found.double() - exact).square().sum()
    return float(10 * torch.log10(exact.square().sum() / error))


@pytest.mark.parametrize("rows", [1, 16, 97, 300])
@pytest.mark.parametrize(("channels", "outputs"), [(2, 1), (36, 16), (130, 80), (2048, 33), (3140, 37)])
def test_a_linear_is_near_the_exact_one(rows: int, channels: int, outputs: int) -> None:
    x, weight, bias = values(rows, channels), values(outputs, channels, seed=1), values(outputs, seed=2)
    found = float_products.linear(x, float_products.pack(weight), bias, outputs)
    assert found.dtype == torch.float32
    assert decibels(found, functional.linear(x.double(), weight.double(), bias.double())) > LEAST_DB
    plain = float_products.linear(x[None], float_products.pack(weight), None, outputs)
    assert plain.shape == (1, rows, outputs)
    assert decibels(plain[0], x.double() @ weight.double().t()) > LEAST_DB


@pytest.mark.parametrize("size", CONVOLUTIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_convolution_is_near_the_exact_one(
    size: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, outputs, kernel, height, width, stride, padding, dilation = size
    monkeypatch.setattr(products, "GRAIN", dict.fromkeys(products.GRAIN, 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight = values(2, channels, height, width), values(outputs, channels, kernel, kernel, seed=1)
    bias, geometry = values(outputs, seed=2), ((stride,) * 2, (padding,) * 2, (dilation,) * 2)
    exact = functional.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    found = float_products.conv2d(x, float_products.pack(weight), bias, outputs, *geometry)
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert decibels(found, exact) > LEAST_DB


def test_each_value_has_its_place_and_sizes_do_not_matter() -> None:
    x = torch.zeros(40, 66)
    x[torch.arange(40), torch.arange(40)] = torch.logspace(-20, 20, 40)
    weight = values(50, 66, seed=1)
    found = float_products.linear(x, float_products.pack(weight), None, 50)
    torch.testing.assert_close(found, x @ weight.t(), rtol=2e-5, atol=0)


def test_numbers_that_are_not_finite_are_not_lost() -> None:
    x, weight = values(20, 64), values(20, 64, seed=1)
    x[3, 5], x[4, 6] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32), torch.inf
    found = float_products.linear(x, float_products.pack(weight), None, 20)
    assert torch.isfinite(found).all(1).tolist() == [row not in (3, 4) for row in range(20)]


def test_weights_that_are_not_taken() -> None:
    assert not float_products.takes(values(4, 3))
    assert not float_products.takes(values(4, 4).bfloat16())
    assert not float_products.takes(values(4, 4, 4))
    assert float_products.takes(values(5, 4, 3, 3))
    weight = values(33, 6, 3, 3)
    assert float_products.packed_bytes(weight) == float_products.pack(weight).nbytes
    with pytest.raises(Unsupported, match="do not fit"):
        float_products.conv2d(values(1, 6, 2, 2), float_products.pack(weight), None, 33, (1, 1), (0, 0), (1, 1))
