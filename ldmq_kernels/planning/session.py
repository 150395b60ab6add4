"""One analysis, solved for targets and verified: what a single plan and a front of plans share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.planning.build import build_plan
from ldmq_kernels.planning.choice import MOST_DB, SQNR, Choice, Chooser, step_weights
from ldmq_kernels.planning.cost import weight_bytes
from ldmq_kernels.planning.options import make_options, restricted, sensitive_blocks
from ldmq_kernels.planning.plan import Plan, PlanError, quantizable_layers
from ldmq_kernels.planning.target import Target
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.planning.trial import Trials
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import StepNoise

logger = logging.getLogger(__name__)

RUNS = 8  # of whole plans on held-out prompts, for one target
MARGIN_DB = 0.2  # above the target, where a plan is asked for again
ENOUGH_DB = 0.7  # above the target that need not be saved
FINEST_DB = 0.05  # between a request that reaches the target and one that does not
LEAST_SAVED = 1e-3  # of the cost, below which a smaller plan is not worth another run


@dataclass(frozen=True)
class PlanResult:
    """A plan with what it was made from, for the report."""

    plan: Plan
    analysis: Analysis
    held_out: StepNoise
    predicted_db: float


@dataclass(frozen=True)
class Verified:
    """A choice, and what it does along the held-out trajectory."""

    choice: Choice
    noise: StepNoise

    @property
    def db(self) -> float:
        """Mean over steps, 200 dB for no noise at all."""
        return mean_db(self.noise)


def mean_db(noise: StepNoise) -> float:
    """SQNR in dB as the mean over steps, with a step without noise as 200 dB."""
    return sum(min(MOST_DB, db) for db in noise.db_by_step.values()) / len(noise.by_step)


class Session:
    """Plans from one analysis.

    Args:
        model: the float model that was analysed.
        held_out: its trajectory on prompts and seeds that were not calibrated on.
        formats: names of formats or schemes; "fp16" lets layers stay as they are.
        signals: what counts as noise: "sqnr", and "ssim" if the analysis has it. See `choice.Chooser`.
        times: of the layers on the device that the model will run on.
        hybrid: the paper's global step: the blocks that make this share of the noise start with higher precision
            (w8a16, fp16 or dynamic w8a8), whatever they cost; 0 leaves it to the knapsack, which by its own
            measure is never worse.
    """

    def __init__(
        self,
        model: nn.Module,
        analysis: Analysis,
        held_out: Trajectory,
        formats: Sequence[str],
        *,
        signals: Sequence[str] = (SQNR,),
        times: LayerTimes | None = None,
        hybrid: float = 0.0,
    ) -> None:
        self.model, self.analysis, self.held_out, self.formats = model, analysis, held_out, list(formats)
        self.times = times
        self.signals = [name for name in signals if name != SQNR]
        self.sensitive = sensitive_blocks(model, analysis, hybrid) if hybrid else []
        options = restricted(make_options(model, analysis, formats, signals, times), self.sensitive)
        weights = step_weights(analysis.steps, analysis.calibration.trajectory.steps)
        self.chooser = Chooser(options, weights, signals, rest_milliseconds=None if times is None else times.rest)
        self._trials = Trials(model, analysis)
        self._known: dict[tuple[tuple[str, str], ...], Verified] = {}

    # -- runs ----------------------------------------------------------------------------------------------

    def verified(self, choice: Choice) -> Verified:
        """The choice run along the held-out trajectory; once for each choice of schemes."""
        key = tuple(choice.schemes.items())
        if key not in self._known:
            self._known[key] = Verified(choice, self._trials.noise(choice.schemes, self.held_out))
        return self._known[key]

    def interaction_db(self, choice: Choice) -> float:
        """How far the sum of the layers' noise lies above what they do together, along the calibration's trajectory.

        Positive where the layers make more noise together than their sum.
        """
        together = mean_db(self._trials.noise(choice.schemes, self.analysis.calibration.trajectory))
        return 0.0 if together >= MOST_DB else choice.sum_db - together

    # -- plans ---------------------------------------------------------------------------------------------

    def result(self, verified: Verified, interaction_db: float, target: Target) -> PlanResult:
        """The plan file's content, with what was predicted and measured."""
        choice = verified.choice
        plan = build_plan(
            self.model,
            self.analysis,
            choice.schemes,
            target,
            self.formats,
            sensitive=self.sensitive,
            times=self.times,
        )
        predicted = min(MOST_DB, choice.sum_db - interaction_db)
        plan.measured = {
            "held_out_sqnr_db": round(verified.db, 3),
            "predicted_sqnr_db": round(predicted, 3),
            "interaction_db": round(interaction_db, 3),
            "weight_bytes": choice.bytes,
            "weight_bytes_fp16": sum(weight_bytes(m, FLOAT) for m in quantizable_layers(self.model).values()),
        }
        if self.times is not None:
            plan.measured["milliseconds"] = round(self.times.rest + choice.milliseconds, 4)
            plan.measured["milliseconds_float"] = round(self.times.all_float, 4)
        plan.measured |= {f"predicted_{name}_loss": round(choice.signal(name), 6) for name in self.signals}
        return PlanResult(plan, self.analysis, verified.noise, predicted)

    def plan(self, target: Target) -> PlanResult:
        """The verified plan for a target.

        Raises:
            PlanError: the target cannot be met; the text says what can.
        """
        first = self.chooser.choose(target)
        interaction = self.interaction_db(first)
        if target.sqnr_db is None:
            return self.result(self.verified(first), interaction, target)
        return self.result(self._reach(target, target.sqnr_db, interaction), interaction, target)

    def _reach(self, target: Target, wanted: float, interaction: float) -> Verified:
        """The cheapest choice found that reaches the target when it is run.

        Requests are in dB of the layers' sum. Each run tells by how much a request was too low or too high, and
        they close in from both sides.
        """
        most = self.chooser.best(target).sum_db
        low, high = -MOST_DB, most + FINEST_DB  # requests that fail, and that reach it
        asked = min(wanted + interaction, most)
        reached: list[Verified] = []
        best_db = -MOST_DB
        for _ in range(RUNS):
            run = self.verified(self.chooser.choose(target, asked))
            best_db = max(best_db, run.db)
            logger.info("asked for %.2f dB of the sum, the plan has %.2f dB of %.2f", asked, run.db, wanted)
            if run.db >= wanted:
                saves = self._saves(reached, run, target)
                reached.append(run)
                high = min(high, asked)
                if run.db - wanted <= ENOUGH_DB or not saves:
                    break
            else:
                low = max(low, asked)
                if asked >= most:
                    break
            step = asked + wanted + MARGIN_DB - run.db
            asked = step if low < step < high else min((low + high) / 2, most) if low > -MOST_DB else high - ENOUGH_DB
            if high - low < FINEST_DB:
                break
        if not reached:
            raise PlanError(
                f"{wanted} dB is not reached on held-out prompts: the best plan of {len(self._known)} that were run "
                f"has {best_db:.2f} dB; lower the target, allow more precise formats, or calibrate on more prompts"
            )
        return min(reached, key=lambda run: self.chooser.cost(run.choice, target))

    def _saves(self, reached: Sequence[Verified], run: Verified, target: Target) -> bool:
        """Whether asking for less still makes plans smaller."""
        if not reached:
            return True
        best = min(self.chooser.cost(earlier.choice, target) for earlier in reached)
        return self.chooser.cost(run.choice, target) < best * (1 - LEAST_SAVED)
