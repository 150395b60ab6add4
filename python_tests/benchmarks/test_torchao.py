"""The rival torchao is called as its own API is, where it is installed: converted and run on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.harness.baselines import by_torchao_fp8

pytest.importorskip("torchao")


def test_fp8_layers_are_torchaos_with_a_scale_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its check of the GPU is answered for it; its products are torch._scaled_mm's, which a CPU has, too."""
    monkeypatch.setattr("torchao.float8.inference.is_MI300", lambda: True)
    model = nn.Sequential(nn.Linear(64, 32)).half()
    x = torch.randn(4, 64).half()
    converted, wanted = by_torchao_fp8(model), model(x)
    weight = converted[0].weight
    assert type(weight).__name__ == "Float8Tensor"
    assert weight.qdata.dtype == torch.float8_e4m3fn
    assert weight.scale.numel() == 1
    assert type(model[0].weight) is nn.Parameter
    error = (converted(x).float() - wanted.float()).square().mean() / wanted.float().square().mean()
    assert 1e-5 < error < 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_torchao_says_what_it_needs() -> None:
    with pytest.raises(AssertionError, match=r"Float8 dynamic quantization requires CUDA compute capability ≥8\.9"):
        by_torchao_fp8(nn.Sequential(nn.Linear(64, 32)).half())
