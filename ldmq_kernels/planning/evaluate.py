"""The whole quantized model run along a float trajectory: what a plan's noise really is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import nn

from ldmq_kernels.calibration.hessian import hessian_bytes, input_hessians
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.conversion.hessian import BYTES_AT_ONCE
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.timestep_groups import following
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.planning.drawn import Drawn, FloatEnds, together
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan
from ldmq_kernels.sensitivity.analysis import Analysis, cross_validated_noise
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.output_noise import StepNoise, output_noise, swapped
from ldmq_kernels.sensitivity.similarity import Decoder, float_pictures, middle_step, structural_noise

Key = tuple[str, str]  # layer and scheme


class PlanEvaluator:
    """Measures plans, given as a scheme for each layer; quantized layers of the last plan are kept for the next.

    Layers are those that `ldmq.quantize` makes of the plan. Where GPTQ rounds, that takes the inputs of the whole
    calibration, of which the analysis saw only a part.

    Args:
        model: the float model; it stays as it is.
        analysis: the analysis whose candidates the layers are quantized as.
    """

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self._model, self._analysis = model, analysis
        self._quantized_layers: dict[Key, QuantizedLayer] = {}

    @torch.no_grad()
    def cross_validated(self, schemes: Mapping[str, str]) -> StepNoise:
        """Noise along the calibration's own trajectory, each fold of its prompts with what the other one makes.

        Raises:
            ValueError: the output is not finite, or GPTQ rounds one of the layers.
        """
        calibration = self._analysis.calibration
        return cross_validated_noise(
            self._model, self._candidates(schemes), calibration.trajectory.by_fold(), calibration
        )

    def _candidates(self, schemes: Mapping[str, str]) -> dict[str, LayerCandidate]:
        return {
            name: candidate
            for name, scheme in schemes.items()
            if scheme != str(FLOAT) and (candidate := self._analysis.candidate(name, scheme)) is not None
        }

    @torch.no_grad()
    def cross_validated_drawing(
        self, schemes: Mapping[str, str], ends: FloatEnds, samples: Collection[int] | None = None
    ) -> Drawn:
        """The calibration's own pictures, each fold of its prompts drawn with what the other one makes.

        Where GPTQ rounds, that takes the other fold's inputs.

        Args:
            samples: numbers of the samples that are drawn; all of them if None.

        Raises:
            ValueError: a latent is not finite.
        """
        calibration, candidates = self._analysis.calibration, self._candidates(schemes)
        folds, parts = calibration.trajectory.by_fold(), []
        prompts = [prompt for prompt in calibration.trajectory.prompts if samples is None or prompt in samples]
        for fold in sorted({prompt % 2 for prompt in prompts}):
            plans = {(name, schemes[name]): candidate.judged_on(fold) for name, candidate in candidates.items()}
            quantized = self._quantize(plans, folds.get(1 - fold, calibration.trajectory))
            layers = {name: layer for (name, _), layer in quantized.items()}
            with swapped(self._model, layers), following(self._model, calibration.timestep_groups):
                parts.append(ends.compare([prompt for prompt in prompts if prompt % 2 == fold]))
        return together(parts)

    def drawn(self, schemes: Mapping[str, str], ends: FloatEnds) -> Drawn:
        """Pictures drawn with every layer in the scheme that it is given, against the float ones.

        Raises:
            ValueError: a latent is not finite.
        """
        with self._quantized(schemes):
            return ends.compare()

    @torch.no_grad()
    def noise(self, schemes: Mapping[str, str], trajectory: Trajectory) -> StepNoise:
        """Noise at the output with every layer in the scheme that it is given, by layer; also by prompt and half.

        Raises:
            ValueError: the output is not finite.
        """
        with self._quantized(schemes):
            return output_noise(self._model, trajectory, by_sample=True)

    def structural_noise(self, schemes: Mapping[str, str], trajectory: Trajectory, decoder: Decoder) -> float:
        """1 - structural similarity of the pictures that a trajectory's middle step leads to."""
        middle = middle_step(trajectory)
        with self._quantized(schemes):
            return structural_noise(self._model, middle, decoder, float_pictures(middle, decoder))

    @contextlib.contextmanager
    def _quantized(self, schemes: Mapping[str, str]) -> Iterator[None]:
        """The model with every layer in the scheme that it is given, inside this block."""
        quantized = {key: plan for key in schemes.items() if (plan := self._layer_plan(*key)) is not None}
        self._quantized_layers = {key: layer for key, layer in self._quantized_layers.items() if key in quantized}
        new = {key: plan for key, plan in quantized.items() if key not in self._quantized_layers}
        self._quantized_layers |= self._quantize(new, self._analysis.calibration.trajectory)
        with (
            swapped(self._model, {name: layer for (name, _), layer in self._quantized_layers.items()}),
            following(self._model, self._analysis.calibration.timestep_groups),
        ):
            yield

    def _layer_plan(self, name: str, scheme: str) -> LayerPlan | None:
        candidate = None if scheme == str(FLOAT) else self._analysis.candidate(name, scheme)
        return None if candidate is None else candidate.layer_plan

    def _quantize(self, plans: Mapping[Key, LayerPlan], trajectory: Trajectory) -> dict[Key, QuantizedLayer]:
        """Quantize layers, those that GPTQ rounds by a trajectory in chunks whose Hessians fit into memory."""
        layers = quantizable_layers(self._model)
        sizes = {key: hessian_bytes(layers[key[0]]) for key, plan in plans.items() if plan.needs_inputs}
        quantized: dict[Key, QuantizedLayer] = {
            key: quantize_layer(key[0], layers[key[0]], plan) for key, plan in plans.items() if key not in sizes
        }
        for chunk in chunks_within(sizes, sizes, BYTES_AT_ONCE):
            hessians = input_hessians(self._model, trajectory, [name for name, _ in chunk])
            for key in chunk:
                quantized[key] = quantize_layer(key[0], layers[key[0]], plans[key], hessians.pop(key[0]))
        return quantized


@torch.no_grad()
def measure_plan(
    model: nn.Module,
    plan: Plan,
    trajectory: Trajectory,
    hessians: Mapping[str, Hessian] | Callable[[str], Hessian] | None = None,
) -> StepNoise:
    """Noise at the output of the whole quantized model along a float trajectory, by sample too; the model stays float.

    Args:
        hessians: the Hessians of the layers that the plan rounds by GPTQ, as `convert` takes them.

    Raises:
        PlanError: the plan does not fit the model.
        ConversionError: a layer cannot be quantized, or lacks the Hessian that it needs.
        ValueError: the output is not finite.
    """
    layers = quantizable_layers(model)
    hessian_of = hessians.get if isinstance(hessians, Mapping) else hessians
    quantized: dict[str, nn.Module] = {}
    for name, layer_plan in plan.layers(model).items():
        if layer_plan.scheme.quantizes:
            hessian = hessian_of(name) if hessian_of is not None and layer_plan.needs_inputs else None
            quantized[name] = quantize_layer(name, layers[name], layer_plan, hessian)
    with swapped(model, quantized), following(model, plan.timestep_groups):
        return output_noise(model, trajectory, by_sample=True)
