"""Results of an analysis as JSON and tensors, and back, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.calibration.adjoint import End
from ldmq_kernels.nn import QuantizedLayer, quantized_class
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import LayerPlan
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.end_noise import EndNoise
from ldmq_kernels.sensitivity.output_noise import SampleNoise, StepNoise


@dataclass(frozen=True)
class Stored:
    """A result in a form that files take.

    Attributes:
        data: JSON.
        tensors: by a name that `data` implies.
    """

    data: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)


def store_number(value: float) -> Stored:
    """A number, exactly."""
    return Stored(value)


def number_of(stored: Stored) -> float:
    """The number."""
    return float(stored.data)


def _noise_data(noise: StepNoise) -> dict[str, Any]:
    return {"by_step": list(noise.by_step.items()), "samples": [astuple(sample) for sample in noise.samples]}


def _noise(data: dict[str, Any]) -> StepNoise:
    return StepNoise(
        {int(step): power for step, power in data["by_step"]},
        tuple(SampleNoise(*sample) for sample in data["samples"]),
    )


def _end_data(noise: EndNoise) -> dict[str, Any]:
    return {end: list(of_end.items()) for end, of_end in noise.by_picture.items()}


def _end_noise(data: dict[End, Any]) -> EndNoise:
    return EndNoise({end: {int(picture): power for picture, power in of_end} for end, of_end in data.items()})


def store_noise(noise: StepNoise) -> Stored:
    """Noise by step and sample."""
    return Stored(_noise_data(noise))


def noise_of(stored: Stored) -> StepNoise:
    """The noise."""
    return _noise(stored.data)


def _store_layer_plan(layer_plan: LayerPlan, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name in ("smoothing", "bias_correction"):
        vector = getattr(layer_plan, name)
        if vector is not None:
            tensors[prefix + name] = vector
    return {
        "scheme": str(layer_plan.scheme),
        "reason": layer_plan.reason,
        "input_scale": layer_plan.input_scale,
        "first_token": layer_plan.first_token,
        "rounding": layer_plan.rounding,
    }


def _layer_plan(data: dict[str, Any], prefix: str, tensors: dict[str, Tensor], device: torch.device) -> LayerPlan:
    vectors = {name: tensors.get(prefix + name) for name in ("smoothing", "bias_correction")}
    scale = data["input_scale"]
    return LayerPlan(
        SCHEMES[data["scheme"]],
        data["reason"],
        tuple(scale) if isinstance(scale, list) else scale,
        first_token=data["first_token"],
        rounding=data["rounding"],
        **{name: None if vector is None else vector.to(device) for name, vector in vectors.items()},
    )


def store_candidates(candidates: Sequence[LayerCandidate]) -> Stored:
    """The candidates of one layer; of a layer that GPTQ rounded, its tensors too."""
    tensors: dict[str, Tensor] = {}
    data = []
    for index, candidate in enumerate(candidates):
        plans = {"": candidate.layer_plan} | {f"judged{fold}.": plan for fold, plan in enumerate(candidate.judged)}
        if candidate.quantized_layer is not None:
            state = candidate.quantized_layer.state_dict()
            tensors |= {f"{index}.layer.{name}": state[name] for name in state if name != "bias"}
        data.append(
            {
                "plans": [
                    [prefix, _store_layer_plan(layer_plan, f"{index}.{prefix}", tensors)]
                    for prefix, layer_plan in plans.items()
                ],
                "noise": candidate.noise,
                "label": candidate.label,
                "estimate": None if candidate.estimate is None else _noise_data(candidate.estimate),
                "end": None if candidate.end is None else _end_data(candidate.end),
                "has_layer": candidate.quantized_layer is not None,
            }
        )
    return Stored(data, tensors)


def _quantized_layer(layer: FloatLayer, layer_plan: LayerPlan, tensors: dict[str, Tensor]) -> QuantizedLayer:
    """The quantized layer of a layer plan with the tensors that it had; its bias is the float layer's, corrected."""
    quantized = quantized_class(layer).empty(
        layer,
        layer_plan.scheme,
        smoothed=layer_plan.smoothing is not None,
        timestep_groups=len(layer_plan.scales),
        first_token=layer_plan.first_token,
        corrected=layer_plan.bias_correction is not None,
    )
    quantized.bias = layer.bias
    if layer_plan.bias_correction is not None:
        quantized.correct_bias(layer_plan.bias_correction, layer.weight)
    for name, tensor in tensors.items():
        quantized.fill(name, tensor.to(layer.weight.device))
    quantized.train(layer.training).finish()
    return quantized


def candidates_of(stored: Stored, layer: FloatLayer) -> list[LayerCandidate]:
    """The candidates, on the float layer's device."""
    found = []
    for index, entry in enumerate(stored.data):
        layer_plan, *judged = (
            _layer_plan(data, f"{index}.{prefix}", stored.tensors, layer.weight.device)
            for prefix, data in entry["plans"]
        )
        start = f"{index}.layer."
        tensors = {name.removeprefix(start): t for name, t in stored.tensors.items() if name.startswith(start)}
        found.append(
            LayerCandidate(
                layer_plan,
                entry["noise"],
                entry["label"],
                None if entry["estimate"] is None else _noise(entry["estimate"]),
                None if entry["end"] is None else _end_noise(entry["end"]),
                _quantized_layer(layer, layer_plan, tensors) if entry["has_layer"] else None,
                tuple(judged),
            )
        )
    return found
