"""The whole quantized model run along a float trajectory: what a plan's noise really is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.nn.step_groups import following
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.planning.plan import Plan, quantizable_layers
from ldmq_kernels.sensitivity.analysis import Analysis, quantized_copy
from ldmq_kernels.sensitivity.output_noise import StepNoise, output_noise, swapped


class Trials:
    """Measures choices of schemes; the quantized layers of the last one are kept for the next.

    Args:
        model: the float model; it stays as it is.
        analysis: whose candidates are tried.
    """

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self._model, self._analysis = model, analysis
        self._copies: dict[tuple[str, str], nn.Module] = {}

    @torch.no_grad()
    def noise(self, schemes: Mapping[str, str], trajectory: Trajectory) -> StepNoise:
        """Noise at the output with every layer in the scheme that it is given, by layer.

        Raises:
            ValueError: the output is not finite.
        """
        layers = quantizable_layers(self._model)
        kept: dict[tuple[str, str], nn.Module] = {}
        for name, scheme in schemes.items():
            candidate = None if scheme == str(FLOAT) else self._analysis.candidate(name, scheme)
            if candidate is not None:
                key = (name, scheme)
                kept[key] = self._copies.get(key) or quantized_copy(name, layers[name], candidate)
        self._copies = kept
        with (
            swapped(self._model, {name: copy for (name, _), copy in kept.items()}),
            following(self._model, self._analysis.calibration.step_groups),
        ):
            return output_noise(self._model, trajectory)


@torch.no_grad()
def measure_plan(
    model: nn.Module,
    plan: Plan,
    trajectory: Trajectory,
    second_moments: Mapping[str, Tensor] | Callable[[str], Tensor] | None = None,
) -> StepNoise:
    """Noise at the output of the whole quantized model along a float trajectory; the model stays float.

    Args:
        second_moments: of the inputs of the layers that the plan rounds by GPTQ, as `conversion.convert` takes them.

    Raises:
        PlanError: the plan does not fit the model.
        ConversionError: a layer cannot be quantized, or lacks the second moments that it needs.
        ValueError: the output is not finite.
    """
    layers = quantizable_layers(model)
    moments = second_moments.get if isinstance(second_moments, Mapping) else second_moments
    copies: dict[str, nn.Module] = {}
    for name, choice in plan.layers(model).items():
        if choice.scheme.quantizes:
            hessian = moments(name) if moments is not None and choice.rounding == "gptq" else None
            copies[name] = quantize_layer(name, layers[name], choice, hessian)
    with swapped(model, copies), following(model, plan.step_groups):
        return output_noise(model, trajectory)
