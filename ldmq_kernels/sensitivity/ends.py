"""How much of the end of the trajectory an analysis looks at, and the noise there of the candidates of many layers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ldmq_kernels.calibration.adjoint import (
    LARGE_CALLS,
    End,
    EndTrajectory,
    is_whole,
    pictures_that_count,
    sampler_adjoint,
    walk,
)
from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.probes import EndRecord, chunks_with_room, end_records, records_of
from ldmq_kernels.calibration.redrawn import NoAdjoint
from ldmq_kernels.calibration.settings import Settings
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.end_noise import LayerEndNoise
from ldmq_kernels.sensitivity.trials import Judge

logger = logging.getLogger(__name__)

PICTURES = 8  # of a small model at each setting; what others are like is told by plans that are drawn
PROBES = 8  # at each end; with fewer, sizes scatter more by the chance of which probes are drawn
LARGE_PROBES = 1  # of a larger model
CALLS_AT_ONCE = 4  # whose errors are computed together where they fit the memory: a product for each costs more


class Following:
    """Candidates of layers, followed to the end of the trajectory; many wait for each other and go in one replay.

    Args:
        pipe: the pipeline that was calibrated.
        ends: where noise counts.
    """

    def __init__(self, pipe: Any, calibration: Calibration, ends: Sequence[End], *, show: bool) -> None:
        self._pipe, self._calibration, self._show = pipe, calibration, show
        self._model = denoiser(pipe)
        self._is_whole = is_whole(self._model)
        drawn = len(calibration.calls), len(calibration.settings)
        self._pictures = pictures_that_count(self._model, *drawn, most=PICTURES)
        self._empty = EndTrajectory.without_calls(self._pictures, ends, PROBES if self._is_whole else LARGE_PROBES)
        self._waiting: dict[str, tuple[list[LayerCandidate], Mapping[str, Judge]]] = {}
        self.bytes = 0  # of the quantized layers that wait

    def add(self, name: str, candidates: list[LayerCandidate], judges: Mapping[str, Judge]) -> None:
        """Have the candidates of a layer wait, with what judges each scheme's."""
        self._waiting[name] = candidates, judges
        held = {id(t): t for judge in judges.values() for of in judge.layers for t in (*of.buffers(), *of.parameters())}
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def followed(self) -> Iterator[tuple[str, list[LayerCandidate]]]:
        """Each layer that waits, with its candidates and their noise at the end; none waits any more.

        Where gradients do not run to the end, of which a warning tells, candidates are as they were.
        """
        waiting, self._waiting, self.bytes = self._waiting, {}, 0
        ends, first = self._empty, self._calibration.trajectory.calls[0]
        probes = len(ends.ends) * ends.probes
        for chunk, room in chunks_with_room(self._model, first, probes, list(waiting)) if waiting else ():
            sums = {name: LayerEndNoise(ends, waiting[name][1], min(room, CALLS_AT_ONCE)) for name in chunk}
            try:
                for name, record in self._records(chunk):
                    sums[name].add(record)
            except NoAdjoint as reason:
                self._tell(reason)
                yield from ((name, candidates) for name, (candidates, _) in waiting.items())
                return
            for name in chunk:
                candidates, _ = waiting.pop(name)
                noise = sums.pop(name).noise()
                yield name, [replace(candidate, end=noise[str(candidate.scheme)]) for candidate in candidates]

    def _records(self, layers: Sequence[str]) -> Iterator[tuple[str, EndRecord]]:
        """Of a small model from the walk to the beginning itself, of a large one from some of the calls after it."""
        if not self._is_whole:
            yield from end_records(self._model, self.some_calls, layers)
            return
        for of_call, ran in walk(self._pipe, *self._walked(), self._empty, layers=layers, show=self._show):
            yield from records_of(of_call, ran)

    def _walked(self) -> tuple[Trajectory, Sequence[Call], Settings]:
        return self._calibration.trajectory, self._calibration.calls, self._calibration.settings

    @functools.cached_property
    def some_calls(self) -> EndTrajectory:
        """The calls of a large model that stand for all."""
        empty = self._empty
        found = sampler_adjoint(
            self._pipe, *self._walked(), self._pictures, ends=empty.ends, probes=empty.probes, show=self._show
        )
        for end in empty.ends:
            empty.scale[end].update(found.scale[end])
        return found.thinned(LARGE_CALLS)

    def _tell(self, reason: NoAdjoint) -> None:
        own = type(getattr(whole_pipeline(self._pipe), "scheduler", None)).__name__
        logger.warning(
            "noise at the end of the trajectory is not predicted: of this %s with a %s, %s; layers are chosen by their "
            "noise at the model's output, averaged over steps",
            type(whole_pipeline(self._pipe)).__name__,
            " or ".join(dict.fromkeys(one.scheduler or own for one in self._calibration.settings)),
            reason,
        )
