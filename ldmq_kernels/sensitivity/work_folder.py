"""A folder of finished results: private to its owner, of one set of settings, with every damage found.

Each result is a safetensors file, its JSON in the header. Nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ldmq_kernels.files import PART, NotJsonError, printable, read_json, shortened, write_whole
from ldmq_kernels.numerics.checksum import checksum
from ldmq_kernels.sensitivity.stored import Stored

logger = logging.getLogger(__name__)

FORMAT = 4  # of the results: 1 had classes of other names, 2 was pickled, 3 knew no ends of trajectories
SETTINGS, LOCK = "settings.json", "lock"
SHOWN = 80  # characters of a value in a message


class WorkError(ValueError):
    """A folder that holds the work of something else, or that others could have written to."""


class _Damaged(Exception):
    """A file that is not a whole result of these settings."""


def check_private(folder: Path) -> None:
    """Refuse a folder that is not this user's alone.

    Raises:
        WorkError: it is a file, belongs to another user, or others may read or write it.
    """
    found, shown = folder.stat(), printable(folder)
    elsewhere = "or give a folder that does not exist yet, which is made private"
    if not stat.S_ISDIR(found.st_mode):
        raise WorkError(f"{shown} is a file, and the work goes into a folder: remove it, {elsewhere}")
    if found.st_uid != os.getuid():
        raise WorkError(
            f"{shown} belongs to the user {found.st_uid}, and results are taken only from a folder of one's own (you "
            f"are {os.getuid()}): work as that user, {elsewhere}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise WorkError(
            f"{shown} is open to other users (mode {stat.S_IMODE(found.st_mode):04o}), and results are taken only "
            f"from a private folder: if nobody else wrote to it, run `chmod 700 {shlex.quote(shown)}`, {elsewhere}"
        )


def _difference(earlier: Any, now: Any, path: str = "") -> str | None:
    """The first entry that differs, with both values, in the order of `now`; None where none does."""
    if isinstance(earlier, Mapping) and isinstance(now, Mapping):
        for key in [*now, *earlier]:
            found = _difference(earlier.get(key), now.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if earlier == now else f"{path} ({shortened(repr(earlier), SHOWN)}, now {shortened(repr(now), SHOWN)})"


class WorkFolder:
    """Results by stage and item.

    Args:
        path: the folder; it is made, for its owner alone, if it does not exist.
        settings: what the results depend on, as JSON.

    Raises:
        WorkError: the folder is not private, or holds something else than results of these settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        check_private(path)
        self._path = path
        settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        text = json.dumps(settings, indent=1)
        self._settings = hashlib.sha256(text.encode()).hexdigest()
        self._check_settings(settings)
        self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)  # held as long as this object lives
        weakref.finalize(self, os.close, self._lock)
        self._remove_parts()
        if not (path / SETTINGS).exists():
            write_whole(path / SETTINGS, text.encode())

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self._path / SETTINGS
        shown, another = printable(self._path), "give another folder, or remove this one"
        if not path.exists():
            strange = [p.name for p in sorted(self._path.iterdir()) if p.name != LOCK and not is_part(p)]
            if strange:
                raise WorkError(f"{shown} holds {strange[0]}, which is no work of ldmq: give another folder")
            return
        try:
            earlier = read_json(path)
        except NotJsonError:
            earlier = None
        if not isinstance(earlier, dict):
            raise WorkError(
                f"{printable(path)} is damaged, so that it is not known whose work lies beside it: {another}"
            )
        if earlier.get("format") != FORMAT:
            raise WorkError(f"{shown} holds work of another version of ldmq_kernels: {another}")
        difference = _difference(earlier, settings)
        if difference is not None:
            raise WorkError(
                f"{shown} holds work that was done with another {difference}: go on with the same settings, or "
                f"{another}"
            )

    def _remove_parts(self) -> None:
        """Remove what killed runs left half-written, if no other process is at work here."""
        with contextlib.suppress(OSError):  # another process holds it, or a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in [p for p in self._path.rglob("*") if is_part(p)]:
                logger.warning("removed %s, which a killed run left", printable(part))
                shutil.rmtree(part)
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _file(self, stage: str, item: str) -> Path:
        return self._path / stage / f"{hashlib.sha256(item.encode()).hexdigest()[:16]}.safetensors"

    def _seal(self, stage: str, item: str, text: str, stored: Stored) -> str:
        """What a whole result of this item, under these settings, has in its header."""
        tensors = sorted((name, str(t.dtype), list(t.shape), checksum(t)) for name, t in stored.tensors.items())
        sealed = json.dumps([self._settings, stage, item, text, tensors])
        return hashlib.sha256(sealed.encode()).hexdigest()

    def load(self, stage: str, item: str) -> Stored | None:
        """A result that was saved; None where there is none, or a damaged one, of which a warning tells."""
        path = self._file(stage, item)
        if not path.exists():
            return None
        try:
            return self._read(path, stage, item)
        except (_Damaged, SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s is damaged (%s): its result is computed again", printable(path), error)
            return None

    def _read(self, path: Path, stage: str, item: str) -> Stored:
        content = path.read_bytes()
        tensors = load(content)  # which refuses a header that is not whole
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text = header["result"]
        stored = Stored(json.loads(text), tensors)
        if header["seal"] != self._seal(stage, item, text, stored):
            raise _Damaged("it is not what was written for this item and these settings")
        return stored

    def save(self, stage: str, item: str, stored: Stored) -> None:
        """Keep a result, in a file that is written whole."""
        path = self._file(stage, item)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        text = json.dumps(stored.data)
        tensors = {name: _copied(tensor) for name, tensor in stored.tensors.items()}
        header = {"result": text, "seal": self._seal(stage, item, text, Stored(stored.data, tensors))}
        write_whole(path, save(tensors, header))


def _copied(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own: safetensors takes no two that share it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def is_part(path: Path) -> bool:
    """Whether this is what `write_whole` leaves of a file when its process is killed."""
    return path.name.endswith(PART)
