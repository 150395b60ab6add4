"""The ranges of every layer's input, by channel and sampling step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.numerics.affine import INT8_MAX
from ldmq_kernels.planning.plan import quantizable_layers

FIRST_STEP = "first-step"
ALL_STEPS = "all-steps"


def channel_absmax(layer: nn.Module, x: Tensor) -> Tensor:
    """(C,) float32, the largest absolute value of each input channel."""
    axis = 1 if isinstance(layer, nn.Conv2d) and x.dim() == 4 else 0 if isinstance(layer, nn.Conv2d) else -1
    return x.detach().float().abs().movedim(axis, -1).flatten(0, -2).amax(0)


class RangeObserver:
    """Hooks on every linear and convolution of a model while it runs in full precision.

    Attributes:
        step: the sampling step that the model is called for.
        operations: layer -> multiply-accumulates in one call of the model, of the last call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.step = 0
        self.operations: dict[str, int] = {}
        self._absmax: dict[str, list[Tensor]] = {}
        self._handles = [
            layer.register_forward_hook(self._hook(name)) for name, layer in quantizable_layers(model).items()
        ]

    def _hook(self, name: str) -> Any:
        def observe(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen = channel_absmax(layer, args[0])
            if not bool(torch.isfinite(seen).all()):
                raise ValueError(f"{name}: its input holds NaN or infinite values at sampling step {self.step}")
            steps = self._absmax.setdefault(name, [])
            while len(steps) <= self.step:
                steps.append(torch.zeros_like(seen))
            torch.maximum(steps[self.step], seen, out=steps[self.step])
            weight: Tensor = layer.weight  # type: ignore[assignment]
            self.operations[name] = output.numel() * weight[0].numel()

        return observe

    def at_step(self, step: int) -> None:
        """Say which sampling step comes next."""
        self.step = step

    def absmax(self) -> dict[str, Tensor]:
        """Layer -> (steps, C) float32, the largest absolute value of each input channel."""
        return {name: torch.stack(steps) for name, steps in self._absmax.items()}

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def calibrated_absmax(by_step: Tensor, mode: str) -> Tensor:
    """(steps, C) to (C,): the first step alone, as in the paper, or the largest over all steps."""
    return by_step[0] if mode == FIRST_STEP else by_step.amax(0)


def static_scale(absmax: Tensor, smoothing: Tensor | None) -> float | None:
    """The static input scale for channels up to `absmax`; None where all of them are zero."""
    smoothed = absmax if smoothing is None else absmax * smoothing
    largest = float(smoothed.amax())
    return largest / INT8_MAX if largest > 0 else None


def range_drift(by_step: Tensor) -> float:
    """How many times larger the input gets in later steps than in the first: max over steps / first step."""
    largest = by_step.amax(1)
    return float(largest.amax() / largest[0].clamp_min(torch.finfo(torch.float32).tiny))
