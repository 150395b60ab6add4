"""Kernels that are launched before the one in front of them has ended give the same bits, by each backend."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ldmq_kernels.cli.early_launches import chain, compared
from ldmq_kernels.kernels.dependent_launch import FROM
from ldmq_kernels.kernels.dispatch import use_backend
from ldmq_kernels.kernels.gpu import gpu_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["triton", None])
@torch.inference_mode()
def test_results_are_equal_eagerly_and_in_a_graph(backend: str | None, device: torch.device) -> None:
    """By Triton alone, and by whoever serves each op in a model."""
    if gpu_of(device).capability < FROM:
        pytest.skip("this GPU has no dependent launch")
    call = chain(device)
    with use_backend(backend) if backend else contextlib.nullcontext():
        problem, _ = compared(call, device)
    assert problem == ""
