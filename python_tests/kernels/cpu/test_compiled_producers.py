"""Norms and activation functions in C: float32 by vectors, the same bits in any batch and by any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.cpu import compiled, compiled_producers
from ldmq_kernels.kernels.cpu.compiled_producers import GEGLU, GELU, GELU_TANH, SILU, activate, group_norm, layer_norm

DTYPES = [torch.float32, torch.bfloat16]
GRAIN = 64  # elements of a thread, so that small operands are shared between threads
UNWRITTEN = -128  # which no quantization gives

pytestmark = pytest.mark.skipif(compiled.load()[0] is None, reason=f"no library: {compiled.load()[1]}")

Producer = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


@pytest.fixture
def set_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    monkeypatch.setattr(compiled, "GRAIN", GRAIN)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds what no result may."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(UNWRITTEN if tensor.dtype == torch.int8 else torch.nan)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def of_channels(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (random(channels) + 1).to(dtype), random(1, channels)[0].to(dtype)


def activation(which: int) -> Producer:
    return lambda x, inv_scale, inv_smooth: activate(x, which, inv_scale, inv_smooth)


def normed_rows(x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    weight, bias = of_channels(x.shape[-1], x.dtype)
    return layer_norm(x, weight, bias, 1e-5, inv_scale, inv_smooth, (None, None))


def normed_pictures(per_token: bool) -> Producer:
    def work(x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, bias = of_channels(x.shape[1], x.dtype)
        return group_norm(x, weight, bias, 4, 1e-5, True, inv_scale, inv_smooth, per_token)

    return work


ROWS, PICTURES = (3, 29, 52), (3, 52, 41, 37)  # neither divides a vector; a picture is three chunks of sums
CASES = [
    *((activation(which), ROWS) for which in (SILU, GELU, GELU_TANH, GEGLU)),
    (normed_rows, ROWS),
    (normed_pictures(False), PICTURES),
    (normed_pictures(True), PICTURES),
]
NAMES = ["silu", "gelu", "gelu_tanh", "geglu", "layer_norm", "group_norm", "group_norm_per_token"]


@pytest.mark.parametrize(("work", "shape"), CASES, ids=NAMES)
@pytest.mark.parametrize("mode", ["calibrated", "channels", "measured", "smoothed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_batch(
    work: Producer,
    shape: tuple[int, ...],
    mode: str,
    dtype: torch.dtype,
    set_threads: Callable[[int], None],
) -> None:
    x = (random(*shape) * torch.tensor([1.0, 3.0, 0.2]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    channels = shape[1] if len(shape) == 4 else shape[-1] // (2 if work is CASES[3][0] else 1)
    factors = random(channels).abs() * 20 + 1
    given = {
        "calibrated": (factors[:1], None),
        "channels": (factors, None),
        "measured": (None, None),
        "smoothed": (None, factors),
    }[mode]
    results = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        results.append(work(x, *given))
        q, scale = results[-1]
        assert q.min() >= -127
        assert len(q[q != 0].unique()) > 20
        assert scale.isfinite().all()
    for q, scale in results[1:]:
        assert torch.equal(q, results[0][0])
        assert torch.equal(scale, results[0][1])
    for i in range(len(x)):
        q, scale = work(x[i : i + 1], *given)
        assert torch.equal(q[0], results[0][0][i])
        assert torch.equal(scale, results[0][1] if given[0] is not None else results[0][1][i : i + 1])


@pytest.mark.parametrize(
    ("which", "by_torch"),
    [
        (SILU, torch.nn.functional.silu),
        (GELU, torch.nn.functional.gelu),
        (GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
    ids=["silu", "gelu", "gelu_tanh"],
)
@pytest.mark.parametrize("width", [1, 64], ids=["alone", "in a vector"])
def test_an_activation_function_is_as_near_as_torch(
    which: int, by_torch: Callable[[Tensor], Tensor], width: int
) -> None:
    """A row's own scale shows the size of its value, to a rounding or two."""
    x = torch.cat([torch.linspace(-100, 100, 5001), torch.linspace(-8, 8, 20001), torch.logspace(-30, 30, 401)])
    exact = by_torch(x.double())
    _, scale = activate(x.view(-1, 1).expand(-1, width), which, None, None)
    found = scale.double() * 127
    floor = exact.abs().clamp_min(1e-12)
    error = (found - floor).abs() / x.double().abs().clamp_min(1)
    in_torch = (by_torch(x).double() - exact).abs() / x.double().abs().clamp_min(1)
    assert error.max() <= 2 * in_torch.max() + 2.0**-23


@pytest.mark.parametrize("which", [SILU, GELU, GELU_TANH, GEGLU])
def test_what_an_activation_function_makes_of_infinity_is_what_torch_makes(which: int) -> None:
    x = torch.tensor([[torch.inf, 1.0]])
    _, scale = activate(x, which, None, None)
    assert scale.isinf().all()
    with pytest.raises(ValueError, match="holds NaN"):  # minus infinity times zero
        activate(torch.tensor([[1.0, -torch.inf]]), which, torch.ones(1), None)


@pytest.mark.parametrize(("work", "shape"), CASES, ids=NAMES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_calibrated_scale_refuses_nan_wherever_it_is(
    work: Producer,
    shape: tuple[int, ...],
    sign: int,
    at: int,
    count: int,
    per_channel: bool,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(count)
    x = random(*shape)
    x.view(-1)[at] = torch.tensor(torch.nan).copysign(torch.tensor(float(sign)))
    channels = shape[1] if len(shape) == 4 else shape[-1] // (2 if work is CASES[3][0] else 1)
    with pytest.raises(ValueError, match="holds NaN"):
        work(x, torch.ones(channels if per_channel else 1), None)


def test_parameters_of_another_dtype_are_converted() -> None:
    x, (weight, bias) = random(5, 20), of_channels(20, torch.bfloat16)
    picture = random(2, 20, 3, 3)
    wanted = (
        layer_norm(x, weight.float(), bias.float(), 1e-5, None, None, (None, None)),
        group_norm(picture, weight.float(), bias.float(), 4, 1e-5, False, None, None, False),
    )
    for given in ((weight, bias), (weight, bias.float()), (weight.double(), bias.double())):
        for found, each in zip(
            (
                layer_norm(x, *given, 1e-5, None, None, (None, None)),
                group_norm(picture, *given, 4, 1e-5, False, None, None, False),
            ),
            wanted,
            strict=True,
        ):
            assert torch.equal(found[0], each[0])
            assert torch.equal(found[1], each[1])


def test_rows_that_memory_does_not_hold_are_an_error_of_python() -> None:
    q = torch.empty(1, dtype=torch.int8).data_ptr()
    status = compiled.call("ldmq_activate_quantize", 1, q, False, 1, 2**58, SILU, 0, 0, q, q)
    assert status == compiled_producers.NO_MEMORY


@pytest.mark.parametrize("q_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_who_serves(dtype: torch.dtype, q_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(compiled_producers, "activate", lambda *a: served.append(a) or (torch.empty(0),) * 2)
    with dispatch.use_backend("cpu"):
        torch.ops.ldmq.silu_quantize(random(2, 8).to(dtype), None, None, q_dtype)
    assert bool(served) == (dtype in DTYPES and q_dtype == torch.int8)
