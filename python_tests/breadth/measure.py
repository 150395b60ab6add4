"""A row measured: its pipeline planned through its own calls, quantized, and called again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ldmq_kernels as ldmq
from ldmq_kernels.calibration.autoencoders import is_autoencoder
from ldmq_kernels.calibration.denoisers import chosen, denoiser
from ldmq_kernels.calibration.drawings import LATENT, PICTURES, draw
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import UNetCall, record_trajectory
from ldmq_kernels.conversion import summarize
from ldmq_kernels.conversion.summary import Summary
from ldmq_kernels.numerics.sqnr import relative_noise_power
from ldmq_kernels.planning.session import mean_db
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.output_noise import finite_db, output_noise
from python_tests.breadth.operations import share_in_8_bits
from python_tests.breadth.rows import Row

OTHER_SEED = 500  # of the calls that are drawn again


@dataclass(frozen=True)
class Measured:
    """What came of a row.

    Attributes:
        called_db: SQNR of the quantized model at the user's own calls, from another seed, mean over steps.
        drawn_db: SQNR of what the pipeline draws there.
        share_in_8_bits: of the multiply-accumulates of a call.
        planning_seconds: processor time of planning.
        not_run: layers that no call runs.
        is_reloaded: whether the model, saved and loaded again, gives the same bits; of a row whose model has what is
            not saved with it, that is not asked.
    """

    plan: Plan
    summary: Summary
    called_db: float
    drawn_db: float
    share_in_8_bits: float
    planning_seconds: float
    not_run: frozenset[str]
    is_reloaded: bool

    @property
    def held_out_db(self) -> float:
        """SQNR that the plan says."""
        return float(self.plan.measured["held_out_sqnr_db"])


@torch.no_grad()
def measured(row: Row, target_db: float, formats: Sequence[str], calls: int = 3) -> Measured:
    """Plan a row's pipeline, quantize it, and draw the same with both.

    Args:
        calls: how many of the row's calls are used.
    """
    pipe, every = row.build()
    given: list[Mapping[str, Any]] = every[:calls]
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    start = time.process_time()
    plan = ldmq.plan(
        pipe, calls=given, part=row.part, target_sqnr_db=target_db, formats=formats, seed=0, show_progress=False
    )
    planning_seconds = time.process_time() - start
    model = denoiser(chosen(pipe, row.part))
    settings = SamplingSettings(None, None, OTHER_SEED)
    not_run = set(quantizable_layers(model))
    handles = [
        layer.register_forward_hook(lambda *_, name=name: not_run.discard(name))
        for name, layer in quantizable_layers(model).items()
    ]
    exact = record_trajectory(chosen(pipe, row.part), given, settings)
    for handle in handles:
        handle.remove()
    share = share_in_8_bits(model, exact.calls[0], plan)
    ldmq.quantize(pipe, plan, calls=given, show_progress=False)
    noise = output_noise(model, exact)
    drawn = draw(pipe, given, settings, PICTURES if is_autoencoder(model) else LATENT)
    power = sum(relative_noise_power(a, b) for a, b in zip(exact.outputs, drawn, strict=True)) / len(drawn)
    same = not row.is_saved_whole or _is_reloaded(model, exact.calls[0])
    return Measured(
        plan=plan,
        summary=summarize(model),
        called_db=mean_db(noise),
        drawn_db=finite_db(power),
        share_in_8_bits=share,
        planning_seconds=planning_seconds,
        not_run=frozenset(not_run),
        is_reloaded=same,
    )


def _is_reloaded(model: Any, call: UNetCall) -> bool:
    """Whether a quantized model that is saved comes back as it was: with the same output in a call."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
        return torch.equal(call.run(again), call.run(model))
