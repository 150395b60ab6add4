"""One analysis, solved for targets and verified: what a single plan and a Pareto front of plans share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ldmq_kernels.calibration.adjoint import is_whole
from ldmq_kernels.calibration.in_tiles import in_tiles
from ldmq_kernels.calibration.settings import recorded
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.planning.assignment import MOST_DB, SQNR, Assignment, Chooser
from ldmq_kernels.planning.build import build_plan
from ldmq_kernels.planning.drawn import Drawn, EndCheck, mean_within_db, spread_as_measured
from ldmq_kernels.planning.evaluate import PlanEvaluator
from ldmq_kernels.planning.options import make_options, noise_columns, restricted, sensitive_blocks
from ldmq_kernels.planning.target import MEASURES, Measure, Target
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.plans.cost import weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import Plan, PlanError
from ldmq_kernels.plans.weights import weights_record
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import StepNoise, by_setting
from ldmq_kernels.sensitivity.similarity import SSIM

logger = logging.getLogger(__name__)

RUNS = 8  # of whole plans on held-out prompts, for one target
MARGIN_DB = 0.2  # above the target, where a plan is asked for again
ENOUGH_DB = 0.7  # above the target that need not be saved
NEAREST = 0.1  # of the way between a request that fails and one that does not, that the next one keeps to both


@dataclass(frozen=True)
class PlanResult:
    """A plan with what it was made from, for the report."""

    plan: Plan
    analysis: Analysis
    held_out: StepNoise
    predicted_db: float


@dataclass(frozen=True)
class Verified:
    """An assignment, what is predicted of it in dB, and its noise along the held-out trajectory or its pictures."""

    assignment: Assignment
    predicted_db: float
    noise: StepNoise | None
    losses: dict[str, float] = field(default_factory=dict, compare=False)  # of the other signals, as measured
    drawn: Drawn | None = None
    measure: Measure = SQNR
    settings: int = 1  # that the held-out trajectory was drawn at

    @property
    def db_by_setting(self) -> list[float]:
        """The measure in dB at each of the settings: the mean over steps or drawn pictures, 200 dB for no noise."""
        if self.drawn is not None:
            return [drawn.mean_db(self.measure) for drawn in self.drawn.by_setting(self.settings)]
        assert self.noise is not None
        return [mean_db(noise) for noise in by_setting(self.noise, self.settings)]

    @property
    def db(self) -> float:
        """The measure in dB at the worst of the settings."""
        return min(self.db_by_setting)


def mean_db(noise: StepNoise) -> float:
    """SQNR in dB as the mean over steps, with a step without noise as 200 dB."""
    return sum(min(MOST_DB, db) for db in noise.db_by_step.values()) / len(noise.by_step)


class Session:
    """Plans from one analysis.

    Args:
        model: the float model that was analysed.
        held_out: the float trajectory on prompts and seeds that were not calibrated on.
        formats: names of formats or schemes; "fp16" lets layers stay as they are.
        signals: the kinds of noise that count: "sqnr", and "ssim" if the analysis has it. See `assignment.Chooser`.
        times: the layers' times on the device that the model will run on.
        hybrid: the paper's global step: the blocks that make this share of the noise start with higher precision
            (w8a16, fp16 or dynamic w8a8), whatever they cost; 0 leaves it to the knapsack, which by its own
            measure is never worse.
        verified_on: what the held-out trajectory was recorded on, in words; plans say it.
        part: the name of the model in its pipeline, which plans say where it is not the pipeline's first denoiser.
        ends: what plans for the latents or the pictures are judged by; None for plans for the UNet's output.
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
        verified_on: str = "",
        part: str | None = None,
        ends: EndCheck | None = None,
    ) -> None:
        self.model, self.analysis, self.held_out, self.formats = model, analysis, held_out, list(formats)
        self.times, self.verified_on, self.part = times, verified_on, part
        self.signals = [name for name in signals if name == SSIM]
        self.ends, self.measure = ends, SQNR if ends is None else ends.measure
        self.sensitive = sensitive_blocks(model, analysis, hybrid) if hybrid else []
        columns, kept, rest = noise_columns(analysis, self.measure), (SQNR, *self.signals), None
        self._pictures = columns.pictures
        options = restricted(model, make_options(model, analysis, formats, kept, times, columns), self.sensitive)
        if times is not None:
            rest = times.rest
        self.chooser = Chooser(options, columns.weights, kept, rest_milliseconds=rest)
        self._evaluator = PlanEvaluator(model, analysis)
        self._weights = weights_record(model)
        self._known: dict[tuple[tuple[str, str], ...], Verified] = {}
        self.interaction_db: float | None = None  # by which the layers together are noisier than their sum
        self._level_db = 0.0  # by which pictures that noise is known of are better than all of the calibration's
        self._within_db: float | None = None  # how far the mean over other pictures may be from the predicted one

    # -- runs ----------------------------------------------------------------------------------------------

    def predicted_db(self, assignment: Assignment) -> float:
        """SQNR as the calibration alone has it: the sum of the layers' noise, corrected for what they do together.

        The correction is measured once, by running the first assignment along the calibration's trajectory, or for
        the end of it by drawing the calibration's pictures: those that noise is known of say what layers do together,
        and all of them how good a picture is in the mean, which differs more from caption to caption than noise of a
        few tells. Of a large model, those that noise is known of alone are drawn. At the UNet's output there is no
        correction where GPTQ rounds a layer, which on the samples that it rounds for has less noise than on others;
        pictures of each half of the prompts are drawn with what it rounds for the other half.
        """
        if assignment.sum_db >= MOST_DB:
            return MOST_DB
        is_rounded = any(self._is_rounded_for_calibration(*key) for key in assignment.schemes.items())
        if self.ends is None and is_rounded:
            return assignment.sum_db
        if self.interaction_db is None:
            together = self._cross_validated_db(assignment)
            self.interaction_db = 0.0 if together >= MOST_DB else assignment.sum_db - together
        return min(MOST_DB, assignment.sum_db - self.interaction_db - self._level_db)

    def _cross_validated_db(self, assignment: Assignment) -> float:
        """Of the pictures that noise is known of; what all of the calibration's tell is kept on the way."""
        if self.ends is None:
            return mean_db(self._evaluator.cross_validated(assignment.schemes))
        samples = None if is_whole(self.model) else self._pictures
        drawn = self._evaluator.cross_validated_drawing(assignment.schemes, self.ends.calibrated, samples)
        known = drawn.of_samples(self._pictures or drawn.samples).mean_db(self.measure)
        self._level_db = known - drawn.mean_db(self.measure)
        self._within_db = mean_within_db(drawn.by_picture[self.measure])
        return known

    def _is_rounded_for_calibration(self, layer: str, scheme: str) -> bool:
        candidate = self.analysis.candidate(layer, scheme) if layer in self.analysis.candidates else None
        return candidate is not None and candidate.layer_plan.rounding == "gptq"

    def verified(self, assignment: Assignment) -> Verified:
        """Run an assignment along the held-out trajectory; each one once."""
        key = tuple(assignment.schemes.items())
        if key not in self._known:
            predicted = self.predicted_db(assignment)
            losses: dict[str, float] = {}
            if SSIM in self.signals and self.analysis.decoder is not None:
                decoder = self.analysis.decoder
                losses[SSIM] = self._evaluator.structural_noise(assignment.schemes, self.held_out, decoder)
            noise, drawn = None, None
            if self.ends is None:
                noise = self._evaluator.noise(assignment.schemes, self.held_out)
            else:
                drawn = self._evaluator.drawn(assignment.schemes, self.ends.held_out)
            settings = len(self.analysis.calibration.settings)
            self._known[key] = Verified(assignment, predicted, noise, losses, drawn, self.measure, settings)
        return self._known[key]

    # -- plans ---------------------------------------------------------------------------------------------

    def result(self, verified: Verified, target: Target) -> PlanResult:
        """The plan of a verified assignment, with the SQNR that was predicted and measured."""
        assignment, noise = verified.assignment, verified.noise
        if noise is None:
            noise = self._evaluator.noise(assignment.schemes, self.held_out)
        settings = self.analysis.calibration.settings
        plan = build_plan(
            self.model,
            self.analysis,
            assignment.schemes,
            target,
            self.formats,
            sensitive=self.sensitive,
            times=self.times,
            weights=self._weights,
        )
        if self.part is not None:
            plan.model["part"] = self.part
        plan.measured = {
            "held_out_sqnr_db": round(min(mean_db(one) for one in by_setting(noise, len(settings))), 3),
            f"predicted_{self.measure}_db": round(verified.predicted_db, 3),
            "interaction_db": round(self.interaction_db or 0.0, 3),
            "weight_bytes": assignment.bytes,
            "weight_bytes_fp16": sum(weight_bytes(m, FLOAT) for m in quantizable_layers(self.model).values()),
        }
        if self._within_db is not None:
            plan.measured[f"predicted_{self.measure}_db_within"] = round(self._within_db, 3)
        if verified.drawn is not None:
            plan.measured |= spread_as_measured(verified.drawn)
        if len(settings) > 1:
            plan.measured["by_settings"] = [
                recorded(one) | {f"held_out_{self.measure}_db": round(db, 3)}
                for one, db in zip(settings, verified.db_by_setting, strict=True)
            ]
        if self.verified_on:
            plan.measured["verified_on"] = self.verified_on
        if self.times is not None:
            plan.measured |= self.times.recorded(assignment.milliseconds)
        plan.measured |= {f"predicted_{name}_loss": round(assignment.signal(name), 6) for name in self.signals}
        plan.measured |= {f"held_out_{name}_loss": round(loss, 6) for name, loss in verified.losses.items()}
        return PlanResult(plan, self.analysis, noise, verified.predicted_db)

    def plan(self, target: Target) -> PlanResult:
        """The verified plan for a target.

        Raises:
            PlanError: the target cannot be met, and the text says what can; or it is in milliseconds, and the session
                has no times.
        """
        if target.needs_times and self.times is None:
            raise PlanError(f"a target of {target} needs the layers' times: give them to the session")
        if target.measure not in (None, self.measure):
            raise PlanError(f"a target of {target} is not {MEASURES[self.measure]}, which this session plans for")
        first = self.chooser.choose(target)
        with in_tiles(self.model):
            verified = self.verified(first) if target.db is None else self._reach(target, target.db, first)
            return self.result(verified, target)

    def _reach(self, target: Target, target_db: float, first: Assignment) -> Verified:
        """The cheapest assignment that reaches the target when it is run, of those that were run.

        Requests are in dB of the layers' sum. Each run shows by how much a request was too low or too high, and
        they close in from both sides.
        """
        most = self.chooser.best(target).sum_db
        asked = min(target_db + first.sum_db - self.predicted_db(first), most)
        tried: list[Verified] = []
        low: Verified | None = None  # the highest sum that fails
        high: Verified | None = None  # the cheapest that reaches the target
        for _ in range(RUNS):
            run = self.verified(self.chooser.choose(target, asked))
            logger.info("asked for %.2f dB of the sum: %.2f dB of %.2f", asked, run.db, target_db)
            is_new = run not in tried
            tried.append(run)
            if run.db >= target_db:
                is_new = is_new and (high is None or self.chooser.is_cheaper(run.assignment, high.assignment, target))
                high = run if is_new else high
            elif low is None or run.assignment.sum_db > low.assignment.sum_db:
                low = run
            if run.db < target_db and asked >= most:
                break
            if high is not None and (not is_new or high.db - target_db <= ENOUGH_DB):
                break
            asked = min(_next(low, high, target_db), most)
        if high is None:
            raise PlanError(
                f"{target_db} dB is not reached on held-out prompts: the best plan of {len(tried)} that were run has "
                f"{max(run.db for run in tried):.2f} dB; lower the target, allow more precise formats, or calibrate "
                "on more prompts"
            )
        return high


def _next(low: Verified | None, high: Verified | None, target_db: float) -> float:
    """The next request, in dB of the sum, after runs on one side of the target or on both."""
    if low is None or high is None:
        run = low or high
        assert run is not None
        return run.assignment.sum_db + target_db + MARGIN_DB - run.db
    left, right = low.assignment.sum_db, high.assignment.sum_db
    share = (target_db + MARGIN_DB - low.db) / (high.db - low.db)
    return left + (right - left) * min(max(share, NEAREST), 1 - NEAREST)
