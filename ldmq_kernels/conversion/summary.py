"""How many layers a plan quantizes in each scheme, and the bytes that it saves in the checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ldmq_kernels.conversion.left_in_float import InFloat, left_in_float
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import FLOAT, FLOAT_BYTES, SCHEMES, Scheme
from ldmq_kernels.plans.cost import layer_bytes, weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SchemeShare:
    """The layers of one scheme: how many, and the bytes of their weights and scales."""

    convolutions: int
    linears: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Summary:
    """What is quantized. "Before" is the same model in fp16: two bytes a weight, all parameters.

    `schemes` has an entry by name for each scheme that occurs; what no layer of them holds
    (norms, biases) is in `other_bytes`, before as after.

    Attributes:
        in_float: every module with a weight that stays in float, with the reason; also those that no scheme is for,
            such as transposed convolutions.
    """

    schemes: dict[str, SchemeShare]
    other_bytes: int
    in_float: tuple[InFloat, ...] = ()

    @property
    def without_scheme(self) -> dict[str, list[InFloat]]:
        """The modules that no scheme is for, by their class."""
        kinds: dict[str, list[InFloat]] = {}
        for module in self.in_float:
            if not module.has_scheme:
                kinds.setdefault(module.kind, []).append(module)
        return kinds

    def _layers(self, kind: str, quantized: bool) -> int:
        return sum(getattr(share, kind) for name, share in self.schemes.items() if name != str(FLOAT) or not quantized)

    @property
    def convolutions(self) -> int:
        """All convolutions over 1, 2 or 3 axes."""
        return self._layers("convolutions", quantized=False)

    @property
    def linears(self) -> int:
        """All linears."""
        return self._layers("linears", quantized=False)

    @property
    def quantized_convolutions(self) -> int:
        """Convolutions with integer weights."""
        return self._layers("convolutions", quantized=True)

    @property
    def quantized_linears(self) -> int:
        """Linears with integer weights."""
        return self._layers("linears", quantized=True)

    @property
    def bytes_before(self) -> int:
        """Bytes of the model's weights in fp16."""
        return self.other_bytes + sum(share.bytes_before for share in self.schemes.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized model's weights and scales."""
        return self.other_bytes + sum(share.bytes_after for share in self.schemes.values())

    def __str__(self) -> str:
        return (
            f"{self.quantized_convolutions} of {self.convolutions} convolutions and {self.quantized_linears} of "
            f"{self.linears} linears quantized; {_megabytes(self.bytes_before)} in fp16, "
            f"{_megabytes(self.bytes_after)} now ({_ratio(self.bytes_before, self.bytes_after)})"
            + "".join(
                f"; {len(modules)} {kind} in float, {_megabytes(sum(m.bytes for m in modules))}"
                for kind, modules in self.without_scheme.items()
            )
        )

    def table(self) -> Table:
        """A table for a terminal, one row for each scheme."""
        from rich.table import Table

        table = Table(title="what is quantized")
        table.add_column("scheme")
        for column in ("convolutions", "linears", "in fp16", "quantized", "ratio"):
            table.add_column(column, justify="right")

        def row(name: str, convolutions: str, linears: str, before: int, after: int) -> None:
            ratio = _ratio(before, after)
            table.add_row(name, convolutions, linears, _megabytes(before), _megabytes(after), ratio)

        for name, share in self.schemes.items():
            row(name, str(share.convolutions), str(share.linears), share.bytes_before, share.bytes_after)
        rest = self.other_bytes
        for kind, modules in self.without_scheme.items():
            size = sum(module.bytes for module in modules)
            row(f"no scheme: {len(modules)} {kind}", "", "", size, size)
            rest -= size
        row("biases, norms, other", "", "", rest, rest)
        table.add_section()
        row(
            "all",
            f"{self.quantized_convolutions} of {self.convolutions}",
            f"{self.quantized_linears} of {self.linears}",
            self.bytes_before,
            self.bytes_after,
        )
        return table


def summarize(model: nn.Module, plan: Plan | None = None) -> Summary:
    """Count what is quantized: in the model as it is, or as the plan would make it.

    Args:
        model: float with a plan, quantized or float without.
        plan: what the model would become.

    Raises:
        PlanError: the plan does not fit the model.
    """
    layers = quantizable_layers(model)
    layer_plans = {} if plan is None else plan.layers(model)
    counts: Counter[tuple[Scheme, bool]] = Counter()  # by whether these are linears
    before: Counter[Scheme] = Counter()
    after: Counter[Scheme] = Counter()
    for name, layer in layers.items():
        layer_plan = layer_plans.get(name)
        scheme = layer_plan.scheme if layer_plan else layer.scheme if isinstance(layer, QuantizedLayer) else FLOAT
        counts[scheme, isinstance(layer, nn.Linear)] += 1
        before[scheme] += weight_bytes(layer, FLOAT)
        after[scheme] += layer_bytes(layer, layer_plan) if layer_plan else _stored_bytes(layer)
    shares = {
        str(s): SchemeShare(counts[s, False], counts[s, True], before[s], after[s])
        for s in SCHEMES.values()
        if s in before
    }
    counted = {id(layer._parameters.get("weight")) for layer in layers.values()}
    counted |= {id(m.bias) for m in layers.values() if isinstance(m, QuantizedLayer) and m.adds_bias}
    other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    return Summary(shares, FLOAT_BYTES * other, left_in_float(model, layer_plans))


def _stored_bytes(layer: FloatLayer) -> int:
    """Bytes of a layer's weight, scales and corrections as the layer is now."""
    if not (isinstance(layer, QuantizedLayer) and layer.scheme.quantizes):
        return weight_bytes(layer, FLOAT)
    return weight_bytes(
        layer,
        layer.scheme,
        smoothed=layer.smoothing is not None,
        timestep_groups=0 if layer.input_scale is None else layer.input_scale.numel(),
        adds_bias=layer.adds_bias,
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.3f}x" if before else ""
