"""Results appear whole or not at all, where they were asked for, and over nothing of the user's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldmq_kernels.files import MisplacedError, output_file, output_folder, write_whole
from python_tests.files.places import WHOLE, content_of, fill, is_older, is_ours, put_file, put_folder


def _below_a_file(folder: Path) -> Path:
    (folder / "notes").write_text("mine")
    return folder / "notes" / "result"


def _users_file(folder: Path) -> Path:
    (folder / "notes").write_text("mine")
    return folder / "notes"


def _used_folder(folder: Path) -> Path:
    _users_file(folder)
    return folder


def _circle(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _users_folder_in_the_way(folder: Path) -> Path:
    (folder / "result.ldmq-part").mkdir()
    (folder / "result.ldmq-part" / "notes").write_text("mine")
    return folder / "result"


BAD_FOR_BOTH = {
    "below a file": (_below_a_file, "notes, which is no folder|Not a directory"),
    "a disk that takes nothing": (lambda _: Path("/proc/ldmq/result"), "cannot be written"),
    "a long name": (lambda folder: folder / ("x" * 300), "File name too long"),
    "a circle of links": (_circle, "leads in a circle|too many|Too many"),
    "a folder of the user's in the way": (_users_folder_in_the_way, "not from ldmq"),
}
BAD_FOR_A_FILE = BAD_FOR_BOTH | {
    "a folder": (lambda folder: folder, "is a folder: give the name of a file in it"),
    "a file of the user's": (_users_file, "is no table of ours"),
    "a pipe": (_pipe, "a device or a pipe"),
    "a device": (lambda _: Path("/dev/null"), "a device or a pipe"),
}
BAD_FOR_A_FOLDER = BAD_FOR_BOTH | {
    "a file": (_users_file, "no folder"),
    "a folder in use": (_used_folder, "not empty"),
    "a device": (lambda _: Path("/dev/null"), "no folder"),
}


def _refused(path: Path, folder: Path, words: str, reserve: Callable[[Path], object]) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(OSError, match=words) as raised:
        reserve(path)
    assert str(path) in str(raised.value) or raised.value.filename == str(path)
    assert sorted(folder.rglob("*")) == before
    notes = [file.read_text() for file in before if file.name == "notes"]
    assert notes in ([], ["mine"])


@pytest.mark.parametrize("name", BAD_FOR_A_FILE)
def test_a_place_that_takes_no_file_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    place, words = BAD_FOR_A_FILE[name]

    def reserve(path: Path) -> None:
        with output_file(path, is_ours, "table of ours"):
            raise AssertionError("the work has begun")

    _refused(place(tmp_path), tmp_path, words, reserve)


@pytest.mark.parametrize("name", BAD_FOR_A_FOLDER)
def test_a_place_that_takes_no_folder_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    place, words = BAD_FOR_A_FOLDER[name]

    def reserve(path: Path) -> None:
        with output_folder(path):
            raise AssertionError("the work has begun")

    _refused(place(tmp_path), tmp_path, words, reserve)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_protected_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result").write_bytes(b"ours, old")
    (tmp_path / "result").chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"):
        put_file(tmp_path / "result")


@pytest.mark.parametrize("older", [b"ours, old", b""], ids=["of the same kind", "empty"])
def test_a_file_replaces_an_older_one_or_an_empty_one(older: bytes, tmp_path: Path) -> None:
    (tmp_path / "result").write_bytes(older)
    put_file(tmp_path / "result")
    assert content_of(tmp_path) == {"result": b"ours, new"}


@pytest.mark.parametrize("exists", [True, False], ids=["whole", "dangling"])
def test_a_file_is_written_through_a_link(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "real").write_bytes(b"ours, old")
    (tmp_path / "result").symlink_to("real")
    put_file(tmp_path / "result")
    assert content_of(tmp_path) == {"real": b"ours, new", "result": b"real"}


@pytest.mark.parametrize("exists", [True, False], ids=["to an empty folder", "dangling"])
def test_a_folder_is_written_through_a_link(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "real").mkdir()
    (tmp_path / "result").symlink_to("real")
    put_folder(tmp_path / "result")
    assert content_of(tmp_path / "real") == WHOLE
    assert (tmp_path / "result").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["real", "result"]


def test_an_empty_folder_stays_and_is_filled_as_a_mount_point_must(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    before = (tmp_path / "result").stat().st_ino
    put_folder(tmp_path / "result")
    assert content_of(tmp_path) == {f"result/{name}": value for name, value in WHOLE.items()}
    assert (tmp_path / "result").stat().st_ino == before


def test_folders_above_are_made_and_go_away_with_a_result_that_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "a" / "b" / "result"):
            assert (tmp_path / "a" / "b").is_dir()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert os.listdir(tmp_path) == []
    put_folder(tmp_path / "a" / "b" / "result")
    assert content_of(tmp_path / "a" / "b" / "result") == WHOLE


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_folder_that_is_not_finished_vanishes(tmp_path: Path, stop: type[BaseException]) -> None:
    def write_half(folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"x")
        raise stop

    def work() -> None:
        with output_folder(tmp_path / "model") as write:
            write(write_half)

    with pytest.raises(stop):
        work()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_older_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, b"old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    with pytest.raises(OSError, match="No space"), output_file(path, lambda _: True, "plan") as write:
        write(b"new")
    assert content_of(tmp_path) == {"plan.json": b"old"}


def test_an_older_folder_is_replaced_only_where_it_holds_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "result"
    out.mkdir()
    (out / "ours").write_text("old")
    (out / "sub").mkdir()
    with output_folder(out, is_older) as write:
        assert (out / "ours").read_text() == "old"
        write(fill)
    assert content_of(out) == WHOLE
    assert set(os.listdir(out)) == {"unet", "model.json"}
    with pytest.raises(FileExistsError, match="not empty"), output_folder(out, is_older):
        pass


def test_a_file_of_the_users_that_came_meanwhile_stays_and_the_result_goes_beside(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"

    def work() -> None:
        with output_file(path, is_ours, "plan") as write:
            path.write_bytes(b"mine")
            write(b"ours")

    with pytest.raises(MisplacedError) as raised:
        work()
    assert content_of(tmp_path) == {"plan.json": b"mine", "plan-2.json": b"ours"}
    assert f"the result is in {tmp_path / 'plan-2.json'}" in str(raised.value)


def test_a_folder_that_was_filled_meanwhile_stays_and_the_result_goes_beside(tmp_path: Path) -> None:
    path = tmp_path / "result"

    def work() -> None:
        with output_folder(path) as write:
            path.mkdir()
            (path / "notes").write_bytes(b"mine")
            write(fill)

    with pytest.raises(MisplacedError, match="result-2"):
        work()
    assert content_of(path) == {"notes": b"mine"}
    assert content_of(tmp_path / "result-2") == WHOLE


def test_where_the_place_is_gone_the_result_goes_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def work() -> None:
        with output_folder(tmp_path / "there" / "result") as write:
            os.rename(tmp_path / "there", tmp_path / "gone")
            (tmp_path / "there").write_text("now a file")
            write(fill)

    with pytest.raises(MisplacedError) as raised:
        work()
    assert content_of(tmp_path / "here" / "result-2") == WHOLE
    assert str(tmp_path / "here" / "result-2") in str(raised.value)


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put_file(Path("~/a/plan.json"))
    put_folder(Path("~/model"))
    assert (tmp_path / "a" / "plan.json").exists()
    assert content_of(tmp_path / "model") == WHOLE


def test_everything_has_the_permissions_that_umask_gives_whatever_a_library_set(tmp_path: Path) -> None:
    def fill_private(folder: Path) -> None:
        fill(folder)
        (folder / "unet" / "weights").chmod(0o600)

    before = os.umask(0o027)
    try:
        with output_folder(tmp_path / "model") as write:
            write(fill_private)
        put_file(tmp_path / "plan.json")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"model": 0o750, "unet": 0o750, "weights": 0o640, "model.json": 0o640, "plan.json": 0o640}


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    rename = os.rename

    def named(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in [source, *source.rglob("*")]} <= set(synced)
        rename(source, target)

    monkeypatch.setattr(os, "rename", named)
    put_folder(tmp_path / "model")
    assert synced[-1] == tmp_path.stat().st_ino


def test_names_that_are_no_utf_8_reach_libraries_in_a_form_that_they_take(tmp_path: Path) -> None:
    seen = []

    def library(folder: Path) -> None:
        seen.append(str(folder).encode())  # as safetensors does
        fill(folder)

    path = Path(os.fsdecode(os.fsencode(tmp_path / "m") + b"\xff"))
    with output_folder(path) as write:
        write(library)
    assert content_of(path) == WHOLE
    assert len(seen) == 1
