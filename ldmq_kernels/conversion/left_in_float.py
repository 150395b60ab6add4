"""What a plan leaves in float, module by module, and why: nothing is left out without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.kinds import own_computation
from ldmq_kernels.numerics.formats import FLOAT_BYTES
from ldmq_kernels.plans.layers import modules_below_adapters, quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan

LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)  # no product: rows are read


@dataclass(frozen=True)
class InFloat:
    """A module that computes in float with a weight of its own.

    Attributes:
        kind: its class.
        bytes: of its weights in fp16.
        has_scheme: whether a plan could quantize it: it is of a kind that has schemes, and computes nothing of its own.
    """

    name: str
    kind: str
    bytes: int
    has_scheme: bool
    reason: str = field(compare=False)


def left_in_float(model: nn.Module, layer_plans: Mapping[str, LayerPlan]) -> tuple[InFloat, ...]:
    """Every module with a weight matrix or kernel that stays in float, in the model's order, but tables of embeddings.

    Args:
        layer_plans: what the layers become; of those that are not in it, what they are.
    """
    layers = quantizable_layers(model)
    found = []
    for name, module in modules_below_adapters(model):
        own = own_computation(layers[name]) if name in layers else ""
        if name in layers:
            plan = layer_plans.get(name)
            is_quantized = plan.scheme.quantizes if plan else _quantizes(module)
            reason = (plan.reason if plan else "") or own or "the plan has it so"
        else:
            is_quantized, reason = isinstance(module, LOOKED_UP), f"there is no scheme for a {type(module).__name__}"
        size = 0 if is_quantized else _weights(module)
        if size:
            found.append(InFloat(name, type(module).__name__, FLOAT_BYTES * size, name in layers and not own, reason))
    return tuple(found)


def _quantizes(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer) and module.scheme.quantizes


def _weights(module: nn.Module) -> int:
    """Elements of a module's own weight matrices and kernels; norms and biases have none."""
    own = module.named_parameters(recurse=False)
    return sum(p.numel() for name, p in own if name.endswith("weight") and p.dim() > 1)


def lines_of(modules: Iterable[InFloat]) -> list[str]:
    """Each reason with the modules that it is for, by name."""
    by_reason: dict[str, list[str]] = {}
    for module in modules:
        by_reason.setdefault(module.reason, []).append(module.name)
    return [f"in float, {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
