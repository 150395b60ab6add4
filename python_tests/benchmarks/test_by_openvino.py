"""How a call's tensors reach a converted model; OpenVINO itself need not be installed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness import by_openvino


class _Model(nn.Module):
    def forward(self, x: Tensor, factor: float, *, more: dict[str, Tensor], flag: bool) -> tuple[Tensor]:
        return (x * factor + more["bias"] if flag else x,)


def test_tensors_of_a_call_are_given_one_after_the_other() -> None:
    x, bias = torch.randn(2, 3), torch.randn(3)
    args, kwargs = (x, 2.0), {"more": {"bias": bias}, "flag": True}
    found = by_openvino.tensors_of(args, kwargs)
    assert [id(tensor) for tensor in found] == [id(x), id(bias)]
    model = by_openvino.Positional(_Model(), args, kwargs)
    assert torch.equal(model(x + 1, bias + 1), (x + 1) * 2 + (bias + 1))
