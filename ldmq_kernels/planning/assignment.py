"""The assignment of a scheme to each layer that meets a target, by noise as the analysis predicts it.

The target in dB is a mean of the dB at each sampling step, or in each picture, and there noise powers add up. The
logarithm of a sum is not linear in the options, but lies below its tangents: the knapsack is solved with the tangent
at the last solution until that no longer changes, and every solution on the way keeps the true limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldmq_kernels.numerics.sqnr import from_db
from ldmq_kernels.planning.knapsack import EQUAL, Column, Infeasible, Limit, Option, Table
from ldmq_kernels.planning.target import Measure, Target
from ldmq_kernels.plans.plan import PlanError

TANGENTS = 5
ENOUGH = 1e-3  # relative gain of a goal that is worth another solution
LEAST_POWER = 1e-30  # stands for no noise at all: 300 dB
MOST_DB = 200.0
SQNR: Measure = "sqnr"


def step_weights(analysed: Sequence[int], steps: int) -> tuple[float, ...]:
    """The weight of each analysed step in a mean over all steps, which interpolates the steps between."""
    each = np.eye(len(analysed))
    every = np.arange(steps)
    return tuple(float(np.interp(every, analysed, row).mean()) for row in each)


@dataclass(frozen=True)
class Assignment:
    """An option for each layer.

    Attributes:
        options: layer -> its option.
        sum_db: SQNR, or PSNR, in dB by the sum of the layers' noise.
    """

    options: dict[str, Option]
    sum_db: float

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return int(sum(o.bytes for o in self.options.values()))

    @property
    def milliseconds(self) -> float:
        """Milliseconds of all layers in one call, without what is beside them."""
        return sum(o.milliseconds for o in self.options.values())

    def signal(self, name: str) -> float:
        """The sum of a signal over all layers."""
        return sum(dict(o.signals).get(name, 0.0) for o in self.options.values())

    @property
    def schemes(self) -> dict[str, str]:
        """Layer -> scheme."""
        return {name: option.scheme for name, option in self.options.items()}


class Chooser:
    """Solves for targets over the same options.

    With more signals than noise, each is divided by its sum over the smallest option of every layer. Without a
    target in dB their sum is minimised. With one, bytes (or time) are minimised and every signal must hold: the
    noise must keep the dB, and of each other signal at most the share may be left that this leaves of the noise of
    the smallest options, since the loss of structure (1 - SSIM) grows as the noise power does while it is small.

    Args:
        options: the options of all layers.
        weights: the weight of each step, or picture, in the mean of dB; they add up to 1.
        signals: "sqnr", and names of signals that the options have.
        rest_milliseconds: the time of one call beside the layers; None where no times were measured.
    """

    def __init__(
        self,
        options: Sequence[Option],
        weights: Sequence[float],
        signals: Sequence[str] = (SQNR,),
        *,
        rest_milliseconds: float | None = None,
    ) -> None:
        self.table = Table(options)
        self.weights = np.array(weights)
        self.rest = rest_milliseconds
        self.smallest = self.table.least(self.table.bytes, *self._ties())
        self.others = {name: self.table.signal(name) for name in signals if name != SQNR}

    # -- what may be asked -------------------------------------------------------------------------------

    def choose(self, target: Target, sum_db: float | None = None) -> Assignment:
        """The assignment that meets a target.

        Args:
            target: the limits, and what is to be small.
            sum_db: dB of the layers' sum to ask for in place of the target's, where that sum is known to be wrong.

        Raises:
            PlanError: the limits cannot be met together; the text says what can.
        """
        asked = target.db if sum_db is None else sum_db
        limits = self._limits(target)
        try:
            if asked is None:
                return self._assignment(self._least_noise(limits))
            return self._assignment(self._least_cost(target, asked, limits))
        except Infeasible:
            raise PlanError(self._why_not(target, asked)) from None

    def best(self, target: Target) -> Assignment:
        """The assignment of highest SQNR within the target's other limits.

        Raises:
            PlanError: these cannot be met together.
        """
        try:
            return self._assignment(self._least_noise(self._limits(target)))
        except Infeasible:
            raise PlanError(self._why_not(target, None)) from None

    def is_cheaper(self, one: Assignment, other: Assignment, target: Target) -> bool:
        """Whether one assignment costs less than another in what the target makes small, or in what breaks ties."""
        for ours, theirs in zip(self._costs(one, target), self._costs(other, target), strict=True):
            if abs(ours - theirs) > EQUAL * theirs:
                return ours < theirs
        return False

    def _costs(self, assignment: Assignment, target: Target) -> list[float]:
        options = assignment.options.values()
        time = [] if self.rest is None else [assignment.milliseconds]
        costs = [*time, sum(o.operations for o in options)]
        return [float(assignment.bytes), *costs] if target.goal == "bytes" else costs

    def least(self, what: Literal["bytes", "milliseconds"]) -> float:
        """The least bytes, or milliseconds of one call, that the options allow."""
        table = self.table
        if what == "bytes":
            return float(table.bytes[self.smallest].sum())
        return (self.rest or 0.0) + float(table.milliseconds[table.least(table.milliseconds)].sum())

    # -- noise as a column -------------------------------------------------------------------------------

    def _powers(self, picked: NDArray[np.intp]) -> Column:
        return np.maximum(self.table.noise[picked].sum(0), LEAST_POWER)

    def _mean_db(self, powers: Column) -> float:
        return float(self.weights @ (-10 * np.log10(powers)))

    def _assignment(self, picked: NDArray[np.intp]) -> Assignment:
        return Assignment(self.table.chosen(picked), min(MOST_DB, self._mean_db(self._powers(picked))))

    def _tangent(self, powers: Column, level_db: float) -> Column:
        """A column whose sum is at most 1 where mean dB is at least the level; exact at these powers' shape."""
        scale = 10 ** ((self._mean_db(powers) - level_db) / 10)
        return (self.table.noise / (powers * scale)) @ self.weights

    def _limits(self, target: Target) -> list[Limit]:
        table = self.table
        limits: list[Limit] = []
        if target.bytes is not None:
            limits.append((table.bytes, target.bytes))
        if target.milliseconds is not None:
            limits.append((table.milliseconds, target.milliseconds - (self.rest or 0.0)))
        if target.layers is not None:
            limits.append((table.is_float, target.layers))
        return limits

    def _signal_limits(self, asked: float) -> list[Limit]:
        share = min(1.0, from_db(asked) / from_db(self._mean_db(self._powers(self.smallest))))
        return [(column, share * float(column[self.smallest].sum())) for column in self.others.values()]

    # -- solutions ---------------------------------------------------------------------------------------

    def _ties(self) -> list[Column]:
        """The costs that are made small among assignments that are equal in the goal."""
        table = self.table
        return [table.operations] if self.rest is None else [table.milliseconds, table.operations]

    def _least_noise(self, limits: list[Limit]) -> NDArray[np.intp]:
        powers = self._powers(self.smallest)
        if self.others:
            return self.table.solve([self._normalised(powers), *self._ties()], limits)
        for _ in range(TANGENTS):
            picked = self.table.solve([self._tangent(powers, self._mean_db(powers))], limits)
            gain = self._mean_db(self._powers(picked)) - self._mean_db(powers)
            powers = self._powers(picked)
            if abs(gain) < 10 * ENOUGH:
                break
        return self.table.solve([self._tangent(powers, self._mean_db(powers)), *self._ties()], limits)

    def _normalised(self, powers: Column) -> Column:
        """Noise and the other signals, each 1 for the smallest assignment, added."""
        columns = [self._tangent(powers, self._mean_db(powers))]
        for column in self.others.values():
            columns.append(column / max(float(column[self.smallest].sum()), LEAST_POWER))
        return np.sum(columns, axis=0)

    def _least_cost(self, target: Target, asked: float, limits: list[Limit]) -> NDArray[np.intp]:
        table = self.table
        if target.goal == "noise":
            within = self._least_noise([*limits, *self._signal_limits(asked)])
            if self._mean_db(self._powers(within)) < asked:
                raise Infeasible
            return within
        goals = [table.bytes, *self._ties()] if target.goal == "bytes" else self._ties()
        limits = [*limits, *self._signal_limits(asked)]
        best = None
        for powers in self._starts(limits):
            best = self._descend(goals[0], asked, limits, powers)
            if best is not None:
                break
        if best is None:
            raise Infeasible
        tangent = self._tangent(self._powers(best), asked)
        with contextlib.suppress(Infeasible):  # where the last digits of the best one are above the limit
            best = self.table.solve(goals, [*limits, (tangent, 1.0)])
        return best

    def _starts(self, limits: list[Limit]) -> Iterator[Column]:
        """Noise by step whose tangents are tried first: the smallest assignment's, then the least noisy one's."""
        yield self._powers(self.smallest)
        yield self._powers(self._least_noise(limits))

    def _descend(self, goal: Column, asked: float, limits: list[Limit], powers: Column) -> NDArray[np.intp] | None:
        """The least goal that tangents find from these powers on; None where the first tangent allows nothing."""
        best, least = None, np.inf
        for _ in range(TANGENTS):
            try:
                picked = self.table.solve([goal], [*limits, (self._tangent(powers, asked), 1.0)])
            except Infeasible:
                break
            before, after = least, float(goal[picked].sum())
            if after < least:
                best, least, powers = picked, after, self._powers(picked)
            if after > before * (1 - ENOUGH):
                break
        return best

    # -- why there is none -------------------------------------------------------------------------------

    def _why_not(self, target: Target, asked: float | None) -> str:
        others = self._limits(target)
        alone = self._why_not_one(target)
        if alone is not None:
            return alone
        try:
            most = self._mean_db(self._powers(self._least_noise(others)))
        except Infeasible:
            return f"{target} cannot be met together, though each alone can: raise one of them"
        if asked is not None and most >= asked:
            return f"{target} cannot be met with the signals {', '.join(self.others)}: allow fp16, or drop the signal"
        within = f" within {Target(None, target.bytes, target.milliseconds, target.layers)}" if others else ""
        remedy = "lower the target" + (", or give more room" if others else ", or allow w8a16 or fp16")
        return f"{asked} dB cannot be met: with these formats at most about {most:.1f} dB{within}; {remedy}"

    def _why_not_one(self, target: Target) -> str | None:
        """The limit that cannot be met by itself, in words; None where each can."""
        table = self.table
        known = [
            (table.bytes, 0.0, target.bytes, "bytes", "the weights take at least {:.0f} bytes", self._smaller()),
            (
                table.milliseconds,
                self.rest or 0.0,
                target.milliseconds,
                "ms",
                "one call takes at least {:.3f} ms",
                "raise the target, or allow faster formats",
            ),
            (
                table.is_float,
                0.0,
                target.layers,
                "layers in 16 bit",
                "at least {:.0f} layers stay in 16 bit",
                "allow more formats" if self.rest is None else "those that would get slower are among them",
            ),
        ]
        for column, start, limit, unit, words, remedy in known:
            smallest = start + float(column[table.least(column)].sum())
            if limit is not None and smallest > limit:
                return f"{limit:.10g} {unit} cannot be met: with these formats {words.format(smallest)}; {remedy}"
        return None

    def _smaller(self) -> str:
        if any(o.scheme.startswith("w4") for o in self.table.options):
            return "raise the target: there is no smaller format"
        return "allow a smaller format, such as w4a8"
