"""How far pictures are off that a quantized model draws by the pipeline's own call, one by one."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ldmq_kernels.calibration.decoding import decoded
from ldmq_kernels.calibration.denoisers import whole_pipeline
from ldmq_kernels.calibration.drawings import LATENT as LATENTS
from ldmq_kernels.calibration.drawings import Call, drawings
from ldmq_kernels.calibration.settings import Settings, setting_of
from ldmq_kernels.numerics.sqnr import to_db
from ldmq_kernels.planning.assignment import MOST_DB
from ldmq_kernels.planning.target import MEASURES, Measure
from ldmq_kernels.progress import track

WORST = 10  # per cent
PICTURES = 8  # that verify a plan at least: what is held out is drawn with further seeds
LEAST_PICTURES = 3  # that tell how far a mean is known
LARGE_PICTURES = 4  # of a large model, whose every picture takes minutes on a CPU


@dataclass(frozen=True)
class Spread:
    """Decibels over pictures: their mean, their median, and what all but the worst tenth of them reach."""

    mean: float
    median: float
    worst_tenth: float

    @classmethod
    def of(cls, decibels: Sequence[float]) -> Spread:
        """The spread of some."""
        worst = float(np.percentile(decibels, WORST))
        return cls(statistics.fmean(decibels), statistics.median(decibels), worst)


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures against the float ones.

    Attributes:
        by_picture: for each measure the decibels of each picture, 200 where nothing differs: "latent" is the SQNR of
            its final latent, "psnr" its PSNR against a peak of 1, which is there where latents could be decoded.
        samples: of each picture the number of the sample that it was drawn for.
    """

    by_picture: Mapping[Measure, tuple[float, ...]]
    samples: tuple[int, ...]

    def mean_db(self, measure: Measure) -> float:
        """The mean over pictures."""
        return statistics.fmean(self.by_picture[measure])

    @property
    def spread(self) -> dict[Measure, Spread]:
        """Over pictures, of each measure."""
        return {measure: Spread.of(decibels) for measure, decibels in self.by_picture.items()}

    def by_setting(self, settings: int) -> list[Drawn]:
        """The pictures of each of several settings that they were drawn at."""
        return [self._taken([setting_of(s, settings) == setting for s in self.samples]) for setting in range(settings)]

    def of_samples(self, samples: Collection[int]) -> Drawn:
        """The pictures of some samples."""
        return self._taken([sample in samples for sample in self.samples])

    def _taken(self, mask: Sequence[bool]) -> Drawn:
        kept = {measure: tuple(itertools.compress(db, mask)) for measure, db in self.by_picture.items()}
        return Drawn(kept, tuple(itertools.compress(self.samples, mask)))


def together(parts: Sequence[Drawn]) -> Drawn:
    """Pictures that were drawn apart."""
    by_picture = {m: sum((part.by_picture[m] for part in parts), ()) for m in parts[0].by_picture}
    return Drawn(by_picture, sum((part.samples for part in parts), ()))


