"""A few hundred mutated plan files, of the many that `python -m python_tests.mutations plans` tries."""

from python_tests.mutations.plans import trials
from python_tests.mutations.trials import wrong_ones


def test_every_mutated_plan_loads_as_it_was_or_is_refused_by_name():
    assert wrong_ones(trials(240, seed=20_000)) == []
