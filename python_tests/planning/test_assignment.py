"""Choices keep the limits as they are defined, are as good as trying everything, and say what could be met."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldmq_kernels.numerics.sqnr import from_db
from ldmq_kernels.planning.assignment import Chooser, step_weights
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.plan import PlanError
from python_tests.planning.synthetic import SCHEMES, every_choice, mean_db, options

WEIGHTS = (0.5, 0.3, 0.2)
NEAR = 1.02  # of the best choice: noise is followed by tangents, bytes to a thousandth


def _chooser(seed: int, signals: tuple[str, ...] = ("sqnr",), rest: float | None = None, **made: object) -> Chooser:
    return Chooser(options(seed, **made), WEIGHTS, signals, rest_milliseconds=rest)


def _size(choice: tuple) -> float:
    return sum(o.bytes for o in choice)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("decibels", [33.0, 38.0, 45.0])
def test_the_mean_of_decibels_is_kept_with_the_fewest_bytes(seed: int, decibels: float) -> None:
    choice = _chooser(seed).choose(Target(sqnr_db=decibels))
    chosen = tuple(choice.options.values())
    assert choice.sum_db == pytest.approx(min(200.0, mean_db(chosen, WEIGHTS)))
    assert choice.sum_db >= decibels - 1e-4
    fewest = min(_size(c) for c in every_choice(options(seed)) if mean_db(c, WEIGHTS) >= decibels)
    assert choice.bytes <= fewest * NEAR


def test_mean_power_would_have_asked_for_more() -> None:
    """Where noise differs much between steps, the mean of powers is far above what the mean of dB allows."""
    choices = list(every_choice(options(2)))
    size = {c: _size(c) for c in choices}
    by_power = min((c for c in choices if np.dot(WEIGHTS, np.sum([o.noise for o in c], 0)) <= 1e-4), key=size.get)
    assert _chooser(2).choose(Target(sqnr_db=40.0)).bytes < size[by_power]


@pytest.mark.parametrize("seed", range(6))
def test_bytes_are_kept_with_the_highest_sqnr(seed: int) -> None:
    found = options(seed)
    sizes = sorted(_size(c) for c in every_choice(found))
    limit = int(sizes[len(sizes) // 3])
    choice = _chooser(seed).choose(Target(bytes=limit))
    best = max(mean_db(c, WEIGHTS) for c in every_choice(found) if _size(c) <= limit)
    assert choice.bytes <= limit
    assert choice.sum_db >= best - 0.3


@pytest.mark.parametrize("seed", range(3))
def test_all_limits_hold_together_and_the_missing_one_is_small(seed: int) -> None:
    found = options(seed)
    target = Target(sqnr_db=34.0, milliseconds=1.5, layers=2)
    choice = _chooser(seed, rest=0.25).choose(target)
    assert choice.sum_db >= 34.0 - 1e-4
    assert choice.milliseconds + 0.25 <= 1.5
    assert sum(o.is_float for o in choice.options.values()) <= 2
    allowed = [
        _size(c)
        for c in every_choice(found)
        if mean_db(c, WEIGHTS) >= 34.0 and sum(o.milliseconds for o in c) <= 1.25 and sum(o.is_float for o in c) <= 2
    ]
    assert choice.bytes <= min(allowed) * NEAR


def test_decibels_and_bytes_leave_time_to_be_small() -> None:
    found = options(4)
    limit = int(0.8 * sum(o.bytes for o in found if o.scheme == "fp16"))
    target = Target(sqnr_db=36.0, bytes=limit)
    choice = _chooser(4, rest=0.0).choose(target)
    allowed = [
        sum(o.milliseconds for o in c) for c in every_choice(found) if mean_db(c, WEIGHTS) >= 36.0 and _size(c) <= limit
    ]
    assert choice.milliseconds <= min(allowed) * NEAR


def test_layers_in_16_bit_are_counted_and_the_most_sensitive_ones_stay() -> None:
    chooser = _chooser(5)
    dbs = []
    for count in range(4):
        choice = chooser.choose(Target(layers=count))
        assert sum(o.is_float for o in choice.options.values()) == count
        dbs.append(choice.sum_db)
    assert dbs == sorted(dbs)


def test_ties_in_bytes_go_to_the_cheapest_activations() -> None:
    chosen = _chooser(0, schemes=SCHEMES[1:4]).choose(Target(sqnr_db=10.0))
    assert set(chosen.schemes.values()) == {"w8a8-static"}


def test_a_plan_without_any_noise_is_200_db() -> None:
    choice = _chooser(1).choose(Target(layers=5))
    assert choice.sum_db == 200.0


# -- more signals than noise -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_with_two_signals_their_normalised_sum_is_least_within_the_bytes(seed: int) -> None:
    found = options(seed)
    chooser = _chooser(seed, ("sqnr", "ssim"))
    smallest = [found[i] for i in chooser.smallest]
    powers, losses = np.sum([o.noise for o in smallest], 0), sum(dict(o.signals)["ssim"] for o in smallest)

    def loss(choice: tuple) -> float:
        noise = float(np.dot(WEIGHTS, np.sum([o.noise for o in choice], 0) / powers))
        return noise + sum(dict(o.signals)["ssim"] for o in choice) / losses

    limit = int(0.5 * sum(o.bytes for o in found if o.scheme == "fp16"))
    choice = chooser.choose(Target(bytes=limit))
    assert choice.bytes <= limit
    best = min(loss(c) for c in every_choice(found) if _size(c) <= limit)
    assert loss(tuple(choice.options.values())) <= best * NEAR


def test_with_a_target_in_decibels_both_signals_must_hold() -> None:
    found = options(1)
    both, noise_alone = _chooser(1, ("sqnr", "ssim")), _chooser(1)
    smallest = [found[i] for i in both.smallest]
    start_db = mean_db(tuple(smallest), WEIGHTS)
    start_loss = sum(dict(o.signals)["ssim"] for o in smallest)
    target = Target(sqnr_db=start_db + 8)
    choice, unaware = both.choose(target), noise_alone.choose(target)
    allowed = from_db(8.0) * start_loss
    assert choice.sum_db >= start_db + 8 - 1e-4
    assert choice.signal("ssim") <= allowed * (1 + 1e-6)
    assert unaware.signal("ssim") > allowed
    assert choice.bytes >= unaware.bytes


# -- what cannot be met ------------------------------------------------------------------------------------


def test_too_few_bytes_say_the_least_and_ask_for_a_smaller_format_only_if_there_is_one() -> None:
    chooser = _chooser(0)
    least = int(chooser.least("bytes"))
    with pytest.raises(PlanError, match=rf"at least {least} bytes; raise the target"):
        chooser.choose(Target(bytes=least - 1))
    assert chooser.choose(Target(bytes=least)).bytes == least
    with pytest.raises(PlanError, match="allow a smaller format, such as w4a8"):
        _chooser(0, schemes=SCHEMES[:4]).choose(Target(bytes=10))


def test_too_many_decibels_say_the_most() -> None:
    chooser = _chooser(0, schemes=SCHEMES[1:])
    most = chooser.best(Target(sqnr_db=1.0)).sum_db
    with pytest.raises(PlanError, match=rf"at most about {most:.1f} dB"):
        chooser.choose(Target(sqnr_db=most + 1))
    assert chooser.choose(Target(sqnr_db=most - 0.1)).sum_db >= most - 0.1 - 1e-4


def test_limits_that_contradict_each_other_say_what_is_left() -> None:
    chooser = _chooser(0)
    with pytest.raises(PlanError, match=r"at most about [\d.]+ dB within \d+ bytes"):
        chooser.choose(Target(sqnr_db=90.0, bytes=int(chooser.least("bytes")) + 100))
    with pytest.raises(PlanError, match=r"1 ms cannot be met.*at least"):
        _chooser(0, rest=2.0).choose(Target(sqnr_db=30.0, milliseconds=1.0))
    two = options(0, schemes=(("fp16", 16, 2.0), ("w4a8", 4, 1.0)))
    slow_when_small = [o if o.is_float else replace(o, milliseconds=9.0) for o in two]
    chooser = Chooser(slow_when_small, WEIGHTS, rest_milliseconds=0.0)
    with pytest.raises(PlanError, match="cannot be met together"):
        chooser.choose(Target(bytes=int(chooser.least("bytes")), milliseconds=5.0))


# -- steps -------------------------------------------------------------------------------------------------


def test_steps_between_the_analysed_ones_are_interpolated() -> None:
    weights = step_weights([0, 3, 9], 10)
    values = np.array([50.0, 20.0, 30.0])
    assert np.dot(weights, values) == pytest.approx(np.interp(range(10), [0, 3, 9], values).mean())
    assert step_weights([0, 1], 2) == (0.5, 0.5)
    assert step_weights([0], 20) == (1.0,)


# -- targets -----------------------------------------------------------------------------------------------


def test_the_first_missing_limit_is_the_goal() -> None:
    assert Target(sqnr_db=30.0).goal == "bytes"
    assert Target(sqnr_db=30.0, milliseconds=2.0).goal == "bytes"
    assert Target(bytes=10, milliseconds=2.0).goal == "noise"
    assert Target(sqnr_db=30.0, bytes=10).goal == "milliseconds"
    assert Target(layers=3).goal == "noise"
    assert Target(30.0, 10, 2.0).goal == "noise"
    assert Target(latent_db=30.0).goal == Target(psnr_db=30.0).goal == "bytes"
    assert Target(sqnr_db=30.0, bytes=10).needs_times
    assert not Target(sqnr_db=30.0).needs_times


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "at least one target"),
        ({"sqnr_db": float("nan")}, "not a finite number"),
        ({"bytes": 0}, "must be above 0"),
        ({"milliseconds": -1.0}, "must be above 0"),
        ({"layers": -1}, "0 or more"),
        ({"latent_db": float("inf")}, "not a finite number"),
        ({"sqnr_db": 30.0, "psnr_db": 40.0}, "30 dB, 40 dB of PSNR are targets of several places"),
    ],
)
def test_targets_without_meaning_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Target(**given)
    assert Target(30.0, 5, 2.5, 1).to_dict() == {"sqnr_db": 30.0, "bytes": 5, "milliseconds": 2.5, "layers": 1}
