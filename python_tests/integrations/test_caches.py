"""Caches of diffusers run on quantized, fused models as on float ones: they leave out the same, and hooks count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor, nn

import ldmq_kernels as ldmq
from ldmq_kernels.numerics.sqnr import sqnr_db
from python_tests.integrations import transformers

STEPS = (0.9, 0.7, 0.5, 0.3)  # FasterCache needs a pipeline's guidance, and more of them
BROADCAST = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 1001),
    "spatial_attention_block_identifiers": ("transformer_blocks", "single_transformer_blocks"),
    "current_timestep_callback": lambda: 500,
}
CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=10.0),
    "MagCache": lambda: MagCacheConfig(
        num_inference_steps=4, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0, 1.0, 1.0]
    ),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "PyramidAttentionBroadcast": lambda: PyramidAttentionBroadcastConfig(**BROADCAST),
}


@torch.no_grad()
def trajectory(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """Outputs of calls with inputs that change."""
    outputs = []
    with model.cache_context("cond"):
        for index, step in enumerate(STEPS):
            hidden = call["hidden_states"] * step + 0.1 * index
            given = call | {"hidden_states": hidden, "timestep": torch.full((2,), step)}
            outputs.append(model(**given, return_dict=False)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.usefixtures("as_unfused")
def test_a_cache_leaves_out_of_a_quantized_flux_what_it_leaves_out_of_the_float_one(name: str) -> None:
    model, call = transformers.flux()
    quantized, _ = transformers.flux()
    ldmq.quantize(quantized, scheme="w8a8-dynamic")
    exact, plain = trajectory(model, call), trajectory(quantized, call)
    for each in (model, quantized):
        each.enable_cache(CACHES[name]())
    cached = trajectory(model, call)
    assert sqnr_db(exact, cached) < 60  # it does leave something out
    assert sqnr_db(cached, trajectory(quantized, call)) > sqnr_db(exact, plain) - 6
    for each in (model, quantized):
        each.disable_cache()
    assert torch.equal(trajectory(quantized, call), plain)
