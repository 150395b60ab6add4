"""The heat map has a place for every block of a model, whatever its class."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from diffusers import PixArtTransformer2DModel
from torch import nn

from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.report.figures import layer_heatmap
from ldmq_kernels.report.rows import layer_rows, schemes_of
from ldmq_kernels.report.stages import MOST_BLOCKS, Stage, stages
from python_tests.report.analyses import made_up_analysis
from python_tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        cross_attention_dim=8,
        caption_channels=8,
    )


def test_stages_of_a_unet_are_its_resolutions() -> None:
    layers = list(quantizable_layers(tiny_unet()))
    found = stages(layers)
    labels = {stage.label for stage in found}
    assert {"conv_in", "time", "down 0", "down 1", "mid", "up 0", "up 1", "conv_out"} == labels
    assert not any(stage.is_entry for stage in found)
    assert [layer for stage in found for layer in layers[stage.start : stage.end]] == layers


def test_every_block_of_a_transformer_is_a_stage(transformer: nn.Module) -> None:
    layers = list(quantizable_layers(transformer))
    blocks = [stage for stage in stages(layers) if stage.is_entry]
    assert [(stage.part, stage.label, stage.together) for stage in blocks] == [
        ("transformer_blocks", str(index), 1) for index in range(3)
    ]
    for index, stage in enumerate(blocks):
        assert all(name.startswith(f"transformer_blocks.{index}.") for name in layers[stage.start : stage.end])


def test_many_blocks_are_taken_together_within_their_list() -> None:
    counts = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    layers = [f"{name}.{index}.{part}" for name, count in counts.items() for index in range(count) for part in "ab"]
    found = stages(["x_embedder", *layers, "proj_out"])
    blocks = [stage for stage in found if stage.is_entry]
    assert MOST_BLOCKS / 2 < len(blocks) <= MOST_BLOCKS
    assert blocks[1] == Stage("transformer_blocks", "2", 5, 9, 2)
    assert [stage.label for stage in blocks if stage.part == "single_transformer_blocks"][:2] == ["0", "2"]
    assert (found[0].label, found[-1].label) == ("x_embedder", "proj_out")
    assert all(a.end == b.start for a, b in itertools.pairwise(found))


def test_the_heat_map_names_every_block_below_its_layers(transformer: nn.Module) -> None:
    analysis = made_up_analysis(transformer)
    rows = layer_rows(transformer, analysis, None)
    texts = re.findall(r">([^<>]+)</text>", layer_heatmap(rows, schemes_of(analysis)))
    assert [text for text in texts if text in {"0", "1", "2"}] == ["0", "1", "2"]
    assert "transformer_blocks" in texts
    many = [dataclasses.replace(row, name=f"blocks.{index}.a") for index in range(60) for row in rows[:1]]
    assert "blocks, 2 in one" in layer_heatmap(many, schemes_of(analysis))
