"""Tables are read back as they were, and written whole or not at all."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from ldmq_kernels.files import csv_bytes, write_csv


def test_a_table_is_read_back_whatever_its_values_hold() -> None:
    row = ["down.0, conv", 'says "no"', "two\nlines", "größer", 1.5, None]
    text = csv_bytes(["layer", "reason", "note", "word", "ms", "gain"], [row]).decode()
    (read,) = csv.DictReader(io.StringIO(text, newline=""))
    assert list(read.values()) == [*row[:4], "1.5", ""]
    assert "\r" not in text


def test_a_row_that_does_not_fit_its_columns_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row of 1 values"):
        write_csv(tmp_path / "layers.csv", ["layer", "bytes"], [["conv_in", 12], ["conv_out"]])
    assert not list(tmp_path.iterdir())


def test_a_table_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"
    path.write_text("old")
    write_csv(path, ["layer"], iter([["conv_in"]]))
    assert path.read_bytes() == b"layer\nconv_in\n"
