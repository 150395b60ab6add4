"""The numbers of each layer as rows: for the page's table and for a CSV file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ldmq_kernels.files import csv_bytes
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.cost import layer_bytes, weight_bytes
from ldmq_kernels.plans.layers import layer_shape, quantizable_layers
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import finite_db


@dataclass(frozen=True)
class LayerRow:
    """One layer: what was measured, and what the plan chose.

    Attributes:
        sqnr_db: scheme -> SQNR at the UNet's output with this layer alone quantized so.
        search: scheme -> the parts that the search of the layer chose, such as "alpha 0.5, bias".
        drift: how many times larger its input gets than at the first step.
        scheme: the scheme in the plan; None without a plan.
        bytes_after: bytes of the weight, its scales and its corrections, as the plan counts them; None without a plan.
    """

    name: str
    block: str
    kind: str
    shape: tuple[int, ...]
    operations: int
    sqnr_db: dict[str, float]
    search: dict[str, str]
    drift: float
    bytes_before: int
    scheme: str | None
    bytes_after: int | None
    reason: str


def schemes_of(analysis: Analysis) -> list[str]:
    """The schemes that were tried, in the package's order."""
    tried = {scheme for _, scheme in analysis.output}
    return [name for name in SCHEMES if name in tried]


def layer_rows(model: nn.Module, analysis: Analysis, plan: Plan | None) -> list[LayerRow]:
    """A row for each layer that ran in calibration, in the order of running; the model may be float or quantized."""
    drift = analysis.drift()
    layers = quantizable_layers(model)
    rows = []
    for name in analysis.candidates:
        layer = layers[name]
        measured = {str(c.scheme): analysis.output[name, str(c.scheme)].mean_power for c in analysis.candidates[name]}
        sqnr = {scheme: finite_db(power) for scheme, power in measured.items()}
        search = {str(c.scheme): c.label for c in analysis.candidates[name]}
        layer_plan = None if plan is None else plan.layer(name)
        scheme = None if layer_plan is None else str(layer_plan.scheme)
        rows.append(
            LayerRow(
                name=name,
                block=block_of(model, name),
                kind=kind_of(layer),
                shape=layer_shape(layer),
                operations=analysis.calibration.operations[name],
                sqnr_db=sqnr,
                search=search,
                drift=drift[name],
                bytes_before=weight_bytes(layer, FLOAT),
                scheme=scheme,
                bytes_after=None if layer_plan is None else layer_bytes(layer, layer_plan),
                reason="" if plan is None else _reason(plan, name, sqnr),
            )
        )
    return rows


def _reason(plan: Plan, name: str, sqnr: dict[str, float]) -> str:
    layer_plan = plan.layer(name)
    if name in plan.exceptions:
        return layer_plan.reason
    alone = f"; alone {sqnr[str(layer_plan.scheme)]:.1f} dB at the output" if str(layer_plan.scheme) in sqnr else ""
    reasons = {f"rule {rule['pattern']}": rule["reason"] for rule in plan.rules if "reason" in rule}
    why = f", {reasons[layer_plan.reason]}" if layer_plan.reason in reasons else ""
    return f"{layer_plan.reason}{why}{alone}"


def to_csv(rows: list[LayerRow], schemes: list[str]) -> bytes:
    """The rows as CSV in UTF-8, with a column of SQNR and one of what the search chose for each scheme."""
    fixed = ["layer", "block", "kind", "shape", "multiply_accumulates", "range_drift", "bytes_fp16"]
    measured = [f"{what} {scheme}" for scheme in schemes for what in ("output_sqnr_db", "search")]
    lines = []
    for row in rows:
        numbers: list[object] = []
        for scheme in schemes:
            value = row.sqnr_db.get(scheme)
            numbers += ["" if value is None else f"{value:.3f}", row.search.get(scheme, "")]
        shape = "x".join(map(str, row.shape))
        start = [row.name, row.block, row.kind, shape, row.operations, f"{row.drift:.4f}", row.bytes_before]
        end = [row.scheme or "", "" if row.bytes_after is None else row.bytes_after, row.reason]
        lines.append([*start, *numbers, *end])
    return csv_bytes([*fixed, *measured, "chosen", "bytes_chosen", "reason"], lines)
