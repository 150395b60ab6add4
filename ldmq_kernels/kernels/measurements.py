"""The file of measurements of a GPU: the fastest tiles and backends, and what is switched off on it.

    "tiles": {"linear_w8a8 64x40x320": {"rows": 64, ...}}
    "cuda_tiles": {"linear_w8a8 64x40x320": "sm90 128x160x128x4"}
    "backends": {"linear_w8a8": {"64x320 to 40": {"backend": "cuda", "milliseconds": {"triton": 0.061, "cuda": 0.055}}}}
    "switched_off": {"linear_w8a8": {"cuda": {"reason": "differs by ...", "date": "2026-01-31", "version": "0.1.0"}}}
    "dependent_launch": {"is_on": true, "reason": "equal, and 4 % faster", "date": "2026-01-31", "version": "0.1.0"}

`ldmq bench --tune` writes all but the last two. A user's file goes before the one that ships, line by line. `ldmq
doctor` writes "switched_off" and "dependent_launch", to the user's file alone. They hold for the version of this
package that wrote them: another one may have mended the kernel, and is to be checked by its own doctor.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch

from ldmq_kernels.files import NotJsonError, read_json, shortened, write_whole
from ldmq_kernels.kernels.backend import DEFINITION
from ldmq_kernels.kernels.gpu import cache_folder, file_name, gpu_of
from ldmq_kernels.version import __version__

_MEASURED = ("tiles", "cuda_tiles", "backends")
SHIPPED = Path(__file__).parent / "tuned"

Cache = TypeVar("Cache", bound=Callable[..., Any])
_caches: list[Any] = []


def emptied_by_forget(cache: Cache) -> Cache:
    """Let `forget` empty a cache of what was read from the files: a decorator over functools.cache."""
    _caches.append(cache)
    return cache


def forget() -> None:
    """Read the files again when they are next asked for."""
    for cache in _caches:
        cache.cache_clear()


@functools.cache
def warn_once(text: str) -> None:
    """Warn, unless these words were said already."""
    warnings.warn(text, stacklevel=2)


def user_file(device: torch.device) -> Path:
    """This user's measurements on a device.

    Raises:
        FileNotFoundError: the user has no home.
    """
    return cache_folder() / file_name(gpu_of(device))


def _damaged(path: Path, why: object) -> str:
    return f"{path} is damaged ({why}): remove it, then run `ldmq bench --tune` and `ldmq doctor` again"


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file of measurements; empty where there is none.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except NotJsonError as error:
        raise ValueError(_damaged(path, error)) from None
    if not isinstance(content, dict) or not isinstance(content.get("tiles"), dict):
        raise ValueError(_damaged(path, 'an object with "tiles" is expected'))
    return content


@emptied_by_forget
@functools.cache
def _contents(device: torch.device) -> tuple[tuple[Path, dict[str, Any]], ...]:
    """The file that ships and the user's; one that is damaged is told, and counts as empty."""
    name = file_name(gpu_of(device))
    found = []
    for place in (lambda: SHIPPED / name, lambda: user_file(device)):
        path, content = Path(name), {}
        try:
            path = place()
            content = read_file(path)
        except (ValueError, OSError) as error:
            warn_once(f"{error}; until then no backend is chosen by this file, and none is switched off")
        found.append((path, content))
    return tuple(found)


def _section(path: Path, content: dict[str, Any], *names: str) -> dict[str, Any]:
    """A dict inside a file, empty where it is missing; one that is no dict is told, and counts as empty."""
    found: Any = content
    for name in names:
        found = found.get(name, {})
        if not isinstance(found, dict):
            told = f"{' '.join(map(repr, names))}: {name!r} is {shortened(repr(found))}, must be an object"
            warn_once(_damaged(path, told))
            return {}
    return found


def fastest_backends(op: str, device: torch.device, accepted: Collection[str]) -> dict[str, str]:
    """The fastest backend of an op by the text of a shape.

    Args:
        op: its name.
        device: a GPU.
        accepted: the names that a measurement may have; another one is reported, and ignored.
    """
    fastest: dict[str, str] = {}
    for path, content in _contents(device):
        for text, line in _section(path, content, "backends", op).items():
            name = line.get("backend") if isinstance(line, dict) else line
            if isinstance(name, str) and name in accepted:
                fastest[text] = name
            else:
                choice = ", ".join(accepted)
                warn_once(
                    _damaged(
                        path, f"the backend of {op} at {text!r} is {shortened(repr(name))}, must be one of {choice}"
                    )
                )
    return fastest


@emptied_by_forget
@functools.cache
def section(device: torch.device, name: str) -> dict[str, Any]:
    """The lines of a part of the files, such as "cuda_tiles"; the user's before those that ship."""
    lines: dict[str, Any] = {}
    for path, content in _contents(device):
        lines |= _section(path, content, name)
    return lines


