"""Packed weights give back their integers, and keep doing so when a call lays them out anew."""

from __future__ import annotations

import pytest
import torch

from ldmq_kernels.kernels.cpu import backend as cpu
from ldmq_kernels.kernels.cpu import onednn, packing, products, self_check, widened
from ldmq_kernels.kernels.cpu.packing import pack_conv2d, pack_linear, unpack_conv2d, unpack_linear
from python_tests.kernels.convolutions import as_op

pytestmark = pytest.mark.skipif(not onednn.is_built_in(), reason="this torch has no oneDNN to pack for")

# (out channels, in channels, kernel size, stride, padding, dilation, groups)
CONVOLUTIONS = [
    (320, 4, 3, 1, 1, 1, 1),
    (4, 320, 3, 1, 1, 1, 1),
    (64, 64, 3, 2, 1, 1, 1),
    (32, 64, 3, 1, 2, 2, 1),
    (32, 64, 3, 1, 1, 1, 4),
    (64, 64, 3, 1, 1, 1, 64),
    (20, 20, 1, 1, 0, 1, 5),
]


# how weights are held, and the largest: up to 63 make no pair of products that 16 bits cannot hold, which is exact on
# every processor
FORMS = [
    ("int8", 63),
    pytest.param(("int8", 127), marks=pytest.mark.needs_exact_onednn),
    pytest.param(("products", 127), marks=pytest.mark.skipif(not products.serves(), reason="not a processor for it")),
    ("float32", 127),
]


@pytest.fixture(params=FORMS, ids=str)
def largest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest weight of a test, whose weights are packed for a processor with exact int8 products or without."""
    form, largest = request.param
    monkeypatch.setattr(self_check, "is_exact", lambda: form == "int8")
    if form != "products":
        monkeypatch.setattr(products, "serves", lambda: False)
    return largest


def _integers(*shape: int, largest: int = 127) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-largest, largest + 1, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("shape", [(320, 320), (20, 4), (4, 20), (1, 1), (2560, 960), (7, 11520)])
def test_a_packed_linear_weight_unpacks_exactly(shape, largest):
    weight = _integers(*shape, largest=largest)
    assert torch.equal(unpack_linear(pack_linear(weight), len(weight)), weight)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_packed_convolution_weight_unpacks_exactly_before_and_after_its_first_call(case, inference, largest):
    out_channels, channels, kernel, stride, padding, dilation, groups = case
    geometry = ((stride, stride), (padding, padding), (dilation, dilation), groups)
    weight = _integers(out_channels, kernel, kernel, channels // groups, largest=largest)
    with torch.inference_mode(inference):
        packed = pack_conv2d(weight)
        assert torch.equal(unpack_conv2d(packed, out_channels), weight)
    x_q = _integers(1, channels, 8, 8)
    scale = torch.ones(out_channels)
    rest = (scale, None, None, None, (kernel, kernel), *as_op(*geometry), torch.float32)
    out = cpu.conv2d_w8a8(x_q, torch.ones(1), packed, *rest)
    assert torch.equal(unpack_conv2d(packed, out_channels), weight)
    exact = torch.nn.functional.conv2d(x_q.double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)
    assert torch.equal(out.double(), exact)
    assert torch.equal(cpu.conv2d_w8a8(x_q, torch.ones(1), packed, *rest), out)


def test_a_laid_out_convolution_serves_inputs_of_other_sizes(largest):
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    weight = _integers(64, 3, 3, 64, largest=largest)
    packed = pack_conv2d(weight)
    for batch, size in ((1, 8), (2, 32), (1, 5)):
        x_q = _integers(batch, 64, size, size)
        arguments = (torch.ones(64), None, None, None, (3, 3), *as_op(*geometry), torch.float32)
        out = cpu.conv2d_w8a8(x_q, torch.ones(1), packed, *arguments)
        exact = torch.nn.functional.conv2d(x_q.double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)
        assert torch.equal(out.double(), exact)


@pytest.mark.parametrize("form", [onednn, widened])
def test_a_packed_convolution_is_laid_out_once_even_from_many_threads(form, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    calls = []
    prepack = form.prepack_conv2d
    monkeypatch.setattr(self_check, "is_exact", lambda: form is onednn)
    monkeypatch.setattr(products, "serves", lambda: False)
    monkeypatch.setattr(form, "prepack_conv2d", lambda *a: (calls.append(1), prepack(*a))[1])
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    packed = pack_conv2d(_integers(64, 3, 3, 64))
    x_q = _integers(1, 64, 8, 8)
    arguments = (torch.ones(64), None, None, None, (3, 3), *as_op(*geometry), torch.float32)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(cpu.conv2d_w8a8, x_q, torch.ones(1), packed, *arguments) for _ in range(8)]
        outputs = [run.result() for run in runs]
    assert len(calls) == 1
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_the_memory_of_plain_weights_is_given_back_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(packing, "_trim", lambda: trimmed.append)
    monkeypatch.setattr(packing, "TRIMMED", 3 * 64 * 64)
    monkeypatch.setattr(packing._Holes, "held", 0)
    pack, weight = packing.packers()["linear_w8a8"].pack, torch.ones(64, 64, dtype=torch.int8)
    for packed in range(1, 8):
        pack(weight, None, 64)
        assert len(trimmed) == packed // 3
