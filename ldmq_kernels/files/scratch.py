"""Locked scratch folders, in which results grow before they get their names.

A scratch folder ends in ".ldmq-part" and holds `LOCK`, which its process has locked, and what is written. The kernel
drops the lock when the process ends, however it ends: the next run to the same place finds the folder unlocked, says so
and removes it. Whatever else lies in such a folder is not from here, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ldmq_kernels.files.paths import printable

PART = ".ldmq-part"
# what a scratch folder may hold: the lock; a result that grows; one that is complete and moves to its place entry by
# entry; and what was in that place before
LOCK, RESULT, COMPLETE, OLDER = "lock", "result", "complete", "older"
_OURS = {LOCK, RESULT, COMPLETE, OLDER}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without them
_ATTEMPTS = 100  # each is lost to another process that has just removed the folder

logger = logging.getLogger("ldmq_kernels")


def move_entries(source: Path, target: Path) -> None:
    """Move what a folder holds, the *.json files last: without them no library takes the rest for a whole model."""
    for name in sorted(os.listdir(source), key=lambda name: (name.endswith(".json"), name)):
        os.replace(source / name, target / name)


def _check_is_ours(folder: Path, place: Path) -> None:
    """Refuse a folder of this name that no run made."""
    names = os.listdir(folder) if stat.S_ISDIR(folder.lstat().st_mode) else [""]
    # a link in it would have what is behind it moved or removed
    if not _OURS.issuperset(names) or any((folder / name).is_symlink() for name in names):
        raise FileExistsError(
            f"{printable(folder)} is where {printable(place)} would be prepared, and it is not from ldmq: rename it, "
            "or choose another place"
        )


def _locked(folder: Path, place: Path, *, wait: bool) -> int:
    """Make the folder, or take one that a killed run left; gives the handle of its lock."""
    for _ in range(_ATTEMPTS):
        is_new = True
        try:
            folder.mkdir()
        except FileExistsError:
            is_new = False
        handle = -1
        try:
            _check_is_ours(folder, place)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle), (folder / LOCK).stat()):
                return handle
        except FileNotFoundError:  # another process has just finished and removed it
            pass
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(
                f"another run is writing to {printable(place)}: wait for its end, or choose another place"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS and is_new:
                return handle
            if handle >= 0:
                os.close(handle)
            if error.errno in _NO_LOCKS:
                raise FileExistsError(
                    f"{printable(folder)} is of another run to {printable(place)}, and this file system cannot tell "
                    "whether that still goes on: remove it if none does"
                ) from None
            raise
        if handle >= 0:
            os.close(handle)
    raise BlockingIOError(f"{printable(place)} is in use by many runs: choose another place")


def _remove(folder: Path, place: Path) -> None:
    """Empty the folder but for its lock; first end what was moving in, or move back what made room for it."""
    found = set(os.listdir(folder))
    if COMPLETE in found:
        move_entries(folder / COMPLETE, place)
    elif OLDER in found:
        move_entries(folder / OLDER, place)
    for name in (RESULT, OLDER, COMPLETE):  # what is older must not be alone at any moment, or it would be moved back
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(folder: Path, place: Path, *, wait: bool = False) -> Iterator[Path]:
    """A locked scratch folder, which is gone when the block ends.

    Args:
        folder: its path, which ends in `PART`.
        place: what is prepared in it, for errors; a folder that is filled entry by entry is completed first, where a
            killed run had begun to.
        wait: for another process that has it, which is to be as quick; otherwise that is an error.

    Raises:
        BlockingIOError: another process has it.
        FileExistsError: something else has its name.
        OSError: it cannot be made.
    """
    handle = _locked(folder, place, wait=wait)
    try:
        if os.listdir(folder) != [LOCK]:
            _remove(folder, place)
            logger.warning("removed %s: a run to %s was killed and had left it", printable(folder), printable(place))
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder, place)
            (folder / LOCK).unlink()
            folder.rmdir()
        os.close(handle)
