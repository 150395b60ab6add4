"""`products.c` multiplies int8 exactly, whatever the sizes, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.backend import Unsupported
from ldmq_kernels.kernels.cpu import backend as cpu
from ldmq_kernels.kernels.cpu import compiled, products
from ldmq_kernels.kernels.cpu.packing import pack_conv2d, pack_linear, unpack_linear
from python_tests.kernels.convolutions import as_op

pytestmark = pytest.mark.skipif(
    not products.serves(), reason="products.c serves processors with AMX, or with AVX2 alone"
)

ONE = torch.ones(1)
# (input channels, output channels, kernel, height, width, stride, padding, dilation): ragged rows, panels and depths
CONVOLUTIONS = [
    (4, 1, 1, 1, 1, 1, 0, 1),
    (4, 20, 3, 7, 5, 1, 1, 1),
    (36, 16, 3, 9, 4, 2, 1, 1),
    (132, 33, 3, 5, 6, 1, 2, 2),  # 1188 integers of a row: more than are multiplied at once
    (64, 70, 3, 11, 13, 1, 1, 1),  # whole steps of 64, and more rows than are gathered at once
    (128, 48, 1, 9, 12, 1, 0, 1),  # rows that are multiplied as they lie
    (64, 33, 3, 6, 16, 1, 1, 1),  # 16 outputs side by side: tiles of the input itself, with its padding
    (64, 20, 3, 9, 48, 1, 1, 1),  # more than are multiplied in a part, which starts within a line
    (128, 16, 3, 20, 32, 1, 2, 2),
    (64, 18, 5, 5, 20, 1, 0, 1),
    (384, 40, 3, 3, 16, 1, 1, 1),  # 3456 integers of a row: the rest of a tap comes after a part of the sums
    (8, 17, 5, 11, 13, 3, 0, 1),
    (8, 5, 2, 4, 4, 1, 3, 1),  # windows that see only padding
]


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls that are shared between threads however small they are."""
    monkeypatch.setattr(products, "GRAIN", dict.fromkeys(products.GRAIN, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 5, 6, 97, 300])
