"""Diffusion transformers of nine families: their blocks, what stays in float, and the same bits after a reload."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ldmq_kernels.conversion import convert, summarize
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import uniform_plan
from ldmq_kernels.sensitivity.propagation import blocks_of
from python_tests.integrations.transformers import TRANSFORMERS, run
from python_tests.tiny import mixed_plan

ENTRY = re.compile(r"(single_)?(transformer_)?blocks\.\d+")
OUTSIDE = re.compile(r"(x_|patch_|pos_|context_|time_|time_text_|text_|condition_|time_extra_)embed(der|ding|)")
ENDS = {"caption_projection", "norm_out", "proj_in", "proj_out", "adaln_single", "img_in", "txt_in", "time_extra_emb"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_are_the_entries_of_the_models_lists(name: str) -> None:
    model, _ = TRANSFORMERS[name]()
    blocks = blocks_of(model)
    entries = [block for block in blocks if ENTRY.fullmatch(block)]
    lists = [m for n, m in model.named_children() if ENTRY.fullmatch(f"{n}.0")]
    assert len(entries) == sum(map(len, lists)) > 0
    outside = set(blocks) - set(entries) - ENDS
    assert all(OUTSIDE.fullmatch(block) for block in outside), outside


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_saved_transformer_gives_the_same_bits_and_is_near_the_float_one(name: str, tmp_path: Path) -> None:
    model, call = TRANSFORMERS[name]()
    exact, layers = run(model, call), len(quantizable_layers(model))
    convert(model, uniform_plan(model, "w8a8-dynamic"))
    summary = summarize(model)
    assert summary.quantized_linears + summary.quantized_convolutions == layers - len(
        [module for module in summary.in_float if module.has_scheme]
    )
    assert all(module.reason for module in summary.in_float)
    with dispatch.use_backend("reference"):
        out = run(model, call)
        model.save_pretrained(tmp_path)
        assert torch.equal(run(type(model).from_pretrained(tmp_path), call), out)
    assert float(sqnr_db(exact, out)) > 30


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_every_scheme_survives_a_reload(name: str, tmp_path: Path) -> None:
    model, call = TRANSFORMERS[name]()
    convert(model, mixed_plan(model))
    with dispatch.use_backend("reference"):
        out = run(model, call)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert torch.equal(run(type(model).from_pretrained(tmp_path), call), out)
