"""Files and folders appear whole or not at all."""

import errno
import os

import pytest

from ldmq_kernels.files import whole_folder, write_whole


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
