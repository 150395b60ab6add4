"""Work is cut into runs that fit into memory, in order and without losing an item."""

from __future__ import annotations

import pytest

from ldmq_kernels.chunks import chunks_within

SIZES = {"a": 3, "b": 4, "c": 3, "d": 20, "e": 1, "f": 9}


@pytest.mark.parametrize(
    ("limit", "runs"),
    [
        (10, ["abc", "d", "ef"]),
        (9, ["ab", "c", "d", "e", "f"]),
        (1, ["a", "b", "c", "d", "e", "f"]),
        (40, ["abcdef"]),
    ],
)
def test_a_run_holds_as_many_items_as_the_limit_allows(limit: int, runs: list[str]) -> None:
    assert list(chunks_within("abcdef", SIZES, limit)) == [list(run) for run in runs]


def test_an_item_of_unknown_size_takes_nothing() -> None:
    assert list(chunks_within("axb", SIZES, 7)) == [["a", "x", "b"]]


def test_no_items_make_no_run() -> None:
    assert list(chunks_within([], {}, 10)) == []
