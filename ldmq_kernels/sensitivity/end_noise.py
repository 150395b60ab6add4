"""Noise at the end of the trajectory that one layer's errors make, picture by picture.

What is alike from step to step in a layer's errors, such as the error of its rounded weight, adds up as amplitudes, the
rest as powers. So the contributions of all steps are added for each picture and probe, and squared after.

Where some steps were left out, contributions in between are interpolated, so that step i counts w_i times. That counts
as alike also what differs from each step to the next: the square of a single contribution counts w_i^2 times, where it
should as often as there are steps like it, and the difference is taken away again, by one factor for all pictures and
probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    """Sums over steps, (probes, pictures) float64."""

    def __init__(self, ends: EndTrajectory) -> None:
        self._ends, self._pictures = ends, ends.pictures
        count = (len(ends.ends) * ends.probes, len(self._pictures))
        self._amplitude, self._excess, self._power = (torch.zeros(count, dtype=torch.float64) for _ in range(3))

    def add(self, record: EndRecord, by_row: Tensor) -> None:
        """Add what a layer's error in one call does along each probe, (probes, rows) float64."""
        if record.prompts:
            places = torch.tensor([self._pictures.index(prompt) for prompt in record.prompts])
            found = torch.zeros_like(self._amplitude).index_add(1, places, by_row)
        else:  # one row for all pictures: each has an equal share of what they get together
            found = by_row.sum(1, keepdim=True).expand_as(self._amplitude) / len(self._pictures) ** 0.5
        amplitude, power = record.weights.amplitude[:, None], record.weights.power[:, None]
        self._amplitude += amplitude * found
        self._excess += (amplitude.square() - power) * found.square()
        self._power += power * found.square()

    def noise(self) -> EndNoise:
        squares = self._amplitude.square()
        counted, excess = float(squares.sum()), float(self._excess.sum())
        if excess > 0 and counted > 0:  # over probes and pictures: of one alone what is left could be anything
            squares *= max(counted - excess, LEAST * float(self._power.sum())) / counted
        found: dict[End, dict[int, float]] = {}
        for place, end in enumerate(self._ends.ends):
            first = place * self._ends.probes
            mean = squares[first : first + self._ends.probes].mean(0).tolist()
            scale = self._ends.scale[end]
            found[end] = {p: power / scale[p] for p, power in zip(self._pictures, mean, strict=True)}
        return EndNoise(found)


class LayerEndNoise:
    """The noise at the end of each way to quantize a layer, added up record by record.

    Args:
        quantized: name -> a function that gives the quantized layer for a record.
    """

    def __init__(self, ends: EndTrajectory, quantized: Mapping[str, Callable[[EndRecord], nn.Module]]) -> None:
        self._quantized = quantized
        self._sums = {name: _Amplitudes(ends) for name in quantized}

    @torch.no_grad()
    def add(self, record: EndRecord) -> None:
        """Add one call of the float layer; a record without gradients adds nothing."""
        if not record.gradients or not self._quantized:
            return
        exact = record.output.float()
        layers = [layer_for(record) for layer_for in self._quantized.values()]
        errors = [product_of_layer(layer, record.x).float() - exact for layer in layers]
        of_rows, by_probe = (torch.stack([t.flatten(1) for t in some], 1) for some in (errors, record.gradients))
        found = torch.bmm(of_rows, by_probe.mT).double().cpu()  # (rows, ways, probes)
        for place, sums in enumerate(self._sums.values()):
            sums.add(record, found[:, place].T)

    def noise(self) -> dict[str, EndNoise]:
        """The noise of each way by what was added."""
        return {name: sums.noise() for name, sums in self._sums.items()}
