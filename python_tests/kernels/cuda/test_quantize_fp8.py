"""FP8 from the CUDA quantizers and producers: the reference's bytes where int8 is exact, a step of it after float sums.

python_tests/kernels/test_float8.py compares the producers with exact results, too.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels import operands as checks
from ldmq_kernels.kernels.agreement import AFTER_FLOAT_SUMS
from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import extension
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import Gpu
from ldmq_kernels.kernels.reference import backend as reference
from python_tests.kernels.cuda.test_producers import EPS, MODES, factors, image, moved

FP8 = torch.float8_e4m3fn
ROWS = [((17, 320), torch.float16), ((5, 9, 20), torch.float32), ((9, 963), torch.bfloat16), ((1, 2560), torch.float32)]


def wide_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values times powers of two that reach from e4m3's subnormal values to beyond 448."""
    return (torch.randn(shape) * torch.exp2(torch.randint(-12, 10, shape).float())).to(dtype)


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(*(t.view(torch.uint8) if t.dtype == FP8 else t for t in (ours.cpu(), theirs)))


@pytest.mark.parametrize(("shape", "dtype"), ROWS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_static_rows_are_the_references_bytes(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, per_channel: bool
) -> None:
    x, inv_scale = wide_values(shape, dtype), torch.rand(shape[-1] if per_channel else 1) * 3 + 0.01
    got = cuda.quantize_static(*moved(device, x, inv_scale), -1, FP8)
    assert_same((got,), (reference.quantize_static(x, inv_scale, -1, FP8),))


@pytest.mark.parametrize(("shape", "dtype"), ROWS)
@pytest.mark.parametrize("smooth", [False, True])
def test_tokens_are_the_references_bytes(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, smooth: bool
) -> None:
    x, inv_smooth = wide_values(shape, dtype), torch.rand(shape[-1]) * 3 + 0.01 if smooth else None
    got = cuda.quantize_per_token(*moved(device, x, inv_smooth), FP8)
    assert_same(got, reference.quantize_per_token(x, inv_smooth, FP8))


@pytest.mark.parametrize("shape", [(2, 320, 5, 3), (3, 5, 8, 8)])
@pytest.mark.parametrize("smooth", [False, True])
def test_images_are_the_references_bytes(device: torch.device, shape: tuple[int, ...], smooth: bool) -> None:
    x, factor = image(shape, torch.float16), torch.rand(shape[1]) * 3 + 0.01
    inv_smooth = factor if smooth else None
    got = cuda.quantize_per_sample(*moved(device, x, inv_smooth), FP8)
    assert_same(got, reference.quantize_per_sample(x, inv_smooth, FP8))
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    got = cuda.quantize_static(*moved(device, x, factor), 1, FP8)
    assert_same((got,), (reference.quantize_static(x, factor, 1, FP8),))


@pytest.mark.parametrize("zeros", [0, 1], ids=["two at once", "one by one"])
def test_every_tie_is_rounded_as_the_reference_does(device: torch.device, zeros: int) -> None:
    """Ties of all neighbours of e4m3, what lies beside them, the clamped ones and both zeros."""
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (grid[1:] + grid[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 1e9)]
    x = torch.cat([grid, ties, *beside, torch.tensor([448.1, 464.0, 465.0, 1e30, torch.inf])])
    x = torch.cat([x, -x, torch.zeros(zeros)]).view(1, -1)
    assert (x.shape[1] % 4 == 0) == (zeros == 0)
    got = cuda.quantize_static(*moved(device, x, torch.ones(1)), -1, FP8)
    assert_same((got,), (reference.quantize_static(x, torch.ones(1), -1, FP8),))


@pytest.mark.parametrize("channels", [8, 7], ids=["two at once", "one by one"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan])
def test_nan_stays_nan_beside_its_neighbours(device: torch.device, channels: int, value: float) -> None:
    x = torch.ones(2, channels)
    x[1, 3] = value
    q = cuda.quantize_static(*moved(device, x, torch.ones(1)), -1, FP8).cpu().float()
    assert q.isnan().nonzero().tolist() == [[1, 3]]
    q, scale = (t.cpu().float() for t in cuda.quantize_per_token(x.to(device), None, FP8))
    assert scale.isnan().tolist() == [False, True]
    assert q.isnan().all(-1).tolist() == [False, True]


def assert_near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Within a step of e4m3, and nearly all the same; scales within 1e-6."""
    (q, scale), (wanted_q, wanted_scale) = (tuple(t.cpu() for t in pair) for pair in (got, want))
    assert (q.shape, q.dtype, scale.shape) == (wanted_q.shape, FP8, wanted_scale.shape)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=2e-8)
    assert not AFTER_FLOAT_SUMS.difference((q,), (wanted_q,))
    different = q.view(torch.uint8) != wanted_q.view(torch.uint8)
    assert int(different.sum()) <= max(1, q.numel() // 500)


@pytest.mark.parametrize("mode", MODES)
def test_gelus_and_geglus_are_near_the_reference(device: torch.device, mode: str) -> None:
    """40 channels are read in vectors, 41 one by one; 2056 by the warps of a whole block."""
    for channels, dtype in ((40, torch.bfloat16), (41, torch.float32), (2056, torch.float16)):
        x, arguments = (torch.randn(5, 2 * channels) * 2).to(dtype), factors(mode, channels)
        got = cuda.geglu_quantize(*moved(device, x, *arguments), FP8)
        assert_near(got, reference.geglu_quantize(x, *arguments, FP8))
        half = x[:, :channels].contiguous()
        got = cuda.gelu_quantize(*moved(device, half, True, *arguments), FP8)
        assert_near(got, reference.gelu_quantize(half, True, *arguments, FP8))


@pytest.mark.parametrize(
    ("mode", "per_token", "channels"),
    [("inv_scales", False, 64), ("one inv_scale", False, 34), ("smoothed", False, 34), ("measured", True, 64)],
)
def test_group_norms_are_near_the_reference(device: torch.device, mode: str, per_token: bool, channels: int) -> None:
    x = image((2, channels, 3, 5), torch.float16)
    arguments = torch.randn(channels), None, 2, EPS, True, *factors(mode, channels), per_token, FP8
    got = cuda.group_norm_silu_quantize(*moved(device, x, *arguments))
    assert_near(got, reference.group_norm_silu_quantize(x.contiguous(), *arguments))
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_a_gpu_without_fp8_is_left_to_the_next_backend(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gpu_of", lambda _: Gpu("NVIDIA A100", 80, 108))
    monkeypatch.setattr(checks, "warn_once", lambda _: None)
    x = torch.ones(2, 16, device=device)
    for call in (
        lambda: cuda.quantize_per_token(x, None, FP8),
        lambda: cuda.geglu_quantize(x, None, None, FP8),
    ):
        with pytest.raises(Unsupported, match=r"FP8 needs compute capability 8.9 or newer, this is 8.0"):
            call()


def test_an_extension_without_fp8_kernels_leaves_them_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer GPUs run the PTX of its int8 kernels."""
    monkeypatch.setattr(extension, "binding", lambda: SimpleNamespace(architectures=lambda: "80;86"))
    x = torch.ones(2, 16)
    assert extension.quantized(x, None) == torch.int8
    with pytest.raises(Unsupported, match=r"built for 80;86, its FP8 kernels need 89 or newer"):
        extension.quantized(x, FP8)


def test_the_binding_names_what_it_quantizes_to(emulated: ModuleType) -> None:
    x, q, factor = torch.ones(2, 8), torch.empty(2, 8, dtype=torch.int8), torch.ones(1)
    with pytest.raises(ValueError, match="quantize_static: q_dtype is float8_e5m2, must be int8 or float8_e4m3fn"):
        emulated.quantize_static(
            x=x.data_ptr(), dtype="float32", inv_scale=factor.data_ptr(), inv_scale_count=1, q=q.data_ptr(),
            q_dtype="float8_e5m2", rows=2, channels=8, device=0, stream=0, dependent=False,
        )  # fmt: skip
