"""The rotation in C has the bits of its definition, and so has a weight that is rotated by it."""

import pytest
import torch

from ldmq_kernels.kernels.cpu.rotated import rotated
from ldmq_kernels.kernels.rotation import rotated_weight
from ldmq_kernels.numerics import hadamard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 4), (3, 20), (5, 96), (1000, 1, 320), (0, 32), (3, 0)])
def test_each_block_has_the_bits_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    smooth = torch.rand(shape[-1], generator=generator)
    assert torch.equal(rotated(x), hadamard.rotate(x.float()))
    assert torch.equal(rotated(x, smooth), hadamard.rotate(x.float() * smooth))
    assert torch.equal(rotated(x, smooth.bfloat16()[:1]), hadamard.rotate(x.float() * smooth.bfloat16()[:1]))


def test_rows_that_are_not_side_by_side_and_numbers_that_are_none() -> None:
    x = torch.randn(64, 9, 32, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
    assert torch.equal(rotated(x), hadamard.rotate(x))
    x = x.contiguous()
    x[0, 0, 3], x[1, 1, 40], x[2, 2, 5:7] = torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(rotated(x).nan_to_num(7.0, 8.0, 9.0), hadamard.rotate(x).nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("shape", [(48, 20), (320, 3, 3, 96), (1300, 9, 320)])
def test_a_weight_has_the_bits_of_the_definition(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rotated_weight(weight), hadamard.rotated_weight(weight))


def test_signs_that_are_kept_serve_every_later_call() -> None:
    x, smooth = torch.randn(3, 200, generator=torch.Generator().manual_seed(3)), torch.rand(200, requires_grad=True)
    expected = hadamard.rotate(x * smooth.detach())
    with torch.inference_mode(), torch.device("meta"):
        first = rotated(x, smooth)
    assert torch.equal(first, expected)
    assert torch.equal(rotated(x, smooth).detach(), expected)  # where a gradient keeps the signs
    assert torch.equal(rotated(x, smooth), expected)  # and they were not written to
