"""The knapsack finds what trying all combinations finds."""

from __future__ import annotations

import numpy as np
import pytest

from ldmq_kernels.planning import knapsack
from ldmq_kernels.planning.knapsack import Infeasible, Option, Table
from python_tests.planning.synthetic import SCHEMES, every_choice, options


@pytest.mark.parametrize("seed", range(4))
def test_the_least_of_a_column_within_limits_on_others(seed: int) -> None:
    found = options(seed)
    table = Table(found)
    noise = table.noise.sum(1)
    totals = [(sum(sum(o.noise) for o in c), sum(o.milliseconds for o in c)) for c in every_choice(found)]
    limit, most_time = (float(np.quantile(column, 0.5)) for column in zip(*totals, strict=True))
    picked = table.solve([table.bytes], [(noise, limit), (table.milliseconds, most_time)])
    allowed = [
        sum(o.bytes for o in choice)
        for choice in every_choice(found)
        if sum(sum(o.noise) for o in choice) <= limit and sum(o.milliseconds for o in choice) <= most_time
    ]
    assert noise[picked].sum() <= limit
    assert table.milliseconds[picked].sum() <= most_time
    assert table.bytes[picked].sum() == pytest.approx(min(allowed), rel=1.1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_limit_is_kept_to_the_byte(seed: int) -> None:
    found = options(seed)
    sizes = sorted({int(sum(o.bytes for o in choice)) for choice in every_choice(found)})
    table = Table(found)
    for limit in (sizes[0], sizes[len(sizes) // 2]):
        assert table.bytes[table.solve([table.noise.sum(1)], [(table.bytes, limit)])].sum() <= limit


def test_of_equal_bytes_the_cheaper_operations_win() -> None:
    table = Table(options(0, schemes=SCHEMES[1:4]))
    chosen = table.chosen(table.solve([table.bytes, table.operations], []))
    assert {o.scheme for o in chosen.values()} == {"w8a8-static"}
    unordered = Table([o for o in options(0) if o.scheme in ("w8a8-dynamic", "w8a16")])
    chosen = unordered.chosen(unordered.solve([unordered.bytes, unordered.operations], []))
    assert {o.scheme for o in chosen.values()} == {"w8a8-dynamic"}


def test_every_layer_gets_exactly_one_choice() -> None:
    table = Table(options(3))
    picked = table.solve([table.bytes], [(table.noise.sum(1), 1e-3)])
    assert sorted(table.layer[picked]) == sorted(set(table.layer))


def test_the_least_options_are_taken_layer_by_layer_and_ties_by_the_next_column() -> None:
    found = [Option("b", "x", (1.0,), 3, 2), Option("b", "y", (1.0,), 3, 1), Option("a", "x", (0.0,), 5, 5)]
    table = Table(found)
    assert sorted(table.least(table.bytes, table.operations)) == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_that_stood_still_for_too_long_goes_on(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(options(seed))
    noise = table.noise.sum(1)
    limits = [(table.bytes, float(table.bytes[table.least(table.bytes)].sum()) * 1.3)]
    expected = table.solve([noise], limits)
    monkeypatch.setattr(knapsack, "SECONDS", 0.0)
    assert noise[table.solve([noise], limits)].sum() == pytest.approx(noise[expected].sum(), rel=1e-3)


def test_none_of_a_kind_can_be_asked_for() -> None:
    table = Table(options(1))
    picked = table.solve([table.noise.sum(1)], [(table.is_float, 0)])
    assert not table.is_float[picked].any()


def test_what_cannot_be_met_says_so() -> None:
    table = Table(options(1, schemes=SCHEMES[1:]))
    least = float(table.bytes[table.least(table.bytes)].sum())
    with pytest.raises(Infeasible):
        table.solve([table.noise.sum(1)], [(table.bytes, least * 0.999)])
    with pytest.raises(Infeasible):
        table.solve([table.bytes], [(table.noise.sum(1), -1.0)])
    assert np.isclose(table.bytes[table.solve([table.bytes], [(table.bytes, least)])].sum(), least)
