"""Places for results: tried and locked before the work, filled whole or not at all, and never over a user's own files.

    with output_folder(out) as write:  # refused here, not after the work
        model = hours_of_work()
        write(model.save_pretrained)

A path that is a link stands for what is behind the link. Where a place turns bad while the work goes on, the result
goes to another one, and `MisplacedError` says where.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ldmq_kernels.files.paths import alias_in_ascii, printable
from ldmq_kernels.files.scratch import COMPLETE, OLDER, PART, RESULT, move_entries, scratch

Fill = Callable[[Path], object]
IsOlder = Callable[[Path, Collection[str]], bool]


class MisplacedError(Exception):
    """A result is whole, but lies in another place than was asked for, which the text names."""


def _behind_links(path: Path) -> Path:
    target = Path(os.path.realpath(path.expanduser()))
    if target.is_symlink():
        raise OSError(f"{printable(path)} is a link that leads in a circle: choose another place")
    return target


def _sync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not all file systems do this for folders
        _sync(folder)


@contextlib.contextmanager
def _reserved(folder: Path, place: Path, path: Path) -> Iterator[Path]:
    """A scratch folder beside or in a place, and the folders above, of which those that stay empty go away again."""
    with contextlib.ExitStack() as stack:
        try:
            missing = list(itertools.takewhile(lambda above: not above.exists(), folder.parents))
            exists = folder.parents[len(missing)]
            if not exists.is_dir():
                raise NotADirectoryError(
                    f"{printable(path)} is below {printable(exists)}, which is no folder: choose another place"
                )
            stack.callback(_remove_empty, missing)
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = stack.enter_context(scratch(folder, place))
        except OSError as error:
            if error.strerror is None:  # it is in this package's words
                raise
            found = OSError(f"{printable(path)} cannot be written ({error.strerror}): choose another place")
            found.errno = error.errno
            raise found from None
        yield part


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _check_file(path: Path, is_older: Callable[[Path], bool] | None = None, kind: str = "") -> None:
    """Refuse a place that is no file, or a file that nobody asked to replace."""
    path, shown = path.expanduser(), printable(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{shown} is a folder: give the name of a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(
            f"{shown} is a device or a pipe: a result is written whole or not at all, give the name of a file"
        )
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{shown} is there already, and write-protected: choose another name, or remove it")
    if is_older is not None and found.st_size and not is_older(path):
        raise FileExistsError(f"{shown} is there already, and is no {kind}: choose another name, or remove it")


def _beside(target: Path) -> Path:
    return target.parent / (target.name + PART)


def _put_file(part: Path, target: Path, content: bytes) -> None:
    with (part / RESULT).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part / RESULT, target)
    _sync_names(target.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there once it is complete, over an older one.

    Raises:
        OSError: the disk is full, the folder cannot be written, or the path is no file; an older file is untouched.
    """
    _check_file(path)
    target = _behind_links(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(_beside(target), target, wait=True) as part:
        _put_file(part, target, content)


def check_place(path: Path) -> None:
    """Refuse a place to which `write_whole` could not write, before the work whose results go there as they come.

    Raises:
        OSError: the place cannot be written, or is no file; its text says so.
    """
    _check_file(path)
    target = _behind_links(path)
    with _reserved(_beside(target), target, path):
        pass


@contextlib.contextmanager
def output_file(path: Path, is_older: Callable[[Path], bool], kind: str) -> Iterator[Callable[[bytes], None]]:
    """Reserve the place of a file, and give the function that writes its content.

    Args:
        path: where to; "~" is the user's home.
        is_older: whether a file that is there already is one of the same kind, which may be replaced.
        kind: its name, for errors.

    Raises:
        OSError: the place cannot be written, holds something else, or another run is writing to it; its text says so.
        MisplacedError: from the function: the content lies elsewhere, since the place turned bad.
    """
    _check_file(path, is_older, kind)
    target = _behind_links(path)
    with _reserved(_beside(target), target, path) as part:

        def write(content: bytes) -> None:
            try:
                _check_file(path, is_older, kind)
                _put_file(part, target, content)
            except OSError as error:
                raise _rescued(path, target, error, lambda place: write_whole(place, content)) from error

        yield write


def _check_free(path: Path, target: Path, is_older: IsOlder | None) -> None:
    """Refuse a folder with anything in it that nobody asked to replace."""
    if not target.is_dir():
        if os.path.lexists(target):
            raise FileExistsError(f"{printable(path)} is there already, and no folder: choose another place")
        return
    names = set(os.listdir(target)) - {PART}
    if names and not (is_older is not None and is_older(target, names)):
        raise FileExistsError(f"{printable(path)} exists already and is not empty: choose another place, or remove it")


def _settle(result: Path) -> None:
    """Give all files the permissions of any new file, whatever a library gave them, and bring them to the disk."""
    mode = result.stat().st_mode & 0o666
    for root, _, names in os.walk(result):
        for file in (Path(root, name) for name in names):
            file.chmod(mode)
            _sync(file)
        _sync_names(Path(root))


def _put_folder(part: Path, target: Path, fill: Fill) -> None:
    """Fill a scratch folder and make it the target: by its name, or entry by entry where it lies in the target."""
    result = part / RESULT
    result.mkdir()
    with alias_in_ascii(result) as place:
        fill(place)
    _settle(result)
    if part.parent != target:
        os.rename(result, target)
    else:
        _move_in(part, target, set(os.listdir(target)) - {PART})
    _sync_names(target.parent)


def _move_in(part: Path, target: Path, older: Collection[str]) -> None:
    """Let a complete result take the place of what is older, by names in the folder that both lie in."""
    if older:
        (part / OLDER).mkdir()
        for name in sorted(older):
            os.replace(target / name, part / OLDER / name)
    os.rename(part / RESULT, part / COMPLETE)  # until here a kill leaves the older one, from here on the new one
    move_entries(part / COMPLETE, target)
    _sync_names(target)


def write_into(folder: Path, fill: Fill, older: Callable[[Path], Collection[str]]) -> None:
    """Write files to a folder in which others may lie: a kill at any moment leaves the older ones or the new ones.

    A kill while they are moved leaves some of both, until `finish_writing_into` or another call of this.

    Args:
        folder: the path, made where it is not there.
        fill: writes the files to the folder that it is given.
        older: the names in the folder, given its path, that they take the place of beside those of their own names.

    Raises:
        OSError: the folder cannot be written, or something that is no file or is write-protected has the name of a
            file; the older files are untouched.
    """
    target = _behind_links(folder)
    target.mkdir(parents=True, exist_ok=True)
    with scratch(target / PART, target, wait=True) as part:
        result = part / RESULT
        result.mkdir()
        with alias_in_ascii(result) as place:
            fill(place)
        _settle(result)
        names = os.listdir(result)
        replaced = set(older(target)) - set(names)
        for name in (*names, *replaced):
            _check_file(target / name)
        _move_in(part, target, replaced)


def finish_writing_into(folder: Path) -> None:
    """Complete or undo what a killed run had begun to move into a folder or away from it, if anything.

    Raises:
        OSError: the folder cannot be written; its text says so.
    """
    part = folder / PART
    if not ((part / COMPLETE).exists() or (part / OLDER).exists()):
        return
    try:
        with scratch(part, folder, wait=True):
            pass
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        told = OSError(
            f"{printable(folder)} holds files of two saves, of which the second was killed, and it cannot be put in "
            f"order here ({error.strerror}): load it once where the folder may be written"
        )
        told.errno = error.errno
        raise told from None


@contextlib.contextmanager
def output_folder(path: Path, is_older: IsOlder | None = None) -> Iterator[Callable[[Fill], None]]:
    """Reserve the place of a folder, and give the function that fills it.

    An empty folder, such as the mount point of a volume, stays and is filled; its own folder is not written to. The
    function takes another one, which is given a new folder to write to, and may be called again with another.

    Args:
        path: where to; "~" is the user's home.
        is_older: whether a folder, with the names in it, holds an earlier result and nothing else, and so may be
            replaced; none may be where it is None.

    Raises:
        OSError: the place cannot be written, holds something else, or another run is writing to it; its text says so.
        MisplacedError: from the function: the result lies elsewhere, since the place turned bad.
    """
    target = _behind_links(path)
    is_there = target.is_dir()
    if is_there and os.path.lexists(_beside(target)):  # of a run to which the folder was new
        with scratch(_beside(target), target):
            pass
    if not (is_there and PART in os.listdir(target)):
        _check_free(path, target, is_older)
    with _reserved(target / PART if is_there else _beside(target), target, path) as part:
        _check_free(path, target, is_older)

        def write(fill: Fill) -> None:
            try:
                _check_free(path, target, is_older)
                _put_folder(part, target, fill)
            except Exception as error:  # libraries have errors of their own for a full disk
                raise _rescued(path, target, error, lambda place: _fill_new(place, fill)) from error

        yield write


def _fill_new(target: Path, fill: Fill) -> None:
    with scratch(_beside(target), target) as part:
        _put_folder(part, target, fill)


def _other_places(target: Path) -> Iterator[Path]:
    """Free names for a result beside its place, in the current folder, at home and among temporary files."""
    for folder in (lambda: target.parent, Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):
            names = (f"{target.stem}-{number}{target.suffix}" for number in itertools.count(2))
            yield next(place for name in names if not os.path.lexists(place := folder() / name))


def _rescued(path: Path, target: Path, error: Exception, put: Callable[[Path], None]) -> MisplacedError:
    """Put a result elsewhere, and tell where; the error itself where no place takes it."""
    for place in _other_places(target):
        try:
            put(place)
        except Exception:  # no better than the first place
            continue
        return MisplacedError(
            f"{printable(path)} could not be written at the end ({error}): the result is in {printable(place)}"
        )
    raise error
