"""How the study compares what is known of the end with what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.study import end_noise


def test_sizes_by_few_probes_are_right_on_average_in_decibels() -> None:
    true = np.array([1e-3, 1e-2, 1e-4])
    squares = np.random.default_rng(0).chisquare(4, size=(4000, 3)) / 4 * true  # means of four squares
    estimates = [end_noise.estimated_db(list(noise), 4) for noise in squares]
    assert np.mean(estimates) == pytest.approx(end_noise.mean_db(list(true)), abs=0.1)
    assert end_noise.pooled_db(list(true)) > end_noise.mean_db(list(true)) + 1


def test_agreement_tells_order_and_size() -> None:
    found = end_noise.agreement([-40.0, -30.0, -20.0], [-39.0, -31.0, -18.0])
    assert found["spearman"] == 1.0
    assert (found["median_size_db"], found["median_db"]) == (1.0, 1.0)


def test_the_table_has_each_signal_with_its_sets_of_probes() -> None:
    row = {"op": "agreement", "guidance": 4.0, "end": "latent", "pairs": 3, "probes": 8, "model": "demo"}
    row |= {"all": True, "schemes": ["w8a8-static", "w8a16"]}
    row |= {"signal": end_noise.ADJOINT} | end_noise.agreement([1.0, 2.0, 3.0], [1.0, 2.5, 3.0])
    rows = [row | {"pooled_size_db": 0.75}, row | {"signal": end_noise.OUTPUT}]
    words, *_, first, second = end_noise.table({"rows": rows}).splitlines()
    assert "all 3 layers and schemes, each alone: w8a8-static, w8a16;" in words
    assert first == "| 4 | latent | adjoint | 1.000 | 0.00 | +0.0 (+0.0 to +0.4) | 0.75 |"
    assert second == "| 4 | latent | model output | 1.000 |  |  |  |"
