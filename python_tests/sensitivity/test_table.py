"""The tidy table holds every measurement once, with what it is a measurement of."""

import csv
import math

import pytest

from ldmq_kernels.numerics.sqnr import from_db
from ldmq_kernels.sensitivity.output_noise import SampleNoise, StepNoise
from ldmq_kernels.sensitivity.table import rows_of_noise, rows_of_pictures, write_rows

NOISE = StepNoise(
    {0: 1e-3, 2: 1e-5},
    (SampleNoise(0, 1, "conditional", 2.0, 0.004), SampleNoise(2, 0, "guided", 0.0, 0.0)),
)


def test_steps_their_mean_and_each_prompt_are_rows(tmp_path):
    rows = list(rows_of_noise("unet", "conv_in", "w8a8-static", NOISE, [900.0, 500.0, 100.0], estimated=True))
    assert [(r.step, r.timestep, r.prompt, r.part) for r in rows] == [
        (0, 900.0, None, "pooled"),
        (2, 100.0, None, "pooled"),
        (None, None, None, "pooled"),
        (0, 900.0, 1, "conditional"),
        (2, 100.0, 0, "guided"),
    ]
    assert [r.sqnr_db for r in rows] == pytest.approx([30, 50, 40, -10 * math.log10(0.002), 200])
    assert {r.estimated for r in rows} == {1}
    assert write_rows(tmp_path / "sqnr.csv", rows) == 5
    with (tmp_path / "sqnr.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[2] == {
        "place": "unet",
        "name": "conv_in",
        "scheme": "w8a8-static",
        "step": "",
        "timestep": "",
        "prompt": "",
        "part": "pooled",
        "noise_power": "0.0001",
        "sqnr_db": "40",
        "estimated": "1",
    }


def test_pictures_are_rows_of_the_whole_plan():
    rows = list(rows_of_pictures("image", [31.0, 28.5]))
    assert [(r.place, r.scheme, r.prompt, r.sqnr_db) for r in rows] == [
        ("image", "plan", 0, 31.0),
        ("image", "plan", 1, 28.5),
    ]
    assert rows[0].noise_power == pytest.approx(from_db(31.0))
