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
from dataclasses import dataclass, replace

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
        self._amplitude, self._excess, self._power = (torch.zeros(count, dtype=torch.float64) for _ in range(3))

    def add(self, record: EndRecord, by_row: Tensor) -> None:
        """Add what a layer's errors in one call do along each probe, (ways, probes, rows) float64."""
        if record.prompts:
            places = torch.tensor([self._pictures.index(prompt) for prompt in record.prompts])
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


class LayerEndNoise:
    """The noise at the end of each way to quantize a layer, added up record by record.

    Args:
        quantized: name -> a function that gives the quantized layer for a record and its `fold`.
    """

    def __init__(self, ends: EndTrajectory, quantized: Mapping[str, Callable[[EndRecord], nn.Module]]) -> None:
        self._quantized = quantized
        self._sums = _Amplitudes(ends, len(quantized))

    @torch.no_grad()
    def add(self, record: EndRecord) -> None:
        """Add one call of the float layer; a record without gradients adds nothing."""
        if not record.gradients or not self._quantized:
            return
        by_probe = torch.stack([gradient.flatten(1) for gradient in record.gradients], 1)
        found = torch.bmm(by_probe, self._errors(record).mT).double().cpu()  # (rows, probes, ways)
        self._sums.add(record, found.permute(2, 1, 0))

    def _errors(self, record: EndRecord) -> Tensor:
        """(rows, ways, values) float32: a fold is computed by itself where a way has another layer for each."""
        exact, folds = record.output, record.rows_of_folds()
        parts = {fold: (rows, record.x[rows], exact[rows]) for fold, rows in folds.items()} if len(folds) > 1 else {}
        errors = exact.new_empty((exact.shape[0], len(self._quantized), *exact.shape[1:]), dtype=torch.float32)
        for way, layer_for in enumerate(self._quantized.values()):
            layers = {fold: layer_for(replace(record, fold=fold)) for fold in folds}
            first = next(iter(layers.values()))
            if all(layer is first for layer in layers.values()):
                torch.sub(product_of_layer(first, record.x).float(), exact.float(), out=errors[:, way])
                continue
            for fold, (rows, x, output) in parts.items():
                errors[rows, way] = product_of_layer(layers[fold], x).float() - output.float()
        return errors.flatten(2)

    def noise(self) -> dict[str, EndNoise]:
        """The noise of each way by what was added."""
        return {name: self._sums.noise(way) for way, name in enumerate(self._quantized)}
