"""The ranges of every layer's input, by channel and sampling step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import folds_of_rows
from ldmq_kernels.nn.kinds import axes_of
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.numerics.sums import absmax
from ldmq_kernels.plans.layers import layer_input, quantizable_layers

FIRST_STEP = "first-step"
SAMPLED_STEPS = "sampled-steps"
DRAWN_STEPS = "drawn-steps"
ALL_STEPS = "all-steps"
MODES = (FIRST_STEP, SAMPLED_STEPS, DRAWN_STEPS, ALL_STEPS)
SAMPLED = 4  # sampling steps that "sampled-steps" calibrates on, the first and the last among them, and "drawn-steps"
TIMESTEP_GROUPS = 4  # of a timestep scale: each holds as many of the calibration's steps


def channel_absmax(layer: nn.Module, x: Tensor) -> Tensor:
    """(rows, C) float32, the largest absolute value of each input channel in each row of a batch; NaN where any is.

    An input without a batch is one row.
    """
    x = x.detach() if x.dim() > axes_of(layer) + 1 else x.detach().unsqueeze(0)
    others = [axis for axis in range(1, x.dim()) if axis != x.dim() - 1 - axes_of(layer)]
    return absmax(x, others).float()


class RangeObserver:
    """Hooks on every linear and convolution of a model while it runs in full precision.

    Attributes:
        step: the sampling step that the model is called for.
        prompts: the indices of the prompts that it is called for.
        operations: layer -> multiply-accumulates in one call of the model, the last one that runs the layer.
        of_vectors: layers whose input has one row for a sample, where the model's own has tokens or pixels: embeddings
            of the time and of pooled texts, and the modulation that adaptive norms make of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.step = 0
        self.prompts: tuple[int, ...] = ()
        self.operations: dict[str, int] = {}
        self.of_vectors: set[str] = set()
        self._in_call: dict[str, int] = {}
        self._batch, self._has_rows_alone = 0, False
        self._text: Tensor | None = None
        self._absmax: dict[str, list[Tensor]] = {}
        self._first_tokens: dict[str, list[Tensor]] = {}
        self._handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in quantizable_layers(model).items()
        ]
        self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_call = {}
        sample = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1), None)
        self._batch = 0 if sample is None else sample.shape[0]
        self._has_rows_alone = sample is None or sample.dim() == 2
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        self._text = text if isinstance(text, Tensor) and text.dim() == 3 and text.shape[1] > 1 else None

    def _hook(self, name: str) -> Any:
        def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            if x.dim() == 2 and not self._has_rows_alone:
                self.of_vectors.add(name)
            text = self._text
            if text is not None and x.shape == text.shape and x.data_ptr() == text.data_ptr():
                self._note(self._first_tokens, name, channel_absmax(layer, x[:, :1]))
                x = x[:, 1:]
            self._note(self._absmax, name, channel_absmax(layer, x))
            weight: Tensor = layer.weight  # type: ignore[assignment]
            self._in_call[name] = self._in_call.get(name, 0) + output.numel() * weight[0].numel()
            self.operations[name] = self._in_call[name]

        return observe

    def _note(self, seen: dict[str, list[Tensor]], name: str, of_rows: Tensor) -> None:
        """Keep the largest values, (rows, C), of a layer at this step; not finite where some input is not."""
        if not bool(torch.isfinite(of_rows).all()):
            raise ValueError(f"{name}: its input holds NaN or infinite values at sampling step {self.step}")
        steps, of_folds = seen.setdefault(name, []), self._by_fold(of_rows)
        while len(steps) <= self.step:
            steps.append(torch.zeros_like(of_folds))
        torch.maximum(steps[self.step], of_folds, out=steps[self.step])

    def _by_fold(self, of_rows: Tensor) -> Tensor:
        """(2, C), of the rows of each fold of prompts; of all rows twice where they belong to no prompt."""
        rows = torch.tensor(folds_of_rows(of_rows.shape[0], self.prompts, self._batch), device=of_rows.device)
        if not rows.numel():
            return of_rows.amax(0).expand(2, -1).clone()
        nothing = torch.zeros_like(of_rows[:1])
        return torch.stack([torch.cat([nothing, of_rows[rows == fold]]).amax(0) for fold in (0, 1)])

    def at_call(self, step: int, prompts: tuple[int, ...]) -> None:
        """Say which sampling step comes next, and for which prompts."""
        self.step, self.prompts = step, prompts

    def absmax(self, order: Sequence[int]) -> dict[str, Tensor]:
        """Layer -> (2, steps, C) float32, the largest absolute value of each input channel in each fold of prompts.

        Of layers that read the text, without its first token: the beginning of the text, whose values are far larger
        than the rest.

        Args:
            order: for each sampling step, the number that `at_call` was told.
        """
        return {name: _in_order(seen, order) for name, seen in self._absmax.items()}

    def first_tokens(self, order: Sequence[int]) -> dict[str, Tensor]:
        """Layer that reads the text -> (2, steps, C) float32, the range of the text's first token alone."""
        return {name: _in_order(seen, order) for name, seen in self._first_tokens.items()}

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _in_order(seen: list[Tensor], order: Sequence[int]) -> Tensor:
    """(2, steps, C) of what was seen by number; zeros at steps that the layer was not run at."""
    nothing = torch.zeros_like(seen[0])
    return torch.stack([seen[slot] if slot < len(seen) else nothing for slot in order], 1)


