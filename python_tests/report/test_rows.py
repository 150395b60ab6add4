"""The page and the table of layers count the bytes that the plan counts, and that the checkpoint has."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import re

import pytest
import torch
from torch import nn

from ldmq_kernels.conversion import convert, summarize
from ldmq_kernels.planning.options import make_options
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.report import sections
from ldmq_kernels.report.rows import layer_rows, to_csv
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from python_tests.report.analyses import made_up_analysis
from python_tests.tiny import mixed_plan, tiny_unet


def _plan_with_every_extra(model: nn.Module) -> Plan:
    """Every scheme, smoothing, scales by timestep, a first token apart, and biases where there were none."""
    plan = mixed_plan(model)
    for index, (name, layer) in enumerate(quantizable_layers(model).items()):
        if index % 2:
            plan.bias_correction[name] = torch.full((layer_shape(layer)[0],), 0.01)
        if name.endswith("attn2.to_k"):
            plan.details[name] = {"first_token": True}
    return plan


def _analysis_of(model: nn.Module, plan: Plan) -> Analysis:
    """An analysis whose only candidate of each layer is what the plan makes of it."""
    candidates, output = {}, {}
    analysis = made_up_analysis(model)
    for name, chosen in plan.layers(model).items():
        candidates[name] = [LayerCandidate(chosen, 1e-5, "plain")] if chosen.scheme.quantizes else []
        output |= {(name, str(chosen.scheme)): analysis.output[name, "w8a16"]}
    return dataclasses.replace(analysis, candidates=candidates, output=output, blocks=analysis.blocks)


def _checkpoint_bytes(model: nn.Module, biased: set[str]) -> dict[str, int]:
    """Layer -> bytes of its tensors, without the bias of the layers that had one in float."""
    return {
        name: sum(t.numel() * t.element_size() for key, t in layer.state_dict().items() if key != "bias")
        + (2 * layer_shape(layer)[0] if layer.bias is not None and name not in biased else 0)
        for name, layer in quantizable_layers(model).items()
    }


@pytest.mark.parametrize("is_quantized", [False, True], ids=["float model", "quantized model"])
def test_page_and_table_and_planner_and_checkpoint_count_the_same_bytes(is_quantized: bool) -> None:
    model = tiny_unet().half()
    plan = _plan_with_every_extra(model)
    quantized = copy.deepcopy(model)
    convert(quantized, plan)
    biased = {name for name, layer in quantizable_layers(model).items() if layer.bias is not None}
    stored = _checkpoint_bytes(quantized, biased)
    assert any(name not in biased and plan.layer(name).scheme.has_timestep_scales for name in plan.bias_correction)

    analysis = _analysis_of(model, plan)
    assert {option.layer: option.bytes for option in make_options(model, analysis, ["w8a8"])} == stored
    shown = quantized if is_quantized else model
    rows = layer_rows(shown, analysis, plan)
    assert {row.name: row.bytes_after for row in rows} == stored
    table = csv.DictReader(io.StringIO(to_csv(rows, []).decode()))
    assert {row["layer"]: int(row["bytes_chosen"]) for row in table} == stored
    page = sections.layers(rows, [])
    sizes = [int(size) for size in re.findall(r'data-v="(\d+)"', page)]
    assert sizes == list(stored.values())
    summary = summarize(shown, plan)
    assert summary.bytes_after - summary.other_bytes == sum(stored.values())
