"""Files and folders appear whole or not at all."""

import csv
import errno
import io
import os

import pytest

from ldmq_kernels.files import csv_bytes, whole_folder, write_csv, write_whole


def test_a_full_disk_leaves_the_older_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_whole(path, b"old")

    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_folder_that_is_not_finished_vanishes(tmp_path, stop):
    def write() -> None:
        with whole_folder(tmp_path / "model") as part:
            (part / "half.safetensors").write_bytes(b"x")
            raise stop

    with pytest.raises(stop):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_has_its_name(tmp_path):
    with whole_folder(tmp_path / "model") as part:
        (part / "a").write_text("1")
    assert (tmp_path / "model" / "a").read_text() == "1"


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "a").write_text("1")
    with pytest.raises(FileExistsError, match="not empty"), whole_folder(tmp_path):
        pass
    assert (tmp_path / "a").read_text() == "1"


def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path):
    write_whole(tmp_path / "plan.json", b"{}")
    (tmp_path / "other").write_text("")
    with whole_folder(tmp_path / "model"):
        pass
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_table_is_read_back_whatever_its_values_hold():
    row = ["down.0, conv", 'says "no"', "two\nlines", "größer", 1.5, None]
    text = csv_bytes(["layer", "reason", "note", "word", "ms", "gain"], [row]).decode()
    (read,) = csv.DictReader(io.StringIO(text, newline=""))
    assert list(read.values()) == [*row[:4], "1.5", ""]
    assert "\r" not in text


def test_a_row_that_does_not_fit_its_columns_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="a row of 1 values"):
        write_csv(tmp_path / "layers.csv", ["layer", "bytes"], [["conv_in", 12], ["conv_out"]])
    assert not list(tmp_path.iterdir())


def test_a_table_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "layers.csv"
    path.write_text("old")
    write_csv(path, ["layer"], iter([["conv_in"]]))
    assert path.read_bytes() == b"layer\nconv_in\n"
