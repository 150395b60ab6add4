"""Noise at the end of the trajectory that one layer's errors make, picture by picture.

What is alike from step to step in a layer's errors, such as the error of its rounded weight, adds up as amplitudes, the
rest as powers. So the contributions of all steps are added for each picture and probe, and squared after.

Where some steps were left out, contributions in between are interpolated, so that step i counts w_i times. That counts
as alike also what differs from each step to the next: the square of a single contribution counts w_i^2 times, where it
should as often as there are steps like it, and the difference is taken away again, by one factor for all pictures and
probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.adjoint import End, EndTrajectory
from ldmq_kernels.calibration.probes import EndRecord
from ldmq_kernels.nn import product_of_layer

LEAST = 0.1  # of the powers added over steps: no estimate is below that, whatever is taken away


@dataclass(frozen=True)
class EndNoise:
    """Noise at the ends of some pictures.

    Attributes:
        by_picture: end -> prompt -> noise: for "latent" relative to the final latent's power, for "picture" the mean
            squared error of values in [0, 1].
    """

    by_picture: dict[End, dict[int, float]]

    def mean(self, end: End) -> float:
        """The mean over pictures."""
        noise = self.by_picture[end].values()
        return sum(noise) / len(noise)


class _Amplitudes:
    """Sums over steps for several ways to quantize a layer, (ways, probes, pictures) float64."""

    def __init__(self, ends: EndTrajectory, ways: int) -> None:
        self._ends, self._pictures = ends, ends.pictures
        count = (ways, len(ends.ends) * ends.probes, len(self._pictures))
        self._amplitude, self._excess, self._power = (
            torch.zeros(count, dtype=torch.float64, device="cpu") for _ in range(3)
        )

    def add(self, record: EndRecord, by_row: Tensor) -> None:
        """Add what a layer's errors in one call do along each probe, (ways, probes, rows) float64."""
        if record.prompts:
            places = torch.tensor([self._pictures.index(prompt) for prompt in record.prompts], device="cpu")
            found = torch.zeros_like(self._amplitude).index_add(2, places, by_row)
        else:  # one row for all pictures: each has an equal share of what they get together
            found = by_row.sum(2, keepdim=True).expand_as(self._amplitude) / len(self._pictures) ** 0.5
        amplitude, power = record.weights.amplitude[:, None], record.weights.power[:, None]
        squares = found.square()
        self._amplitude += amplitude * found
        self._excess += (amplitude.square() - power) * squares
        self._power += power * squares

    def noise(self, way: int) -> EndNoise:
        """That of one of the ways."""
        squares = self._amplitude[way].square()
        counted, excess = float(squares.sum()), float(self._excess[way].sum())
        if excess > 0 and counted > 0:  # over probes and pictures: of one alone what is left could be anything
            squares *= max(counted - excess, LEAST * float(self._power[way].sum())) / counted
        found: dict[End, dict[int, float]] = {}
        for place, end in enumerate(self._ends.ends):
            first = place * self._ends.probes
            mean = squares[first : first + self._ends.probes].mean(0).tolist()
            scale = self._ends.scale[end]
            found[end] = {p: power / scale[p] for p, power in zip(self._pictures, mean, strict=True)}
        return EndNoise(found)


class Way(Protocol):
    """A way to quantize a layer, such as a `trials.Judge`."""

    def state(self, step: int, fold: int) -> Any:
        """What the quantized layer depends on: equal for all steps and folds of the prompts that share one."""

    def in_state(self, state: Any) -> nn.Module:
        """The quantized layer of a state, until the next is asked for."""


class LayerEndNoise:
    """The noise at the end of each way to quantize a layer, added up record by record.

    Args:
        quantized: name -> a way.
        at_once: how many records wait for each other, so that a quantized layer multiplies their rows together.
    """

    def __init__(self, ends: EndTrajectory, quantized: Mapping[str, Way], at_once: int = 1) -> None:
        self._quantized, self._at_once = quantized, at_once
        self._sums = _Amplitudes(ends, len(quantized))
        self._waiting: list[EndRecord] = []

    def add(self, record: EndRecord) -> None:
        """Add one call of the float layer; a record without gradients adds nothing."""
        if record.gradients is None or not self._quantized:
            return
        if self._waiting and self._waiting[0].x.shape[1:] != record.x.shape[1:]:
            self._take()
        self._waiting.append(record)
        if len(self._waiting) >= self._at_once:
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        records, self._waiting = self._waiting, []
        errors = self._errors(records).split([record.output.shape[0] for record in records], 1)
        for record, of_record in zip(records, errors, strict=True):
            assert record.gradients is not None
            by_probe = record.gradients.flatten(2).transpose(0, 1)
            found = torch.bmm(by_probe, of_record.permute(1, 2, 0)).double().cpu()  # (rows, probes, ways)
            self._sums.add(record, found.permute(2, 1, 0))

    def _errors(self, records: Sequence[EndRecord]) -> Tensor:
        """(ways, rows, values) float32, of one record after the other."""
        x, exact = _together([record.x for record in records]), _together([record.output for record in records])
        steps = [(record.step, fold) for record in records for fold in record.folds]
        parts: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        errors = exact.new_empty((len(self._quantized), *exact.shape), dtype=torch.float32)
        for way, of_way in zip(self._quantized.values(), errors, strict=True):
            states: dict[Any, list[int]] = {}
            for row, step in enumerate(steps):
                states.setdefault(way.state(*step), []).append(row)
            if len(states) == 1:
                output = product_of_layer(way.in_state(next(iter(states))), x)
                torch.sub(output.float(), exact.float(), out=of_way)
                continue
            for state, of_state in states.items():
                if (key := tuple(of_state)) not in parts:
                    rows = torch.tensor(of_state, device=x.device)
                    parts[key] = rows, x.index_select(0, rows), exact.index_select(0, rows).float()
                rows, given, output = parts[key]
                of_way.index_copy_(0, rows, product_of_layer(way.in_state(state), given).float() - output)
        return errors.flatten(2)

    def noise(self) -> dict[str, EndNoise]:
        """The noise of each way by what was added."""
        if self._waiting:
            self._take()
        return {name: self._sums.noise(way) for way, name in enumerate(self._quantized)}


def _together(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
