"""Damaged checkpoints load to the very same model or are refused by name: a few of each kind, always the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from python_tests.mutations.checkpoints import MUTATIONS, saves, trial
from python_tests.mutations.trials import wrong_ones

OF_EACH = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def output(place: Path) -> Tensor:
    """Of the model that is saved below `place`."""
    return saves(place / "saved")


@pytest.mark.parametrize("kind", range(len(MUTATIONS)), ids=[f"{m.__name__}-{save}" for m, save in MUTATIONS])
def test_a_damaged_checkpoint_is_the_same_or_refused(place: Path, output: Tensor, kind: int) -> None:
    seeds = range(kind, OF_EACH * len(MUTATIONS), len(MUTATIONS))
    assert not wrong_ones(trial(place, output, seed) for seed in seeds)
