"""The CUDA kernels equal the reference bit for bit: on a CPU in the emulator, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference import backend as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [(17, 320), (3, 5, 20), (63, 1), (2, 2560), (1, 10240), (9, 963), (4, 4)]
IMAGES = [(2, 320, 5, 3), (3, 4, 8, 8), (1, 20, 1, 1), (2, 963, 2, 3), (1, 2560, 1, 2), (5, 1, 7, 1)]


def hard_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values with outliers and exact ties, half of the rows of a small tensor all zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    x.view(-1)[::7] = torch.randint(-140, 140, x.view(-1)[::7].shape, generator=generator) + 0.5
    x.view(-1)[::11] *= 30
    x[: shape[0] // 2] *= 0 if shape[0] < 8 else 1
    return x.to(dtype)


def factors(channels: int) -> Tensor:
    return torch.rand(channels, generator=torch.Generator().manual_seed(channels)) * 3 + 0.01


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_static_rows_equal_the_reference(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, per_channel: bool
) -> None:
    x, inv_scale = hard_values(shape, dtype), factors(shape[-1] if per_channel else 1)
    got = cuda.quantize_static(x.to(device), inv_scale.to(device), -1)
    assert_same((got,), (reference.quantize_static(x, inv_scale, -1),))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
def test_static_images_equal_the_reference(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x = hard_values(shape, dtype).contiguous(memory_format=torch.channels_last)
    inv_scale = factors(shape[1])
    got = cuda.quantize_static(x.to(device), inv_scale.to(device), 1)
    assert_same((got,), (reference.quantize_static(x, inv_scale, 1),))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("smooth", [False, True])
def test_tokens_equal_the_reference(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, smooth: bool
) -> None:
    x, inv_smooth = hard_values(shape, dtype), factors(shape[-1]) if smooth else None
    got = cuda.quantize_per_token(x.to(device), inv_smooth.to(device) if inv_smooth is not None else None)
    assert_same(got, reference.quantize_per_token(x, inv_smooth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("smooth", [False, True])
def test_samples_equal_the_reference(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, smooth: bool
) -> None:
    x = hard_values(shape, dtype).contiguous(memory_format=torch.channels_last)
    inv_smooth = factors(shape[1]) if smooth else None
    got = cuda.quantize_per_sample(x.to(device), inv_smooth.to(device) if inv_smooth is not None else None)
    assert_same(got, reference.quantize_per_sample(x, inv_smooth))
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_rows_that_are_not_aligned_to_a_vector_are_read_right(device: torch.device) -> None:
    storage = hard_values((33 * 64 + 1,), torch.float16)
    x = storage[1:].view(33, 64)
    on_device = storage.to(device)[1:].view(33, 64)
    assert_same(cuda.quantize_per_token(on_device, None), reference.quantize_per_token(x, None))


def test_more_rows_than_one_grid_covers_are_all_quantized(device: torch.device) -> None:
    x = hard_values((1, 4, 600, 500), torch.float32).contiguous(memory_format=torch.channels_last)
    x[0, 0, -1, -1] = 9999
    assert_same(cuda.quantize_per_sample(x.to(device), None), reference.quantize_per_sample(x, None))
    got = cuda.quantize_static(x.to(device), torch.ones(1, device=device), 1)
    assert_same((got,), (reference.quantize_static(x, torch.ones(1), 1),))


@pytest.mark.parametrize("images", [False, True])
def test_smoothing_and_scale_are_two_products_in_that_order(device: torch.device, images: bool) -> None:
    factor, largest = torch.tensor(0.3), torch.tensor(2.9)
    inverse = 1 / ((largest * factor) / 127)
    ties = (torch.arange(-126, 126).repeat_interleave(41) + 0.5) / (inverse * factor)
    x = torch.nextafter(ties, ties + torch.arange(-20, 21).repeat(252).sign())
    telling = ((x * factor) * inverse).round() != (x * (factor * inverse)).round()
    assert int(telling.sum()) > 8, "no value tells the two orders apart"
    row = torch.cat([x[telling], largest[None]])
    inv_smooth = factor.expand(row.numel()).contiguous()
    if images:
        row = row.view(1, -1, 1, 1)
        got = cuda.quantize_per_sample(row.to(device), inv_smooth.to(device))
        assert_same(got, reference.quantize_per_sample(row, inv_smooth))
    else:
        got = cuda.quantize_per_token(row[None].to(device), inv_smooth.to(device))
        assert_same(got, reference.quantize_per_token(row[None], inv_smooth))


def test_a_nan_reaches_the_scale_of_its_own_row_alone(device: torch.device) -> None:
    x = hard_values((5, 2560), torch.float16)
    clean = reference.quantize_per_token(x, None)[1]
    x[3, 2000] = torch.nan
    scale = cuda.quantize_per_token(x.to(device), None)[1].cpu()
    assert scale.isnan().tolist() == [False, False, False, True, False]
    assert torch.equal(scale[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def test_empty_batches_launch_nothing(device: torch.device) -> None:
    tokens, scales = cuda.quantize_per_token(torch.empty(0, 320, device=device), None)
    none = torch.empty(0, 320, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    images, sample_scales = cuda.quantize_per_sample(none, None)
    static = cuda.quantize_static(torch.empty(0, 320, device=device), torch.ones(1, device=device), -1)
    assert (tokens.shape, scales.shape, static.shape) == ((0, 320), (0,), (0, 320))
    assert (images.shape, sample_scales.shape) == ((0, 320, 8, 8), (0,))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: cuda.quantize_per_token(x.double(), None), "float64"),
        (lambda x: cuda.quantize_per_token(x.transpose(0, 1), None), "strides"),
        (lambda x: cuda.quantize_per_token(x, torch.ones(7, device=x.device)), "7 elements, must have 320"),
        (lambda x: cuda.quantize_per_token(x, torch.ones(320, device=x.device).half()), "float16"),
        (lambda x: cuda.quantize_per_sample(x.view(2, 320, 2, 2), None), "must be channels_last"),
        (lambda x: cuda.quantize_per_sample(x, None), "must be .N, C, H, W."),
        (lambda x: cuda.quantize_static(x, torch.ones(1, device=x.device), 0), "channel_dim is 0"),
        (lambda x: cuda.quantize_static(x, torch.ones(2, device=x.device), -1), "must have 1 or 320"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_the_reason(
    device: torch.device, call: Callable[[Tensor], object], why: str
) -> None:
    with pytest.raises(Unsupported, match=why):
        call(torch.ones(8, 320, device=device))


def test_a_device_that_is_not_there_is_an_error_that_names_op_shape_and_device(emulated: ModuleType) -> None:
    x, q, scale = torch.ones(2, 8), torch.empty(2, 8, dtype=torch.int8), torch.empty(2)
    with pytest.raises(RuntimeError, match=r"quantize_per_token of float32 \(rows=2, channels=8\) on cuda:7 .*ordinal"):
        emulated.quantize_per_token(
            x=x.data_ptr(), dtype="float32", inv_smooth=0, q=q.data_ptr(), q_dtype="int8", scale=scale.data_ptr(),
            rows=2, channels=8, device=7, stream=0, dependent=False,
        )  # fmt: skip


def test_a_cpu_tensor_is_not_served() -> None:
    assert not cuda.serves(torch.device("cpu"))
    with pytest.raises(Unsupported, match="must be on a CUDA device"):
        cuda.quantize_per_token(torch.ones(2, 8), None)
