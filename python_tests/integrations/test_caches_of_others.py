"""Packages that reuse or merge what a UNet computes run on quantized, fused pipelines as on float ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.tiny import draw, tiny_pipeline

STEPS = 3


@contextmanager
def deep_cache(pipe: Any) -> Any:
    """The deep features of every second step are those of the step before."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    yield
    helper.disable()


@contextmanager
def token_merging(pipe: Any) -> Any:
    """Half of the tokens are merged before attention, and parted after it."""
    tomesd = pytest.importorskip("tomesd")
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=8, use_rand=False)
    yield
    tomesd.remove_patch(pipe)


@pytest.mark.parametrize("used", [deep_cache, token_merging], ids=lambda used: used.__name__)
def test_it_changes_a_quantized_pipeline_as_the_float_one_and_leaves_it_as_it_was(
    used: Callable[[Any], Any], tmp_path: Any
) -> None:
    float_pipe, quantized = (tiny_pipeline(tmp_path) for _ in range(2))
    ldmq.quantize(quantized, scheme="w8a8-dynamic")
    exact, plain = draw(float_pipe, STEPS), draw(quantized, STEPS)
    with used(float_pipe), used(quantized):
        changed, both = draw(float_pipe, STEPS), draw(quantized, STEPS)
    assert sqnr_db(exact, changed) < 60  # it does leave something out
    assert sqnr_db(changed, both) > sqnr_db(exact, plain) - 3
    assert torch.equal(draw(quantized, STEPS), plain)
