"""Hessians for GPTQ rounding, from a pipeline's own inputs: a few layers at a time, as memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldmq_kernels.calibration.adjoint import EndTrajectory
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.end_hessian import end_hessian_bytes, end_hessians, ends_to_round_by
from ldmq_kernels.calibration.hessian import hessian_bytes, input_hessians
from ldmq_kernels.calibration.redrawn import NoAdjoint
from ldmq_kernels.calibration.settings import SamplingSettings, of_record
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, PlanError
from ldmq_kernels.progress import track

BYTES_AT_ONCE = 2 << 30


class RecordedHessians:
    """The Hessians of one layer after the other; each chunk of layers is one pass over the calibration.

    Layers that are rounded by the end of the trajectory take a pass with gradients beside it.

    Args:
        pipe: a full-precision pipeline.
        plan: the plan whose calibration is run again, and whose layers with gptq rounding are asked for in their order.
        calls: what the plan was made from, of which its file holds prompts alone; those that it verified on come last
            and are not drawn.
        bytes_at_once: the most bytes of Hessians in memory; a layer that needs more comes alone.

    Raises:
        PlanError: the plan does not fit, holds no calibration texts and was made from more calls than are given, or
            rounds by the end of a trajectory that gradients do not run through.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        calls: Sequence[Call] = (),
        *,
        bytes_at_once: int = BYTES_AT_ONCE,
        show: bool = False,
    ) -> None:
        self._model = denoiser(pipe)
        layers = quantizable_layers(self._model)
        rounded = {n: c.rounding for n, c in plan.layers(self._model).items() if c.scheme.quantizes and c.needs_inputs}
        names = list(rounded)
        drawn: Sequence[Call] = plan.calibration.get("texts") or calls[: plan.calibration.get("calls", 0)]
        if "calls" in plan.calibration and len(drawn) < plan.calibration["calls"]:
            raise PlanError(
                f"the plan rounds {names[0]} by GPTQ, which takes again the {plan.calibration['calls']} calls that it "
                f"was made from, and has {len(drawn)}: give ldmq.quantize the same calls or forward_loop as ldmq.plan"
            )
        if not drawn:
            raise PlanError(
                f"the plan rounds {names[0]} by GPTQ, but holds no calibration texts to run again: plan again with "
                "`ldmq plan`, or set the rounding to nearest in its details"
            )
        settings = of_record(plan.calibration)
        self._trajectory = record_trajectory(pipe, drawn, settings, show=show)
        self._to_the_end = {name for name, rounding in rounded.items() if rounding == "gptq-end"}
        ends = self._ends = self._adjoint(pipe, drawn, settings, show) if self._to_the_end else None
        sizes = {
            name: hessian_bytes(layers[name])
            if ends is None or name not in self._to_the_end
            else end_hessian_bytes(layers[name], ends)
            for name in names
        }
        chunks = list(chunks_within(names, sizes, bytes_at_once))
        self._chunks = iter(track(chunks, "inputs for GPTQ rounding", len(chunks), show=show))
        self._held: dict[str, Hessian] = {}

    def _adjoint(
        self, pipe: Any, drawn: Sequence[Call], settings: Sequence[SamplingSettings], show: bool
    ) -> EndTrajectory:
        try:
            return ends_to_round_by(pipe, self._trajectory, drawn, settings, show=show)
        except NoAdjoint as reason:
            raise PlanError(
                f"the plan rounds {min(self._to_the_end)} by the end of the trajectory, which has no gradient: "
                f"{reason}: round by the layers' inputs alone, `plan.with_gptq(model)`"
            ) from None

    def __call__(self, name: str) -> Hessian:
        """The Hessian of the next layer, which is forgotten then."""
        while name not in self._held:
            self._held = {}  # before the next ones are made
            chunk = next(self._chunks)
            plain = input_hessians(self._model, self._trajectory, chunk)
            to_the_end = {n: plain.pop(n) for n in chunk if n in self._to_the_end}
            self._held = dict(plain)
            if self._ends is not None and to_the_end:
                self._held |= end_hessians(self._model, self._ends, to_the_end)
        return self._held.pop(name)