def spread_steps(steps: int, count: int) -> list[int]:
    """`count` sampling steps spread evenly, the first and the last among them."""
    if count >= steps:
        return list(range(steps))
    if count == 1:
        return [0]
    return sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)})


def calibrated_steps(steps: int, mode: str) -> list[int]:
    """The sampling steps that a mode takes ranges from: the first alone, as in the paper, some, or all."""
    chosen = {FIRST_STEP: [0], SAMPLED_STEPS: spread_steps(steps, SAMPLED), DRAWN_STEPS: drawn_steps(steps, SAMPLED)}
    return chosen.get(mode) or list(range(steps))


def drawn_steps(steps: int, count: int) -> list[int]:
    """`count` sampling steps from a normal distribution over them, the same ones each time; all if they are fewer.

    Its mean is the middle of the trajectory, its deviation a quarter of it: a way of choosing calibration steps that
    PQD (Ye et al., arXiv 2501.00124) takes, whose mean and deviation are not public.
    """
    if count >= steps:
        return list(range(steps))
    places = np.arange(steps)
    weights = np.exp(-0.5 * ((places - (steps - 1) / 2) / (steps / 4)) ** 2)
    drawn = np.random.default_rng(0).choice(places, count, replace=False, p=weights / weights.sum())
    return sorted(drawn.tolist())


def calibrated_absmax(by_step: Tensor, mode: str) -> Tensor:
    """(steps, C) to (C,): the largest over the steps that the mode takes ranges from."""
    return by_step[calibrated_steps(by_step.shape[0], mode)].amax(0)


def group_boundaries(timesteps: Sequence[float], groups: int = TIMESTEP_GROUPS) -> tuple[float, ...]:
    """Descending timesteps between groups of equally many steps, midway between their neighbours.

    Args:
        timesteps: of the sampling steps; one may come several times, and all of them are then in one group.
    """
    count, ordered = len(timesteps), sorted(timesteps, reverse=True)
    starts = sorted({round(count * group / groups) for group in range(1, groups)} - {0, count})
    boundaries: list[float] = []
    for start in starts:
        boundary = (ordered[start - 1] + ordered[start]) / 2
        before = boundaries[-1] if boundaries else math.inf
        if any(boundary <= t < before for t in ordered) and ordered[-1] < boundary:  # no group is empty
            boundaries.append(boundary)
    return tuple(boundaries)


def group_of(timestep: float, boundaries: Sequence[float]) -> int:
    """The timestep group of a timestep: how many boundaries lie above it."""
    return sum(timestep < boundary for boundary in boundaries)


def grouped_absmax(by_step: Tensor, timesteps: Sequence[float], boundaries: Sequence[float]) -> Tensor:
    """(steps, C) to (groups, C): the largest over the steps of each group."""
    groups = torch.tensor([group_of(timestep, boundaries) for timestep in timesteps], device="cpu")
    return torch.stack([by_step[groups == group].amax(0) for group in range(len(boundaries) + 1)])


def static_scale(absmax: Tensor, smoothing: Tensor | None, scheme: Scheme) -> float | None:
    """The static input scale of a scheme for channels up to `absmax`; None where all of them are zero."""
    smoothed = absmax if smoothing is None else absmax * smoothing
    largest = float(smoothed.amax())
    return largest / scheme.activations.largest if largest > 0 else None


def range_drift(by_step: Tensor) -> float:
    """How many times larger the input gets in later steps than in the first: max over steps / first step."""
    largest = by_step.amax(1)
    return float(largest.amax() / largest[0].clamp_min(torch.finfo(torch.float32).tiny))
