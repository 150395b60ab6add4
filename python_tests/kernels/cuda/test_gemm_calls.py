"""Calls of the int8 GEMMs: refusals that say why, errors in the driver's words, and what a launch needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import backend as cuda
from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.numerics.formats.int4 import pack_int4
from python_tests.kernels.operands import exact_linear, random_int4, random_int8, random_multiplier

ONE = torch.ones(1)
POINT = {
    "kernel_size": (1, 1),
    "stride": (1, 1),
    "padding": (0, 0, 0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "upsample": 1,
}


@pytest.fixture
def hopper(device: torch.device) -> Iterator[None]:
    """Every linear of the test takes one tile that loads by TMA and needs much shared memory."""
    name = "sm90 128x64x128x8 cooperative"
    found = [tile for tile in tiles.candidates("linear_w8a8", 64, 64, 64, device) if tile.name == name]
    if not found:
        pytest.skip(f"this GPU has no tile {name}")
    with tiles.forced(found[0]):
        yield


def linear(x: Tensor, weight: Tensor, **changes: object) -> object:
    n = weight.shape[0]
    arguments = {
        "x_scale": torch.ones(1),
        "weight_scale": torch.ones(n),
        "bias": None,
        "residual": None,
        "out_dtype": torch.float16,
    } | changes
    moved = {k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return cuda.linear_w8a8(x, weight=weight, **moved)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda i: linear(i(4, 20), i(8, 20)), "channels=20.: input channels must be a multiple of 16"),
        (lambda i: linear(i(4, 32), i(12, 32)), "n=12.*output channels must be a multiple of 8"),
        (lambda i: linear(i(4, 32)[:, 1:], i(8, 31)), "input channels"),
        (lambda i: linear(i(65)[1:].view(2, 32), i(8, 32)), "must begin at a multiple of 16 bytes"),
        (
            lambda i: linear(i(4, 32), i(8, 32), x_scale=torch.ones(3)),
            "the x_scale has 3 elements, must have 1 or 4",
        ),
        (
            lambda i: linear(i(4, 32), i(8, 32), residual=torch.ones(4, 8)),
            "linear_w8a8: the residual is torch.float32, must be float16",
        ),
        (lambda i: linear(i(4, 32), i(8, 32), out_dtype=torch.float64), "output is torch.float64"),
        (lambda i: linear(i(4, 32).float(), i(8, 32)), "activations are torch.float32"),
        (
            lambda i: linear(i(4, 32), i(8, 16)),
            r"weight is torch.int8 \(8, 16\); this layer takes",
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_the_reason(
    device: torch.device, call: Callable[[Callable[..., Tensor]], object], why: str
) -> None:
    with pytest.raises(Unsupported, match=why):
        call(lambda *shape: random_int8(*shape).to(device))


@pytest.mark.parametrize(
    ("op", "changes", "why"),
    [
        ("linear_w8a8", {"x_scale": torch.ones(4).half()}, "x_scale is torch.float16, must be float32"),
        ("linear_w8a8", {"weight_scale": torch.ones(8).double()}, "weight_scale is torch.float64, must be float32"),
        ("linear_w8a8", {"bias": torch.ones(8).double()}, "bias is torch.float64, must be float32 or float16 or"),
        ("linear_w8a8", {"out_dtype": torch.int8, "out_inv_scale": torch.ones(8).half()}, "out_inv_scale is torch.f"),
        ("linear_w8a8", {"out_dtype": torch.int8, "out_inv_scale": torch.ones(3)}, "3 elements, must have 1 or 8"),
        *(
            ("linear_w8a8", {name: torch.ones(size, device="meta"), **more}, f"{name} is on meta, must be on")
            for name, size, more in (
                ("x_scale", (4,), {}),
                ("weight_scale", (8,), {}),
                ("bias", (8,), {}),
                ("residual", (4, 8), {"out_dtype": torch.float32}),
                ("out_inv_scale", (8,), {"out_dtype": torch.int8}),
            )
        ),
        ("linear_w8a8", {"weight": torch.empty(8, 32, dtype=torch.int8, device="meta")}, "weight is on meta"),
        ("linear_w4a8", {"multiplier": torch.empty(8, 1, dtype=torch.uint8, device="meta")}, "multiplier is on meta"),
        ("conv2d_w8a8", {"sample_bias": torch.empty(1, 8, device="meta").half()}, "sample_bias is on meta"),
    ],
)
def test_an_operand_of_another_dtype_or_device_is_refused_by_op_and_name(
    device: torch.device, op: str, changes: dict[str, object], why: str
) -> None:
    x = random_int8(4, 32) if op.startswith("linear") else random_int8(1, 32, 2, 2)
    arguments = {
        "linear_w8a8": {"weight": random_int8(8, 32)},
        "linear_w4a8": {"weight": pack_int4(random_int4(8, 32)), "multiplier": random_multiplier(8, 32)},
        "conv2d_w8a8": {"weight": random_int8(8, 1, 1, 32), "sample_bias": None, **POINT},
    }[op]
    arguments |= {"x_scale": ONE, "weight_scale": torch.ones(8), "bias": None, "residual": None}
    arguments |= {"out_dtype": torch.float16} | changes
    moved = {k: v.to(device) if isinstance(v, Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with pytest.raises(Unsupported, match=f"{op}: the {why}" if "elements" not in why else f"{op}: .*{why}"):
        getattr(cuda, op)(x.to(device), **moved)


def test_a_thread_without_a_context_gets_one(device: torch.device, hopper: None) -> None:
    """The runtime's device is current in a new thread before its context is; the driver's functions need that."""
    x, weight = random_int8(4, 32), random_int8(8, 32)
    operands = [operand.to(device) for operand in (x, ONE, weight, torch.ones(8))]

    def gemm() -> Tensor:
        if device.type == "cpu":
            extension.binding().set_device(1)
        return cuda.linear_w8a8(*operands, None, None, torch.float32)

    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(copy_context().run, gemm).result()  # with the tile that is forced
    assert torch.equal(out.cpu().long(), exact_linear(x, weight))


@pytest.mark.parametrize(("before", "during"), [(0, 1), (1, 0), (1, 1)])
def test_the_callers_device_stays_current(emulated: ModuleType, before: int, during: int) -> None:
    """No kernel of any op leaves another device current, or runs on one that it was not given."""
    x, q, scale = torch.ones(2, 8), torch.empty(2, 8, dtype=torch.int8), torch.empty(2)
    emulated.set_device(before)
    try:
        emulated.quantize_per_token(
            x=x.data_ptr(), dtype="float32", inv_smooth=0, q=q.data_ptr(), q_dtype="int8", scale=scale.data_ptr(),
            rows=2, channels=8, device=during, stream=0, dependent=False,
        )  # fmt: skip
        assert emulated.get_device() == before
        assert emulated.launched_on() == during
    finally:
        emulated.set_device(0)


def test_the_error_has_the_drivers_own_words(device: torch.device, hopper: None) -> None:
    if device.type == "cuda":
        pytest.skip("only the emulator's driver fails when it is told to")
    x, weight = random_int8(4, 32), random_int8(8, 32)
    binding = extension.binding()
    binding.set_encode_error(201)
    try:
        with pytest.raises(RuntimeError, match="failed on cuda:1: invalid device context"):
            cuda.linear_w8a8(x, ONE, weight, torch.ones(8), None, None, torch.float32)
    finally:
        binding.set_encode_error(0)


def test_a_kernel_is_allowed_its_shared_memory_once(device: torch.device, hopper: None) -> None:
    if device.type == "cuda":
        pytest.skip("only the emulator counts")
    x, weight = random_int8(4, 32), random_int8(8, 32)
    told = []
    for _ in range(3):
        cuda.linear_w8a8(x, ONE, weight, torch.ones(8), None, None, torch.float16)
        told.append(extension.binding().told_shared())
    assert told[0] == told[1] == told[2] > 0
