"""Hessians for GPTQ rounding, from a pipeline's own inputs: a few layers at a time, as memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.hessian import hessian_bytes, input_hessians
from ldmq_kernels.calibration.settings import of_record
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, PlanError
from ldmq_kernels.progress import track

BYTES_AT_ONCE = 2 << 30


class RecordedHessians:
    """The Hessians of one layer after the other; each chunk of layers is one pass over the calibration.

    Args:
        pipe: a full-precision pipeline.
        plan: the plan whose calibration is run again, and whose layers with gptq rounding are asked for in their order.
        calls: what the plan was made from, of which its file holds prompts alone; those that it verified on come last
            and are not drawn.
        bytes_at_once: the most bytes of Hessians in memory; a layer that needs more comes alone.

    Raises:
        PlanError: the plan does not fit, or holds no calibration texts and was made from more calls than are given.
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
        names = [n for n, c in plan.layers(self._model).items() if c.scheme.quantizes and c.rounding == "gptq"]
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
        chunks = list(chunks_within(names, {name: hessian_bytes(layers[name]) for name in names}, bytes_at_once))
        self._trajectory = record_trajectory(pipe, drawn, of_record(plan.calibration), show=show)
        self._chunks = iter(track(chunks, "inputs for GPTQ rounding", len(chunks), show=show))
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """The Hessian of the next layer, (K, K) float32, which is forgotten then."""
        while name not in self._held:
            self._held = {}  # before the next ones are made
            self._held = input_hessians(self._model, self._trajectory, next(self._chunks))
        return self._held.pop(name)
