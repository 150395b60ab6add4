"""What is tried on a GPU is every op, with arguments that it takes."""

from __future__ import annotations

import inspect

import torch

from ldmq_kernels import ops
from ldmq_kernels.ops import specs
from python_tests.gpu.calls import CALLS, IN_CUDA


def test_every_op_is_called_with_what_it_takes() -> None:
    made = {name: CALLS[name](torch.device("cpu")) for name in CALLS if not name.endswith("by CUDA")}
    assert {call.op for call in made.values()} == set(specs())
    for call in made.values():
        inspect.signature(getattr(ops, call.op)).bind(*call.arguments)
    assert set(IN_CUDA) < set(made)