class FloatEnds:
    """What a pipeline draws in float, to compare with.

    Args:
        pipe: the pipeline, still in full precision.
        calls: what is drawn at each of the settings, seeds counting up from `settings.seed`.
        outputs: the final latents of each run, where they were drawn before.

    Raises:
        ValueError: the pipeline gives no latents.
    """

    @torch.no_grad()
    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        settings: Settings,
        outputs: Sequence[Tensor] | None = None,
        *,
        show: bool = False,
    ) -> None:
        self._pipe, self._runs = pipe, drawings(calls, settings)
        self._vae = getattr(whole_pipeline(pipe), "vae", None)
        if outputs is None:
            runs = track(self._runs, "float pictures to compare with", len(self._runs), show=show)
            outputs = [self._latents(run) for run in runs]
        self._latents_of_runs = list(outputs)
        decodes = self._vae is not None and all(latents.dim() == 4 for latents in self._latents_of_runs)
        self._pictures = [self._decoded(latents) for latents in self._latents_of_runs] if decodes else []

    def _latents(self, run: Any) -> Tensor:
        latents = run.run(self._pipe, LATENTS)
        if latents is None:
            raise ValueError(
                f"{type(whole_pipeline(self._pipe)).__name__} gives no latents to compare: plan by the SQNR of its "
                "model's output, target_sqnr_db"
            )
        return latents

    def _decoded(self, latents: Tensor) -> Tensor:
        return torch.cat([decoded(self._vae, latent) for latent in latents.split(1)])

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What pictures can be compared by."""
        return ("latent", "psnr") if self._pictures else ("latent",)

    @torch.no_grad()
    def compare(self, samples: Collection[int] | None = None) -> Drawn:
        """Draw with the pipeline as it is now, and compare.

        Args:
            samples: numbers of samples; all of them if None.

        Raises:
            ValueError: a latent is not finite.
        """
        found: dict[Measure, list[float]] = {measure: [] for measure in self.measures}
        drawn_for: list[int] = []
        for index, run in enumerate(self._runs):
            taken = [place for place, sample in enumerate(run.samples) if samples is None or sample in samples]
            if not taken:
                continue
            rows = [row for row in range(len(self._latents_of_runs[index])) if row % len(run.samples) in taken]
            drawn_for += [run.samples[row % len(run.samples)] for row in rows]
            part = run.of_samples(self._pipe, [run.samples[place] for place in taken])
            latents = self._latents(run)[rows] if part is None else self._latents(part)
            exact = self._latents_of_runs[index][rows]
            error = latents.double() - exact.double()
            power = error.flatten(1).square().sum(1) / exact.double().flatten(1).square().sum(1)
            if not bool(torch.isfinite(power).all()):
                raise ValueError(f"the quantized model draws latents that are not finite of {', '.join(run.names)}")
            found["latent"] += [_db(value) for value in power.tolist()]
            if self._pictures:
                off = self._decoded(latents).double() - self._pictures[index][rows].double()
                found["psnr"] += [_db(value) for value in off.square().flatten(1).mean(1).tolist()]
        return Drawn({measure: tuple(decibels) for measure, decibels in found.items()}, tuple(drawn_for))


def _db(power: float) -> float:
    return min(MOST_DB, to_db(power)) if power > 0 else MOST_DB


@dataclass(frozen=True)
class EndCheck:
    """What plans for the end of the trajectory are judged by.

    Attributes:
        measure: "latent" or "psnr".
        held_out: what verifies them.
        calibrated: what was calibrated on, by which the prediction is corrected for what layers do together.
    """

    measure: Measure
    held_out: FloatEnds
    calibrated: FloatEnds


def with_more_seeds(calls: Sequence[Call], pictures: int = PICTURES) -> list[Call]:
    """The calls again and again, until there are enough pictures to tell of the worst of them."""
    times = -(-pictures // len(calls))
    return list(calls) * times


def mean_within_db(decibels: Sequence[float]) -> float | None:
    """How far the mean over all pictures may be from that of a few: half of its 95 % interval, by Student's t.

    Returns:
        None of fewer than three pictures, which tell too little of how pictures differ.
    """
    count = len(decibels)
    if count < LEAST_PICTURES:
        return None
    return float(special.stdtrit(count - 1, 0.975)) * statistics.stdev(decibels) / count**0.5


def spread_as_measured(drawn: Drawn) -> dict[str, float]:
    """What a plan file says of drawn pictures."""
    found: dict[str, float] = {"held_out_pictures": len(next(iter(drawn.by_picture.values())))}
    for measure, spread in drawn.spread.items():
        found[f"held_out_{measure}_db"] = round(spread.mean, 3)
        found[f"held_out_{measure}_db_median"] = round(spread.median, 3)
        found[f"held_out_{measure}_db_worst_tenth"] = round(spread.worst_tenth, 3)
    return found


def spread_in_words(measured: Mapping[str, Any]) -> str:
    """The same as a plan file has it, after other words; nothing where no pictures were drawn."""
    words = ""
    for measure, of in MEASURES.items():
        name = f"held_out_{measure}_db"
        if f"{name}_median" in measured:
            words += (
                f"; {of} {measured[name]:.2f} dB in the mean of {measured['held_out_pictures']}, "
                f"{measured[f'{name}_median']:.2f} dB in the median, {measured[f'{name}_worst_tenth']:.2f} dB for the "
                "worst tenth"
            )
    return words
