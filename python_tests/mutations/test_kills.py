"""A few of `python -m python_tests.mutations kills`, one by each signal."""

from __future__ import annotations

import pytest

from python_tests.mutations.kills import SIGNALS, trials
from python_tests.mutations.saves import SAVES
from python_tests.mutations.trials import wrong_ones


@pytest.mark.slow
def test_killed_commands_give_the_same_when_they_run_again() -> None:
    outcomes = list(trials(len(SIGNALS), 0, ("plan --work", *3 * ["quantize --plan"])))
    assert [outcome.text.split()[0] for outcome in outcomes] == [signal.name for signal in SIGNALS]
    assert not wrong_ones(outcomes)


@pytest.mark.slow
def test_killed_saves_over_an_older_model_leave_one_of_the_two() -> None:
    outcomes = list(trials(2 * len(SAVES), 0, tuple(SAVES)))
    assert not wrong_ones(outcomes)
    assert {outcome.text.split()[-1] for outcome in outcomes} == {"older", "newer"}
