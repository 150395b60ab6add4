"""SQNR as one tidy table: one row a measurement, every way of cutting it a column.

| column | meaning |
|---|---|
| place | "layer": a layer's own output, float input; "unet": the UNet's output; "latent", "image": at the end |
| name | the layer or block that alone is quantized; "" where all of the plan is |
| scheme | of that layer; "plan" where all of the plan is quantized |
| step, timestep | the sampling step from 0, the noisiest; empty for the mean over steps of decibels |
| prompt | its index in the calibration, or in the held-out set of a plan; empty where prompts are pooled |
| part | "unconditional", "conditional" and "guided" of classifier-free guidance; "pooled" before guidance |
| noise_power, sqnr_db | relative noise power, and its inverse in decibels; of an image against a peak of 1 |
| estimated | 1 where backward probes say it, 0 where it was run |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ldmq_kernels.calibration.adjoint import PICTURE
from ldmq_kernels.files import write_csv
from ldmq_kernels.numerics.sqnr import from_db
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.candidates import LayerCandidate
from ldmq_kernels.sensitivity.output_noise import StepNoise, finite_db

POOLED = "pooled"
PLAN = "plan"


@dataclass(frozen=True)
class Row:
    """One measurement; None is an empty field."""

    place: str
    name: str
    scheme: str
    step: int | None
    timestep: float | None
    prompt: int | None
    part: str
    noise_power: float
    sqnr_db: float
    estimated: int = 0


def rows_of_noise(
    place: str, name: str, scheme: str, noise: StepNoise, timesteps: list[float], *, estimated: bool = False
) -> Iterator[Row]:
    """A row for each step, the mean over steps, and each prompt and half at each step where they were kept."""
    flag = int(estimated)
    for step, power in noise.by_step.items():
        yield Row(place, name, scheme, step, timesteps[step], None, POOLED, power, finite_db(power), flag)
    mean = sum(finite_db(power) for power in noise.by_step.values()) / len(noise.by_step)
    yield Row(place, name, scheme, None, None, None, POOLED, from_db(mean), mean, flag)
    for s in noise.samples:
        power = s.noise / s.signal if s.signal > 0 else 0.0
        yield Row(place, name, scheme, s.step, timesteps[s.step], s.prompt, s.part, power, finite_db(power), flag)


def rows_of_analysis(analysis: Analysis) -> Iterator[Row]:
    """Every layer's own noise, every layer's and block's at the UNet's output, and at the end where that is known."""
    timesteps = analysis.calibration.trajectory.timesteps()
    for name, candidates in analysis.candidates.items():
        for c in candidates:
            yield Row("layer", name, str(c.scheme), None, None, None, POOLED, c.noise, finite_db(c.noise))
            yield from _rows_of_end(name, c)
    for key, noise in analysis.output.items():
        yield from rows_of_noise("unet", *key, noise, timesteps, estimated=key not in analysis.exact)
    for block, noise in analysis.blocks.items():
        yield from rows_of_noise("unet", *block, noise, timesteps, estimated=not noise.samples)


def _rows_of_end(name: str, candidate: LayerCandidate) -> Iterator[Row]:
    """A row for each picture's latent or image, as the adjoint of the sampler estimates it."""
    for end, by_picture in {} if candidate.end is None else candidate.end.by_picture.items():
        place = "image" if end == PICTURE else end
        for prompt, power in by_picture.items():
            yield Row(place, name, str(candidate.scheme), None, None, prompt, "whole", power, finite_db(power), 1)


def rows_of_pictures(place: str, decibels: Iterable[float]) -> Iterator[Row]:
    """A row for each prompt's latent or image, drawn with the whole plan."""
    for prompt, value in enumerate(decibels):
        yield Row(place, "", PLAN, None, None, prompt, "whole", from_db(value), value)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write the table as CSV, whole or not at all; the number of rows."""
    lines = [[f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)] for row in rows]
    write_csv(path, [field.name for field in fields(Row)], lines)
    return len(lines)
