"""The producers on CUDA equal the reference but for one step near a tie: in the emulator, and on a GPU if there is one.

python_tests/kernels compares them with exact results, too; here are the shapes by which the work is cut, and what the
binding and the wrappers refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.reference import backend as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = ["one inv_scale", "inv_scales", "measured", "smoothed"]
EPS = 1e-5
NORMS = [  # with their groups and dtypes
    *(((1, 320, 9, 13), 32, dtype) for dtype in DTYPES),  # several parts, and groups of 10: vectors across groups
    ((3, 960, 3, 1), 32, torch.float16),  # more units than blocks
    *(((1, 20, 1, 1), 4, dtype) for dtype in DTYPES),  # one pixel, and vectors for float32 alone
    *(((3, 4, 5, 7), 2, dtype) for dtype in DTYPES),
    *(((2, 4, 33, 35), 4, dtype) for dtype in DTYPES),  # groups of one channel
    *(((1, 963, 3, 3), 3, dtype) for dtype in DTYPES),  # no vectors, and channels for more than one row of threads
    ((2, 963, 5, 1), 1, torch.bfloat16),  # a group that they cut
]


def factors(mode: str, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """An inverse scale by which a few values are clamped, or a smoothing vector, or neither."""
    return {
        "one inv_scale": (torch.tensor([45.0]), None),
        "inv_scales": (torch.rand(channels) * 40 + 20, None),
        "measured": (None, None),
        "smoothed": (None, torch.rand(channels) * 3 + 0.1),
    }[mode]


def moved(device: torch.device, *arguments: Any) -> list[Any]:
    return [argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments]


def assert_near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Integers within one step and almost all equal, scales within 1e-6, or 2e-6 / 127 of a pixel near its mean."""
    (q, scale), (wanted_q, wanted_scale) = (tuple(t.cpu() for t in pair) for pair in (got, want))
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == (
        wanted_q.shape,
        torch.int8,
        wanted_scale.shape,
        torch.float32,
    )
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=2e-8)
    steps = (q.int() - wanted_q.int()).abs()
    assert steps.max() <= 1
    assert int((steps > 0).sum()) <= max(1, q.numel() // 1000)


def image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Channels of different sizes about different means, channels_last."""
    x = torch.randn(shape) * (torch.rand(shape[1], 1, 1) * 3 + 0.1) + torch.randn(shape[1], 1, 1)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def check_norm(device: torch.device, x: Tensor, *arguments: Any) -> None:
    """The reference gets NCHW, since torch's group_norm on a CPU loses digits with channels_last."""
    got = cuda.group_norm_silu_quantize(*moved(device, x, *arguments))
    assert_near(got, reference.group_norm_silu_quantize(x.contiguous(), *arguments))
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("shape", "groups", "dtype"), NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_group_norms_are_near_the_reference(
    device: torch.device, shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype, mode: str
) -> None:
    x, (inv_scale, inv_smooth) = image(shape, dtype), factors(mode, shape[1])
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1])
    check_norm(device, x, weight, bias, groups, EPS, True, inv_scale, inv_smooth, False)
    if inv_scale is None:
        check_norm(device, x, None, None, groups, EPS, False, None, inv_smooth, True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_token", [False, True])
def test_batches_of_more_chunks_than_blocks(device: torch.device, mode: str, per_token: bool) -> None:
    x = image((9, 128, 3, 3), torch.float16)
    check_norm(device, x, None, torch.randn(128), 32, EPS, True, *factors(mode, 128), per_token)


@pytest.mark.parametrize("channels", [1288, 2560, 4096])
def test_pixels_that_several_warps_share(device: torch.device, channels: int) -> None:
    x = image((2, channels, 3, 1), torch.float16)
    check_norm(device, x, torch.randn(channels).half(), None, 8, EPS, True, None, None, True)


@pytest.mark.parametrize("mode", ["one inv_scale", "smoothed"])
@pytest.mark.parametrize("per_token", [False, True])
def test_images_that_are_not_aligned_to_a_vector(device: torch.device, mode: str, per_token: bool) -> None:
    storage = torch.randn(2 * 5 * 3 * 64 + 1).half()
    x, on_device = (memory[1:].view(2, 5, 3, 64).permute(0, 3, 1, 2) for memory in (storage, storage.to(device)))
    arguments = None, None, 4, EPS, True, *factors(mode, 64), per_token
    got = cuda.group_norm_silu_quantize(*moved(device, on_device, *arguments))
    assert_near(got, reference.group_norm_silu_quantize(x.contiguous(), *arguments))


@pytest.mark.parametrize("size", [(3, 1), (21, 19)])
@pytest.mark.parametrize("groups", [1, 8])
def test_a_small_variance_about_a_large_mean_is_found(device: torch.device, size: tuple[int, int], groups: int) -> None:
    """Exact results to compare with: the reference loses more digits than this."""
    x = (torch.randn(2, 128, *size) * 0.01 + 1000).contiguous(memory_format=torch.channels_last)
    grouped = x.double().reshape(2, groups, -1)
    y = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    inv_scale = torch.tensor([30.0])
    got, _ = cuda.group_norm_silu_quantize(*moved(device, x, None, None, groups, EPS, False, inv_scale, None, False))
    steps = (got.cpu() - (y.view(x.shape) * 30).round().clamp(-127, 127)).abs()
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 0.02


def test_every_run_gives_the_same(device: torch.device) -> None:
    x = image((1, 320, 16, 9), torch.float16).to(device)
    first, *others = (cuda.group_norm_silu_quantize(x, None, None, 32, EPS, True, None, None, False) for _ in range(3))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("mode", ["one inv_scale", "measured"])
@pytest.mark.parametrize("per_token", [False, True])
def test_scratch_is_as_large_as_the_binding_says(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, mode: str, per_token: bool
) -> None:
    made, empty = [], torch.empty

    def guarded(*size: Any, dtype: torch.dtype, **keywords: Any) -> Tensor:
        if dtype != torch.uint8:
            return empty(*size, dtype=dtype, **keywords)
        made.append(torch.full((size[0] + 256,), 0x77, dtype=dtype, device=device))
        return made[-1][: size[0]]

    monkeypatch.setattr(torch, "empty", guarded)
    x = image((2, 320, 9, 13), torch.float32)
    cuda.group_norm_silu_quantize(*moved(device, x, None, None, 32, EPS, True, *factors(mode, 320), per_token))
    (scratch,) = made
    assert (scratch[-256:] == 0x77).all()
    assert not (scratch[-264:-256] == 0x77).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(17, 640), (3, 5, 40), (2, 10240), (9, 1926), (1, 8), (300, 16), (2, 16384), (2560,)]
)
@pytest.mark.parametrize("mode", MODES)
def test_geglus_are_near_the_reference(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, mode: str
) -> None:
    x, arguments = (torch.randn(shape) * 2).to(dtype), factors(mode, shape[-1] // 2)
    assert_near(cuda.geglu_quantize(*moved(device, x, *arguments)), reference.geglu_quantize(x, *arguments))


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_not_aligned_to_a_vector(device: torch.device, mode: str) -> None:
    storage, arguments = torch.randn(7 * 128 + 1).half(), factors(mode, 64)
    got = cuda.geglu_quantize(storage.to(device)[1:].view(7, 128), *moved(device, *arguments))
    assert_near(got, reference.geglu_quantize(storage[1:].view(7, 128), *arguments))


@pytest.mark.parametrize(("rows", "channels", "tanh"), [(1, 8192, True), (300, 24, False)])
@pytest.mark.parametrize("mode", MODES)
def test_gelus_are_near_the_reference(device: torch.device, rows: int, channels: int, tanh: bool, mode: str) -> None:
    """Rows as long as a measured scale takes, more rows than a block has, and none aligned to a vector."""
    storage, arguments = torch.randn(rows * channels + 1).half() * 2, factors(mode, channels)
    got = cuda.gelu_quantize(storage.to(device)[1:].view(rows, channels), tanh, *moved(device, *arguments))
    assert_near(got, reference.gelu_quantize(storage[1:].view(rows, channels), tanh, *arguments))


def test_factors_that_are_not_aligned_to_a_vector(device: torch.device) -> None:
    x, factor = torch.randn(7, 128).half(), torch.rand(65)
    got = cuda.geglu_quantize(x.to(device), None, factor.to(device)[1:])
    assert_near(got, reference.geglu_quantize(x, None, factor[1:]))
    x = image((2, 64, 3, 5), torch.float32)
    got = cuda.group_norm_silu_quantize(x.to(device), None, None, 4, EPS, True, factor.to(device)[1:], None, False)
    want = reference.group_norm_silu_quantize(x.contiguous(), None, None, 4, EPS, True, factor[1:], None, False)
    assert_near(got, want)


@pytest.mark.parametrize("gate", [3e38, torch.inf])
def test_a_gate_without_bounds_is_clamped(device: torch.device, gate: float) -> None:
    x = torch.tensor([[1.0, -1.0, gate, gate]], device=device)
    q, _ = cuda.geglu_quantize(x, torch.ones(1, device=device), None)
    assert q.tolist() == [[127, -127]]


def test_a_calibrated_scale_takes_rows_of_any_length(device: torch.device) -> None:
    x, inv_scale = torch.randn(1, 2 * 16392).half(), torch.tensor([20.0])
    got = cuda.geglu_quantize(*moved(device, x, inv_scale, None))
    assert_near(got, reference.geglu_quantize(x, inv_scale, None))
    x = image((1, 4104, 1, 1), torch.float16)
    check_norm(device, x, None, None, 8, EPS, True, inv_scale, None, True)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches_launch_nothing(device: torch.device, mode: str) -> None:
    none = torch.empty(0, 320, 4, 4).contiguous(memory_format=torch.channels_last)
    for per_token, scales in ((False, (0,)), (True, (0,) if "inv_scale" in mode else (0, 4, 4))):
        arguments = moved(device, none, None, None, 32, EPS, True, *factors(mode, 320), per_token)
        q, scale = cuda.group_norm_silu_quantize(*arguments)
        assert (q.shape, scale.shape) == ((0, 320, 4, 4), scales)
    q, scale = cuda.geglu_quantize(*moved(device, torch.empty(0, 640), *factors(mode, 320)))
    assert (q.shape, scale.shape) == ((0, 320), (0,))


def norm(x: Tensor, weight: Tensor | None = None, groups: int = 4, **changes: Any) -> object:
    keywords = {"inv_scale": None, "inv_smooth": None, "per_token": False} | changes
    return cuda.group_norm_silu_quantize(x, weight, None, groups, EPS, True, **keywords)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: norm(x.double()), "float64"),
        (lambda x: norm(x[0]), "3 axes, must be"),
        (lambda x: norm(x, groups=3), "3 groups for 16 channels"),
        (lambda x: norm(x, groups=0), "0 groups"),
        (lambda x: norm(x, torch.ones(7, device=x.device)), r"weight is \(7,\), must be \(16,\)"),
        (lambda x: norm(x, torch.ones(16, device=x.device).double()), "weight is torch.float64"),
        (lambda x: norm(x, torch.ones(32, device=x.device)[::2]), "must be contiguous"),
        (lambda x: norm(x, inv_scale=torch.ones(7, device=x.device)), "inv_scale has 7 elements, must have 1 or 16"),
        (lambda x: norm(x, inv_smooth=torch.ones(1, device=x.device)), "inv_smooth has 1 elements, must have 16"),
        (lambda x: norm(x, inv_smooth=torch.ones(16, device=x.device).half()), "inv_smooth is torch.float16"),
        (lambda x: norm(torch.ones(1, 4104, 1, 1, device=x.device), per_token=True), "channels must be at most 4096"),
        (lambda x: cuda.geglu_quantize(x.double(), None, None), "float64"),
        (lambda x: cuda.geglu_quantize(x[..., :3], None, None), "as many gates"),
        (lambda x: cuda.geglu_quantize(x, torch.ones(3, device=x.device), None), "must have 1 or 2"),
        (lambda x: cuda.geglu_quantize(x, None, torch.ones(1, device=x.device)), "must have 2"),
        (lambda x: cuda.geglu_quantize(x.new_ones(1, 16386), None, None), "channels must be at most 8192"),
        (lambda x: cuda.gelu_quantize(x.new_ones(1, 8193), True, None, None), "channels must be at most 8192"),
        (lambda x: cuda.gelu_quantize(x[0, 0, 0, 0], True, None, None), "x has no axis"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_the_reason(
    device: torch.device, call: Callable[[Tensor], object], why: str
) -> None:
    with pytest.raises(Unsupported, match=why):
        call(torch.ones(2, 16, 4, 4, device=device))


GEGLU: dict[str, Any] = {
    "x": 4096, "dtype": "float16", "inv_scale": 0, "inv_scale_count": 0, "inv_smooth": 0, "q": 8192,
    "q_dtype": "int8", "scale": 12288, "rows": 3, "channels": 320, "device": 7, "stream": 0,
    "dependent": False,
}  # fmt: skip
NORM: dict[str, Any] = {name: value for name, value in GEGLU.items() if name not in ("rows", "dependent")} | {
    "weight": 0, "weight_dtype": "float32", "bias": 0, "bias_dtype": "float32", "groups": 32, "eps": EPS, "silu": True,
    "per_token": False, "scratch": 16384, "samples": 2, "pixels": 16,
}  # fmt: skip
CALLS = {"geglu_quantize": GEGLU, "group_norm_silu_quantize": NORM}


@pytest.mark.parametrize(
    ("op", "change", "why"),
    [
        *((op, {"x": 0}, "x is null, for sizes") for op in CALLS),
        *((op, {"q": 0}, "q is null") for op in CALLS),
        *((op, {"scale": 0}, "scale is null") for op in CALLS),
        *((op, {"scale": 12290}, "scale is not aligned to 4 bytes") for op in CALLS),
        *((op, {"inv_smooth": 12290}, "inv_smooth is not aligned to 4 bytes") for op in CALLS),
        *((op, {"x": 4097}, "x is not aligned to 2 bytes") for op in CALLS),
        *((op, {"channels": -32}, "channels is -32, must be 0 or more") for op in CALLS),
        *((op, {"channels": 2**24}, "channels is 16777216, must be at most") for op in CALLS),
        *((op, {"dtype": "float64"}, "dtype is float64") for op in CALLS),
        *((op, {"device": -1}, "device is -1") for op in CALLS),
        *((op, {"inv_scale": 16384, "inv_scale_count": 7}, "7 elements, must have 1 or 320") for op in CALLS),
        ("geglu_quantize", {"rows": 2**62}, "overflow"),
        ("group_norm_silu_quantize", {"scratch": 0}, "scratch is null"),
        ("group_norm_silu_quantize", {"scratch": 16388}, "scratch is not aligned to 8 bytes"),
        ("group_norm_silu_quantize", {"groups": 0}, "groups must divide channels"),
        ("group_norm_silu_quantize", {"groups": 33}, "groups must divide channels"),
        ("group_norm_silu_quantize", {"bias": 4098}, "bias is not aligned to 4 bytes"),
        ("group_norm_silu_quantize", {"weight_dtype": "int8"}, "dtype is int8"),
        *((op, {"q_dtype": "float16"}, "q_dtype is float16, must be int8 or float8_e4m3fn") for op in CALLS),
    ],
)
def test_bad_arguments_are_refused_before_a_launch(
    emulated: ModuleType, op: str, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"ldmq cuda .*{why}"):
        getattr(emulated, op)(**(CALLS[op] | change))


@pytest.mark.parametrize("op", CALLS)
def test_a_device_that_is_not_there_is_an_error_that_names_op_shape_and_device(emulated: ModuleType, op: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{op} of float16 \(.*channels=320\) on cuda:7 .*ordinal"):
        getattr(emulated, op)(**CALLS[op])


def test_sizes_that_the_kernels_cannot_count_are_refused(emulated: ModuleType) -> None:
    with pytest.raises(emulated.Refusal, match=r"group_norm_silu_quantize of \(samples=2, .*pixels must be at most"):
        emulated.group_norm_silu_quantize(**(NORM | {"pixels": 2**31}))
