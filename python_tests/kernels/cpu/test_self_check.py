"""oneDNN's int8 products are used only where they are exact; elsewhere the same integers are widened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import FLOAT8_REMARK, onednn, products, self_check, widened
from ldmq_kernels.kernels.cpu import backend as cpu


def _has_vnni() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_vnni" in cpuinfo.read_text()


@pytest.fixture
def forgetful():
    """What was found of this torch is looked at anew, and what the test finds does not outlive it."""
    verdicts = (self_check.is_exact, widened.is_built_in)
    for verdict in verdicts:
        verdict.cache_clear()
    yield
    for verdict in verdicts:
        verdict.cache_clear()


def _saturating_linear(x_q: Tensor, _x_scale: float, packed: Tensor, *_: object) -> Tensor:
    """Pairs of products added in 16 bits, as VPMADDUBSW does, then the zero point's correction."""
    unsigned, weight = onednn.to_uint8(x_q).int(), packed.to_dense().int()
    products = unsigned[:, :, None] * weight[None]
    pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-32768, 32767)
    return (pairs.sum(1) - onednn.ZERO_POINT * weight.sum(0)).float()


def test_a_saturating_product_is_refused_and_what_serves_is_said(monkeypatch, forgetful):
    monkeypatch.setattr(onednn, "linear", _saturating_linear)
    assert not self_check.is_exact()
    assert cpu.serves(torch.device("cpu"))
    remark = cpu.remark(torch.device("cpu"))
    assert ("multiplied in 16 bits" in remark) == products.serves()
    monkeypatch.setattr(products, "serves", lambda: False)
    assert "multiplied in float32" in cpu.remark(torch.device("cpu"))


def test_a_torch_without_the_ops_is_refused(monkeypatch, forgetful):
    monkeypatch.setattr(onednn, "OPS", (*onednn.OPS, "qlinear_of_another_torch"))
    assert not self_check.is_exact()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu.serves(torch.device("cpu"))
    assert "lacks oneDNN" in cpu.why_not(torch.device("cpu"))


def test_no_other_device_is_served():
    assert not cpu.serves(torch.device("cuda"))


@pytest.mark.skipif(not _has_vnni(), reason="the processor has no AVX-512 VNNI")
def test_a_processor_with_vnni_multiplies_int8():
    assert self_check.is_exact()
    assert cpu.remark(torch.device("cpu")) == FLOAT8_REMARK


@pytest.mark.needs_exact_onednn
@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2"])
def test_a_processor_without_vnni_is_refused_and_one_with_it_is_not(instructions):
    """oneDNN itself can be told to leave VNNI alone, and then really saturates."""
    script = "from ldmq_kernels.kernels.cpu import self_check; print(self_check.is_exact())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
