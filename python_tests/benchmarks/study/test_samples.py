"""The measures against plain formulas, and their confidence intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.study.inspect_model import ssim
from benchmarks.study.samples import MEASURES, Samples, bootstrap, difference, interval, value
from python_tests.benchmarks.study.synthetic import made_samples


def test_measures_are_pooled_over_captions_and_seed_sets() -> None:
    samples = made_samples()
    arrays = samples.arrays
    by_step = [
        10 * math.log10(arrays["output_signal"][..., step].sum() / arrays["output_noise"][..., step].sum())
        for step in range(4)
    ]
    assert value(samples, MEASURES["sqnr_db"]) == pytest.approx(sum(by_step) / 4)
    latent = arrays["latent_signal"].sum() / arrays["latent_noise"].sum()
    assert value(samples, MEASURES["latent_sqnr_db"]) == pytest.approx(10 * math.log10(latent))
    assert value(samples, MEASURES["psnr_db"]) == pytest.approx(-10 * math.log10(arrays["squared_error"].mean()))
    assert value(samples, MEASURES["ssim"]) == pytest.approx(arrays["ssim"].mean())
    assert value(samples, MEASURES["attribute_accuracy"]) == pytest.approx(arrays["right"].sum() / (7 * 3 * 8))


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_many_resamples_is_that_of_each(name: str) -> None:
    samples = made_samples()
    index = np.random.default_rng(1).integers(0, 7, (2, 3, 7))
    together = MEASURES[name](samples, index)
    assert together.shape == (2, 3)
    for place in np.ndindex(2, 3):
        picked = Samples({key: array[index[place]] for key, array in samples.arrays.items()})
        assert together[place] == pytest.approx(value(picked, MEASURES[name]), rel=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_an_interval_holds_its_value_and_shrinks_with_more_captions(name: str) -> None:
    few, many = (interval(made_samples(captions=count), name) for count in (6, 60))
    for found in (few, many):
        assert found.low <= found.value <= found.high
    assert many.high - many.low < few.high - few.low


def test_an_interval_covers_a_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        values = random.normal(size=30)
        found = bootstrap(lambda index, values=values: values[index].mean(-1), 30)
        hits += found.low <= 0 <= found.high
    assert 51 <= hits <= 60


def test_a_paired_difference_sees_what_the_cases_share() -> None:
    first, louder = made_samples(), made_samples(louder=1.2)
    more = difference(first, louder, "sqnr_db")
    assert more.value == pytest.approx(-10 * math.log10(1.2))
    assert more.high - more.low < 1e-6
    same = difference(first, first, "attribute_accuracy")
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_one_caption_has_no_interval() -> None:
    with pytest.raises(ValueError, match="captions"):
        interval(made_samples(captions=1), "ssim")


def test_samples_come_back_from_json_but_for_the_features() -> None:
    samples = made_samples()
    again = Samples.from_json(json.loads(json.dumps(samples.to_json())))
    assert set(again.arrays) == set(samples.arrays) - {"features", "float_features"}
    for name, array in again.arrays.items():
        np.testing.assert_allclose(array, samples.arrays[name], rtol=1e-6)


def test_ssim_is_of_each_picture() -> None:
    pictures = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    noisy = pictures.clone()
    noisy[1] += 0.2 * torch.randn(noisy[1].shape, generator=torch.Generator().manual_seed(1))
    found = ssim(pictures, noisy)
    assert found.shape == (3,)
    assert found[0] == found[2] == 1
    assert found[1] == ssim(pictures[1:2], noisy[1:2])[0] < 0.9
