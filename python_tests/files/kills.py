"""Copies of a process that are killed at one moment after the other of their work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from ldmq_kernels.files import PART, finish_writing_into, output_file, output_folder, write_into
from python_tests.files.places import WHOLE, content_of, fill, is_older, is_ours, put_file, put_folder

MOMENTS = 40  # calls that change the disk, more than a result takes


def killed(work: Callable[[], object]) -> bool:
    """Whether a copy of this process was killed by itself while it worked."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """The same, the kill coming before the n-th call that changes the disk."""
    left = iter(range(moment))

    def ends(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    def shortened() -> None:
        for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, ends(getattr(os, name)))
        work()

    return killed(shortened)


def kill_now(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fresh(folder: Path) -> None:
    put_folder(folder / "model")


def into_empty(folder: Path) -> None:
    (folder / "model").mkdir(exist_ok=True)
    put_folder(folder / "model")


def over_older(folder: Path) -> None:
    with output_folder(folder / "model", is_older) as write:
        write(fill)


def over_file(folder: Path) -> None:
    put_file(folder / "plan", b"ours, new")


def into_used(folder: Path) -> None:
    def shards(place: Path) -> None:
        for name in ("1", "2", "index.json"):
            (place / name).write_bytes(b"new")

    write_into(folder / "model", shards, lambda _: ["whole", "1"])


def next_run(place: Path, work: Callable[[Path], None]) -> bool:
    """Begin another run to the same place; whether it finds the place in use."""
    if work is into_used:
        finish_writing_into(place / "model")
        return False
    try:
        if work is over_file:
            with output_file(place / "plan", is_ours, "plan"):
                return False
        with output_folder(place / "model", is_older):
            return False
    except FileExistsError:
        return True


def try_all(name: str, folder: str) -> int:
    """Kill a work at each moment, begin another one, and check what is there; the number of moments.

    Args:
        name: of the work, a function of this file.
        folder: an empty one.
    """
    work: Callable[[Path], None] = globals()[name]
    new = {f"model/{part}": value for part, value in WHOLE.items()}
    old: dict[str, bytes] = {}
    if work is over_older:
        old = {"model/ours": b"old", "model/more.json": b"old"}
    if work is over_file:
        old, new = {"plan": b"ours, old"}, {"plan": b"ours, new"}
    if work is into_used:
        users = {"model/2.backup": b"mine"}
        old = {"model/whole": b"old", "model/1": b"old", "model/index.json": b"old", **users}
        new = {f"model/{part}": b"new" for part in ("1", "2", "index.json")} | users
    for moment in range(MOMENTS):
        place = Path(folder) / str(moment)
        place.mkdir()
        for part, value in old.items():
            (place / part).parent.mkdir(exist_ok=True)
            (place / part).write_bytes(value)
        was_killed = killed_at(moment, lambda place=place: work(place))
        in_use = next_run(place, work)
        found = content_of(place)
        if work is into_used:  # what a kill leaves that moved nothing is no concern of whoever reads
            found = {name: value for name, value in found.items() if f"{PART}/" not in name}
        assert found == new if in_use else found in (old, new), (moment, found)
        if not was_killed:
            assert found == new
            return moment
    raise AssertionError("not all moments were tried")
