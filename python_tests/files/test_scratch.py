"""Two runs to one place, and what a run leaves that is killed at any moment."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldmq_kernels.files import finish_writing_into, output_folder, write_into, write_whole
from python_tests.files.kills import kill_now, killed
from python_tests.files.places import WHOLE, content_of, fill, put_file, put_folder
from python_tests.processes import ROOT


def test_the_second_run_to_one_place_is_refused_by_name_and_the_first_goes_on(tmp_path: Path) -> None:
    with output_folder(tmp_path / "model") as write:
        for second in (put_folder, put_file):
            with pytest.raises(BlockingIOError, match=f"another run is writing to {tmp_path}/model"):
                second(tmp_path / "model")
        write(fill)
    assert content_of(tmp_path / "model") == WHOLE


def test_a_second_run_is_refused_through_a_link_and_into_an_empty_folder_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    with output_folder(tmp_path / "model"), pytest.raises(BlockingIOError, match="another run is writing"):
        put_folder(tmp_path / "link")


def test_quick_writes_to_one_place_wait_for_each_other(tmp_path: Path) -> None:
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(8):
                    write_whole(tmp_path / "cache.json", b"%d" % number * 1000)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    (name,) = os.listdir(tmp_path)
    assert len(set((tmp_path / name).read_bytes())) == 1


def test_what_a_killed_run_left_is_named_and_removed_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def half(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        kill_now()

    def work() -> None:
        with output_folder(tmp_path / "model") as write:
            write(half)

    assert killed(work)
    assert os.listdir(tmp_path) == ["model.ldmq-part"]
    with caplog.at_level(logging.WARNING):
        put_folder(tmp_path / "model")
    assert f"removed {tmp_path}/model.ldmq-part" in caplog.text
    assert content_of(tmp_path) == {f"model/{name}": value for name, value in WHOLE.items()}


@pytest.mark.parametrize("name", ["fresh", "into_empty", "into_used", "over_older", "over_file"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_after_the_next_run(name: str, tmp_path: Path) -> None:
    # a process without torch forks in no time
    program = f"from python_tests.files.kills import try_all; print(try_all({name!r}, {str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    assert "had left it" in done.stderr


@pytest.mark.parametrize("state", ["empty", "lock alone"])
def test_a_run_that_was_killed_early_is_no_obstacle(state: str, tmp_path: Path) -> None:
    (tmp_path / "plan.ldmq-part").mkdir()
    if state == "lock alone":
        (tmp_path / "plan.ldmq-part" / "lock").touch()
    put_file(tmp_path / "plan")
    assert content_of(tmp_path) == {"plan": b"ours, new"}


def test_without_locks_a_part_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    put_file(tmp_path / "plan")
    (tmp_path / "plan.ldmq-part").mkdir()
    (tmp_path / "plan.ldmq-part" / "result").write_bytes(b"half")
    with pytest.raises(FileExistsError, match="remove it if none does"):
        put_file(tmp_path / "plan")
    assert (tmp_path / "plan.ldmq-part" / "result").read_bytes() == b"half"
    shutil.rmtree(tmp_path / "plan.ldmq-part")
    put_file(tmp_path / "plan")


# -- into folders of others -------------------------------------------------------------------------------


def into(folder: Path) -> None:
    write_into(folder, lambda place: (place / "weights").write_bytes(b"new"), lambda _: ())


def test_a_folder_that_is_no_file_is_left_whole_where_a_file_would_go(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "notes").write_text("mine")
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}/weights is a folder"):
        into(tmp_path)
    assert content_of(tmp_path) == {"weights/notes": b"mine"}


def test_links_in_a_part_are_not_followed(tmp_path: Path) -> None:
    """As in a model of somebody else's: what is behind would be moved to the model."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes").write_text("mine")
    part = tmp_path / "model" / ".ldmq-part"
    part.mkdir(parents=True)
    (part / "complete").symlink_to(tmp_path / "home")
    for work in (into, finish_writing_into):
        with pytest.raises(FileExistsError, match="it is not from ldmq"):
            work(tmp_path / "model")
    assert (tmp_path / "home" / "notes").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_put_in_order_is_named(tmp_path: Path) -> None:
    part = tmp_path / ".ldmq-part"
    (part / "complete").mkdir(parents=True)
    part.chmod(0o500)
    with pytest.raises(OSError, match=f"{tmp_path} holds files of two saves.*may be written"):
        finish_writing_into(tmp_path)
    part.chmod(0o700)