@pytest.mark.parametrize(("channels", "outputs"), [(4, 1), (36, 16), (128, 80), (2048, 33), (3140, 37)])
def test_linear_sums_are_exact(rows: int, channels: int, outputs: int) -> None:
    x_q, weight = integers(rows, channels), integers(outputs, channels, seed=1)
    packed = pack_linear(weight)
    assert products.is_packed(packed)
    out = cpu.linear_w8a8(x_q, ONE, packed, torch.ones(outputs), None, None, torch.float32)
    assert torch.equal(out, (x_q.long() @ weight.long().t()).float())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign: int) -> None:
    x_q, weight = torch.full((7, 11520), 127 * sign, dtype=torch.int8), torch.full((3, 11520), 127, dtype=torch.int8)
    x_q[0, 0], weight[0, ::2] = 1, -126
    out = cpu.linear_w8a8(x_q, ONE, pack_linear(weight), torch.ones(3), None, None, torch.float32)
    assert torch.equal(out, (x_q.long() @ weight.long().t()).float())


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_are_exact(case: tuple[int, ...], samples: int) -> None:
    channels, outputs, kernel, height, width, stride, padding, dilation = case
    x_q, weight = integers(samples, channels, height, width), integers(outputs, kernel, kernel, channels, seed=1)
    geometry = ((stride, stride), (padding, padding), (dilation, dilation), 1)
    packed = pack_conv2d(weight)
    assert products.is_packed(packed)
    rest = (torch.ones(outputs), None, None, None, (kernel, kernel), *as_op(*geometry), torch.float32)
    out = cpu.conv2d_w8a8(x_q, ONE, packed, *rest)
    exact = torch.nn.functional.conv2d(x_q.double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)
    assert torch.equal(out, exact.float())
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_each_weight_has_one_place() -> None:
    """One-hot inputs and weights: the only product that is not zero is where the definition has it."""
    for tap in range(9):
        for channel in (0, 1, 34, 35):
            x_q, weight = torch.zeros(1, 36, 3, 3, dtype=torch.int8), torch.zeros(18, 3, 3, 36, dtype=torch.int8)
            x_q[0, channel, tap // 3, tap % 3], weight[17, tap // 3, tap % 3, channel] = 3, -5
            rest = (torch.ones(18), None, None, None, (3, 3), *as_op((1, 1), (0, 0), (1, 1), 1), torch.float32)
            out = cpu.conv2d_w8a8(x_q, ONE, pack_conv2d(weight), *rest)
            assert out.flatten().tolist() == [0.0] * 17 + [-15.0]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x_q": integers(2, 10, 5, 5)}, "10 channels for 6 outputs, the weight 8 channels for up to 16"),
        ({"weight_scale": torch.ones(20)}, "8 channels for 20 outputs"),
        ({"x_q": integers(2, 8, 2, 5), "padding": (0, 0, 0, 0)}, r"the windows of \(3, 3\) do not fit"),
        ({"bias": torch.zeros(5)}, "bias has 5 columns, the output 6"),
        ({"sample_bias": torch.zeros(3, 6)}, "sample_bias has 3 rows, which do not divide the 50 of the output"),
        ({"x_scale": torch.ones(3)}, "scale has 3 rows"),
        ({"residual": torch.zeros(1, 6, 5, 5)}, "residual has 150 elements, the output 300"),
        ({"residual": torch.zeros(4, 3, 5, 5)}, "residual has 3 columns, the output 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused_before_memory_is_read(changed: dict[str, object], told: str) -> None:
    operands: dict[str, object] = {
        "x_q": integers(2, 8, 5, 5),
        "x_scale": ONE,
        "weight": pack_conv2d(integers(6, 3, 3, 8)),
        "weight_scale": torch.ones(6),
        "bias": None,
        "sample_bias": None,
        "residual": None,
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1, 1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "upsample": 1,
        "out_dtype": torch.float32,
    }
    with pytest.raises(Unsupported, match=told):
        cpu.conv2d_w8a8(**(operands | changed))


def test_a_call_without_memory_is_an_error_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, library = pack_linear(integers(3, 4)), SimpleNamespace(ldmq_multiply=lambda *_: compiled.NO_MEMORY)
    monkeypatch.setattr(compiled, "load", lambda: (library, ""))
    with pytest.raises(MemoryError, match="2 x 4 by 4 x 3"):
        cpu.linear_w8a8(integers(2, 4), ONE, packed, torch.ones(3), None, None, torch.float32)


def test_groups_are_multiplied_on_weights_that_are_kept() -> None:
    x_q, weight = integers(2, 8, 5, 5), integers(6, 3, 3, 4, seed=1)
    packed, geometry = pack_conv2d(weight), ((1, 1), (1, 1), (1, 1), 2)
    rest = (torch.ones(6), None, None, None, (3, 3), *as_op(*geometry), torch.float32)
    exact = torch.nn.functional.conv2d(x_q.double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)
    for _ in range(2):
        assert torch.equal(cpu.conv2d_w8a8(x_q, ONE, packed, *rest), exact.float())


@pytest.mark.parametrize("has_compiler", [True, False])
def test_an_odd_number_of_channels_and_a_machine_without_a_compiler_are_multiplied_by_onednn(
    has_compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_compiler:
        monkeypatch.setattr(products, "_group", lambda: 0)
    channels = 3 if has_compiler else 4
    x_q, weight = integers(5, channels), integers(4, channels, seed=1)
    packed = pack_linear(weight)
    assert not products.is_packed(packed)
    assert torch.equal(unpack_linear(packed, 4), weight)
    out = cpu.linear_w8a8(x_q, ONE, packed, torch.ones(4), None, None, torch.float32)
    assert torch.equal(out, (x_q.long() @ weight.long().t()).float())


@pytest.mark.skipif(products.form() != products.TILES, reason="only tiles are gated in their epilogue")
@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("channels", [20, 4100])
def test_gates_of_any_depth_and_number_of_rows(rows: int, channels: int) -> None:
    x_q, weight, scale = integers(rows, channels), integers(96, channels, seed=1), torch.full((96,), 2.0**-14)
    out = cpu.linear_geglu_w8a8(x_q, ONE, pack_linear(weight), scale, None, None, torch.float32)
    value, gate = ((x_q.double() @ weight.double().t()) * 2.0**-14).chunk(2, -1)
    torch.testing.assert_close(out.double(), value * torch.nn.functional.gelu(gate), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(products.form() != products.TILES, reason="only tiles are gated in their epilogue")
def test_nan_in_what_is_gated_is_told_before_it_becomes_an_integer() -> None:
    scale = torch.tensor([1.0, float("nan"), 1.0])
    operands = (pack_linear(integers(32, 4)), torch.ones(32), None)
    out = cpu.linear_geglu_w8a8(integers(3, 4), scale, *operands, None, torch.float32)
    assert out.isnan().any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="NaN"):
        cpu.linear_geglu_w8a8(integers(3, 4), scale, *operands, ONE, torch.int8)
