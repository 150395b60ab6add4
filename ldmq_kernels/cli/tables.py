"""The tables that `ldmq analyze` leaves: sqnr.csv with every SQNR, blocks.csv with noise from block to block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldmq_kernels.calibration.drawings import LATENT, Call, draw
from ldmq_kernels.calibration.settings import Settings
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.files import write_csv
from ldmq_kernels.numerics.sqnr import relative_noise_power
from ldmq_kernels.planning.session import PlanResult
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.report.measure import PicturePairs
from ldmq_kernels.sensitivity.analysis import Analysis, analysed_part, quantized_as
from ldmq_kernels.sensitivity.output_noise import finite_db
from ldmq_kernels.sensitivity.propagation import BlockNoise, propagation
from ldmq_kernels.sensitivity.table import PLAN, Row, rows_of_analysis, rows_of_noise, rows_of_pictures, write_rows

COLUMNS = ("block", "step", "scheme", "input_db", "own_db", "propagated_db", "total_db", "amplification")


def rows_of_plan(
    pipe: Any, calls: Sequence[Call], settings: Settings, result: PlanResult, held_out: Trajectory
) -> Iterator[Row]:
    """The whole plan: at the UNet's output, of the denoised latents, of the pictures.

    Args:
        pipe: quantized by the plan.
        calls, settings: of the held-out trajectory.
    """
    yield from rows_of_noise("unet", "", PLAN, result.held_out, held_out.timesteps())
    latents = draw(pipe, calls, settings, LATENT)
    runs = zip(held_out.outputs, latents, strict=True)
    yield from rows_of_pictures("latent", [db for exact, test in runs for db in _by_picture(exact, test)])


def rows_of_pairs(pairs: PicturePairs) -> Iterator[Row]:
    """SQNR of decoded pictures, in [0, 1]."""
    yield from rows_of_pictures("image", _by_picture(pairs.before, pairs.after))


def _by_picture(exact: Any, test: Any) -> list[float]:
    return [finite_db(relative_noise_power(a, b)) for a, b in zip(exact, test.to(exact.device), strict=True)]


def write_sqnr(path: Path, analysis: Analysis, plan_rows: Sequence[Row]) -> int:
    """sqnr.csv, see `sensitivity.table`; the number of rows."""
    return write_rows(path, [*rows_of_analysis(analysis), *plan_rows])


def noise_of_blocks(model: Any, analysis: Analysis, *, show: bool) -> tuple[str, list[BlockNoise]]:
    """The first scheme of the analysis in all layers that have it, measured block by block for one prompt a step."""
    scheme = next(str(c.scheme) for of_layer in analysis.candidates.values() for c in of_layer)
    layers = quantizable_layers(model)
    quantized = {
        name: quantized_as(name, layers[name], candidate)
        for name in analysis.candidates
        if (candidate := analysis.candidate(name, scheme)) is not None
    }
    trajectory = analysed_part(analysis.calibration.trajectory, analysis.steps, 1)
    return scheme, propagation(model, quantized, trajectory, show=show)


def write_blocks(path: Path, scheme: str, noises: Sequence[BlockNoise]) -> None:
    """blocks.csv: relative noise as SQNR in dB, whole or not at all."""
    rows = []
    for entry in noises:
        powers = (entry.input_noise, entry.own_noise, entry.propagated_noise, entry.total_noise)
        numbers = [f"{finite_db(power):.2f}" for power in powers]
        rows.append((entry.block, entry.step, scheme, *numbers, f"{entry.amplification:.3f}"))
    write_csv(path, COLUMNS, rows)
