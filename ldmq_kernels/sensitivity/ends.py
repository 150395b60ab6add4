"""How much of the end of the trajectory an analysis looks at, and the noise there of the candidates of many layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.settings import sample_number
from ldmq_kernels.sensitivity.adjoint import End, EndTrajectory, sampler_adjoint
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.end_noise import LayerEndNoise
from ldmq_kernels.sensitivity.probes import chunks_of_layers, end_records
from ldmq_kernels.sensitivity.redrawn import NoAdjoint
from ldmq_kernels.sensitivity.trials import Judge

logger = logging.getLogger(__name__)

WHOLE_MODEL = 100_000_000  # parameters up to which all pictures and calls count
PROBES = 8  # at each end; with fewer, sizes scatter more by the chance of which probes are drawn
LARGE_PICTURES, LARGE_PROBES = 2, 1  # of a larger model
LARGE_CALLS = 8  # of each run, at which layers are recorded: in the median sizes come out smaller than by all


def is_whole(model: nn.Module) -> bool:
    """Whether a model is so small that all pictures and calls of a calibration count at the end."""
    return sum(parameter.numel() for parameter in model.parameters()) <= WHOLE_MODEL


def calibrated_ends(pipe: Any, calibration: Calibration, ends: Sequence[End], *, show: bool) -> EndTrajectory | None:
    """The adjoint of the sampler for the calibration's pictures, or the first of each setting for a large model.

    Returns:
        None where it cannot be had, of which a warning tells.
    """
    whole = is_whole(denoiser(pipe))
    calls, settings = len(calibration.calls), len(calibration.settings)
    count = calls if whole else min(calls, LARGE_PICTURES)
    pictures = [sample_number(call, setting, settings) for setting in range(settings) for call in range(count)]
    try:
        found = sampler_adjoint(
            pipe,
            calibration.trajectory,
            calibration.calls,
            calibration.settings,
            pictures,
            ends=ends,
            probes=PROBES if whole else LARGE_PROBES,
            show=show,
        )
    except NoAdjoint as reason:
        own = type(getattr(whole_pipeline(pipe), "scheduler", None)).__name__
        logger.warning(
            "noise at the end of the trajectory is not predicted: of this %s with a %s, %s; layers are chosen by their "
            "noise at the model's output, averaged over steps",
            type(whole_pipeline(pipe)).__name__,
            " or ".join(dict.fromkeys(one.scheduler or own for one in calibration.settings)),
            reason,
        )
        return None
    return found if whole else found.thinned(LARGE_CALLS)


class Waiting:
    """Candidates of layers that wait for each other, since all of them are followed to the end in one replay."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[nn.Module, list[LayerCandidate], Mapping[str, Judge]]] = {}
        self.bytes = 0  # of the quantized layers that are held

    def add(self, name: str, layer: nn.Module, candidates: list[LayerCandidate], judges: Mapping[str, Judge]) -> None:
        """Add the candidates of a layer, with what judges each scheme's."""
        self._layers[name] = layer, candidates, judges
        held = {id(t): t for judge in judges.values() for of in judge.layers for t in (*of.buffers(), *of.parameters())}
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def followed(self, model: nn.Module, ends: EndTrajectory) -> Iterator[tuple[str, list[LayerCandidate]]]:
        """Each layer that waits, with its candidates and their noise at the end; none waits any more."""
        probes, waiting = len(ends.ends) * ends.probes, self._layers
        self._layers, self.bytes = {}, 0
        for chunk in chunks_of_layers(model, [ends.calls[0].call], probes, list(waiting)) if waiting else ():
            sums = {name: LayerEndNoise(waiting[name][0], ends, waiting[name][2]) for name in chunk}
            for name, record in end_records(model, ends, chunk):
                sums[name].add(record)
            for name in chunk:
                _, candidates, _ = waiting.pop(name)
                noise = sums.pop(name).noise()
                yield name, [replace(candidate, end=noise[str(candidate.scheme)]) for candidate in candidates]
