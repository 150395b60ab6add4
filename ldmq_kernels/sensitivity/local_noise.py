"""Noise of each layer in isolation, and the smoothing that makes it least.

One pass of the float model over the trajectory serves all layers: a hook gives each its real
inputs, and every candidate computes its output beside the float one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.ranges import static_scale
from ldmq_kernels.calibration.trajectory import replay
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.numerics.smoothing import smoothing_vector
from ldmq_kernels.planning.plan import LayerPlan, kind_of, quantizable_layers
from ldmq_kernels.progress import track
from ldmq_kernels.sensitivity.output_noise import total_noise

SMOOTHING_ALPHAS = (0.25, 0.5, 0.75)
WORTH_SMOOTHING_DB = 0.5  # a smaller gain does not pay for a vector


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a layer: what a plan would say of it, and its own noise.

    `alpha` is the smoothing strength or None; `noise` the relative noise power of the layer's own
    output, with float inputs.
    """

    scheme: Scheme
    alpha: float | None
    input_scale: float | None
    smoothing: Tensor | None
    noise: float

    def layer_plan(self, reason: str = "") -> LayerPlan:
        """As an entry of a plan."""
        return LayerPlan(self.scheme, reason, self.input_scale, self.smoothing)


def quantized_copy(layer: nn.Module, choice: LayerPlan) -> QuantizedLayer:
    """The layer quantized as a plan says; the float one stays as it is."""
    kind: type[QuantizedLayer] = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    scale = None if choice.input_scale is None else torch.tensor([choice.input_scale], dtype=torch.float32)
    return kind.from_float(layer, choice.scheme, input_scale=scale, smoothing=choice.smoothing)


def _float_weight(layer: Any) -> Tensor:
    kind: type[QuantizedLayer] = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    return kind.to_channels_last(layer.weight.detach())


def _variants(layer: nn.Module, scheme: Scheme, absmax: Tensor) -> list[tuple[float | None, LayerPlan]]:
    smoothable = scheme.format.activation_bits == 8 and getattr(layer, "groups", 1) == 1
    found = []
    for alpha in (None, *(SMOOTHING_ALPHAS if smoothable else ())):
        reciprocal = None if alpha is None else 1 / smoothing_vector(absmax, _float_weight(layer), alpha)
        scale = static_scale(absmax, reciprocal) if scheme.is_static else None
        if scheme.is_static and scale is None:
            continue  # an input that is all zero in calibration gives no static scale
        found.append((alpha, LayerPlan(scheme, "", scale, reciprocal)))
    return found


def _measure(
    model: nn.Module, calibration: Calibration, layers: list[str], schemes: list[Scheme], steps: list[int]
) -> dict[str, list[Candidate]]:
    modules = quantizable_layers(model)
    trials: dict[str, list[tuple[float | None, LayerPlan, QuantizedLayer]]] = {}
    sums: dict[tuple[str, int], list[float]] = {}
    handles = []

    def hook(name: str) -> Any:
        def compare(_layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            for index, (_, _, trial) in enumerate(trials[name]):
                signal, noise = total_noise(output, trial(args[0]))
                total = sums.setdefault((name, index), [0.0, 0.0])
                total[0] += signal
                total[1] += noise

        return compare

    for name in layers:
        absmax = calibration.input_absmax(name)
        fitting = [s for s in schemes if s.quantizes and kind_of(modules[name]) in s.format.layers]
        trials[name] = [
            (alpha, choice, quantized_copy(modules[name], choice))
            for scheme in fitting
            for alpha, choice in _variants(modules[name], scheme, absmax)
        ]
        handles.append(modules[name].register_forward_hook(hook(name)))
    try:
        for _ in replay(model, calibration.trajectory.at_steps(steps)):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [
            Candidate(choice.scheme, alpha, choice.input_scale, choice.smoothing, _relative(sums[name, index]))
            for index, (alpha, choice, _) in enumerate(trials[name])
        ]
        for name in layers
    }


def _relative(sums: list[float]) -> float:
    signal, noise = sums
    return noise / signal if signal > 0 else 0.0


def _best(candidates: list[Candidate], scheme: Scheme) -> Candidate | None:
    mine = [c for c in candidates if c.scheme == scheme]
    if not mine:
        return None
    plain = [c for c in mine if c.alpha is None]
    best = min(mine, key=lambda c: c.noise)
    enough = 10 ** (-WORTH_SMOOTHING_DB / 10)
    return best if not plain or best.noise < plain[0].noise * enough else plain[0]


@torch.no_grad()
def local_candidates(
    model: nn.Module,
    calibration: Calibration,
    schemes: list[Scheme],
    steps: list[int],
    *,
    layers_at_once: int = 24,
    show: bool = False,
) -> dict[str, list[Candidate]]:
    """For each layer and scheme the candidate of least own noise, over smoothing strengths.

    Args:
        steps: sampling steps whose inputs are used.
        layers_at_once: how many layers keep all their trial copies in memory together.

    Returns:
        layer -> candidates, at most one a scheme; a scheme that the layer cannot have is left out.
    """
    names = list(calibration.absmax)
    chunks = [names[i : i + layers_at_once] for i in range(0, len(names), layers_at_once)]
    found: dict[str, list[Candidate]] = {}
    for chunk in track(chunks, "noise of each layer", len(chunks), show=show):
        measured = _measure(model, calibration, chunk, schemes, steps)
        for name in chunk:
            best = (_best(measured[name], scheme) for scheme in schemes)
            found[name] = [candidate for candidate in best if candidate is not None]
    return found