def fingerprint(device: torch.device) -> str:
    """A digest of what was measured on a device, which changes with it; empty where nothing was."""
    measured = [content for _, content in _contents(device) if any(content.get(name) for name in _MEASURED)]
    text = json.dumps([{name: content.get(name) for name in _MEASURED} for content in measured], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if measured else ""


@emptied_by_forget
@functools.cache
def off(op: str, device: torch.device) -> dict[str, str]:
    """Why each backend is switched off for an op, by this version of the package."""
    path, content = _contents(device)[-1]
    reasons = {}
    for name, line in _section(path, content, "switched_off", op).items():
        if not isinstance(line, dict) or not {"reason", "date", "version"} <= set(line):
            told = f"what switches {op} off on {name!r} is {shortened(repr(line))}"
            warn_once(_damaged(path, f"{told}, must have a reason, a date and a version"))
        elif line["version"] == __version__ and name != DEFINITION:
            reasons[name] = f"{line['reason']} ({line['date']}, ldmq_kernels {line['version']})"
    return reasons


def switched_off(op: str, backend: str, device: torch.device) -> str | None:
    """Why an op is switched off on a backend, with the date and the version that found it; None where it is not."""
    return off(op, device).get(backend)


def switch_off(op: str, backend: str, device: torch.device, reason: str) -> None:
    """Let the next backend serve an op on devices of this kind, in this process and in later ones.

    Args:
        op: its name.
        backend: any but the reference, by which the others are judged.
        device: one of the kind.
        reason: what is wrong.

    Raises:
        ValueError: the backend is the reference, or the user's file is damaged.
        OSError: the file cannot be written.
    """
    if backend == DEFINITION:
        raise ValueError(f"{op} on the reference backend defines the op: it cannot be switched off")
    content = _for_change(device)
    line = {"reason": reason, "date": datetime.date.today().isoformat(), "version": __version__}
    content.setdefault("switched_off", {}).setdefault(op, {})[backend] = line
    _write(device, content)


def switch_on(op: str, backend: str, device: torch.device) -> bool:
    """Undo `switch_off`.

    Returns:
        Whether anything was switched off, by whatever version.

    Raises:
        ValueError: the user's file is damaged.
        OSError: it cannot be written.
    """
    try:
        content = _for_change(device)
    except OSError:  # without a home that can be read nothing is switched off
        return False
    ops = content.get("switched_off", {})
    if backend not in ops.get(op, {}):
        return False
    del ops[op][backend]
    content["switched_off"] = {name: backends for name, backends in ops.items() if backends}
    _write(device, content)
    return True


@emptied_by_forget
@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether this version's doctor found that kernels may be launched before the one in front of them has ended."""
    path, content = _contents(device)[-1]
    line = _section(path, content, "dependent_launch")
    return line.get("version") == __version__ and line.get("is_on") is True


def launch_early(device: torch.device, is_on: bool, reason: str) -> None:
    """Let kernels be launched early on devices of this kind or not, in this process and in later ones.

    Args:
        device: one of the kind.
        is_on: whether they may be.
        reason: what was found.

    Raises:
        ValueError: the user's file is damaged.
        OSError: the file cannot be written.
    """
    content = _for_change(device)
    line = {"is_on": is_on, "reason": reason, "date": datetime.date.today().isoformat(), "version": __version__}
    content["dependent_launch"] = line
    _write(device, content)


def refuse(device: torch.device, keys: Collection[str], tile: Any, reason: str) -> None:
    """Let the tuner leave out a tile for products on devices of this kind, as one that it found to be wrong.

    Args:
        device: one of the kind.
        keys: the products, as the file names them.
        tile: as the file has it.
        reason: what is wrong.

    Raises:
        ValueError: the user's file is damaged.
        OSError: the file cannot be written.
    """
    content = _for_change(device)
    refused = content.setdefault("refused", {})
    for key in keys:
        refused[key] = [line for line in refused.get(key, []) if line[0] != tile] + [[tile, reason]]
    _write(device, content)


def _for_change(device: torch.device) -> dict[str, Any]:
    path = user_file(device)
    content = read_file(path) or {"gpu": gpu_of(device).name, "tiles": {}}
    ops = content.get("switched_off", {})
    if not isinstance(ops, dict) or not all(isinstance(backends, dict) for backends in ops.values()):
        raise ValueError(_damaged(path, '"switched_off" must hold an object for each op'))
    return content


def _write(device: torch.device, content: dict[str, Any]) -> None:
    write_whole(user_file(device), (json.dumps(content, indent=1) + "\n").encode())
    forget()
