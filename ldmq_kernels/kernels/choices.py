"""Which backend serves an op at a shape: what was measured on this GPU, and what is switched off on it.

Both stand in the GPU's file of measurements, beside the tiles (see `triton.configurations`):

    "backends": {"linear_w8a8": {"64x320 to 40": {"backend": "cuda", "milliseconds": {"triton": 0.061, "cuda": 0.055}}}}
    "switched_off": {"linear_w8a8": {"cuda": {"reason": "differs by ...", "date": "2026-01-31", "version": "0.1.0"}}}

`ldmq bench --tune` writes "backends"; a user's file goes before the one that ships, shape by shape. A shape that is
not in it takes the usual order, however near a measured one is. `ldmq doctor` writes "switched_off", to the user's
file alone. It holds for the version of this package that wrote it: another one may have mended the kernel, and is
to be checked by its own doctor.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import json
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldmq_kernels.files import write_whole
from ldmq_kernels.kernels.triton import configurations
from ldmq_kernels.version import __version__

PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("cpu", "reference")}
MEASURABLE = ("triton", "cuda", "reference")  # what a line of "backends" may name
MOST_SHAPES = 4096  # remembered for an op and device

Arguments = tuple[Any, ...]
_SCALE_AT = {  # the argument with an element, or a row, for each column of the output
    "linear_w8a8": 3,
    "linear_w4a8": 4,
    "linear_static_w8a8": 4,
    "linear_w8a16": 2,
    "linear_w4a16": 2,
    "conv2d_w8a8": 3,
    "conv2d_w4a8": 4,
    "conv2d_w8a16": 2,
}
_KERNEL_AT = {"conv2d_w8a8": 7, "conv2d_w4a8": 8, "conv2d_w8a16": 4}  # then stride, padding, dilation, groups, upsample
_INV_SCALE_AT = {"group_norm_silu_quantize": 6, "layer_norm_quantize": 4, "geglu_quantize": 1, "silu_quantize": 1}


def _key_of(op: str) -> Callable[[Arguments], tuple[Any, ...]]:
    """What tells the shapes of an op's calls apart: quick to make and to hash."""
    if op in _KERNEL_AT:
        scale, at = _SCALE_AT[op], _KERNEL_AT[op]
        return lambda a: (a[0].shape, a[scale].shape[0], *a[at], *a[at + 1], *a[at + 3], a[at + 4], a[at + 5])
    if op in _SCALE_AT:
        scale = _SCALE_AT[op]
        return lambda a: (a[0].shape, a[scale].shape[0])
    if op == "group_norm_silu_quantize":
        at = _INV_SCALE_AT[op]
        return lambda a: (a[0].shape, a[at] is None, a[at + 2])
    if op in _INV_SCALE_AT:
        at = _INV_SCALE_AT[op]
        return lambda a: (a[0].shape, a[at] is None)
    return lambda a: (a[0].shape,)


def _x(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _text(op: str, key: tuple[Any, ...]) -> str:
    """A key as people read it, and as it stands in the file; the rows of a matrix are one number."""
    shape, *rest = key
    if op in _KERNEL_AT:
        columns, r, s, stride_y, stride_x, *dilation, groups, upsample = rest
        text = f"{_x(*shape)} to {columns}, kernel {_x(r, s)}, stride {_x(stride_y, stride_x)}, upsample {upsample}"
        unusual = {"dilation": _x(*dilation)} if dilation != [1, 1] else {}
        unusual |= {"groups": groups} if groups != 1 else {}
        return text + "".join(f", {name} {value}" for name, value in unusual.items())
    is_picture = len(shape) == 4 and op in ("quantize_static", "quantize_per_sample", "group_norm_silu_quantize")
    text = _x(*shape) if is_picture else _x(torch.Size(shape[:-1]).numel(), *shape[-1:])
    if op in _SCALE_AT:
        return f"{text} to {rest[0]}"
    if op in _INV_SCALE_AT:
        measured, *per_token = rest
        return f"{text}, {'static' if not measured else 'per token' if all(per_token) else 'per sample'}"
    return text


def shape_text(op: str, arguments: Arguments) -> str:
    """The shapes of a call, as the table has them: "8192x640 to 5120" for a linear of so many rows.

    Padding, data types and what the epilogue adds are not part of it.

    Args:
        op: its name.
        arguments: all that the op takes.
    """
    return _text(op, _key_of(op)(arguments))


@dataclass(frozen=True, slots=True)
class Choice:
    """What holds for one op on one device.

    usual: the backends in the order without a measurement.
    off: why a backend is switched off, by its name.
    measured: the order by the text of a shape, where the best backend is another than the usual one.
    """

    op: str
    usual: tuple[str, ...]
    off: dict[str, str]
    measured: dict[str, tuple[str, ...]]
    key: Callable[[Arguments], tuple[Any, ...]]
    known: dict[Hashable, tuple[str, ...]] = field(default_factory=dict)

    def order(self, arguments: Arguments) -> tuple[str, ...]:
        """The backends for a call, the best first."""
        if not self.measured:
            return self.usual
        key = self.key(arguments)
        found = self.known.get(key)
        if found is None:
            if len(self.known) >= MOST_SHAPES:
                self.known.clear()
            found = self.known[key] = self.measured.get(_text(self.op, key), self.usual)
        return found


_choices: dict[tuple[str, torch.device], Choice] = {}


def choice(op: str, device: torch.device) -> Choice:
    """What holds for an op on a device; the files are read once."""
    found = _choices.get((op, device))
    if found is None:
        usual = PREFERENCE.get(device.type, ("reference",))
        best = _best(op, device) if device.type == "cuda" else {}
        measured = {text: tuple(dict.fromkeys((name, *usual))) for text, name in best.items() if name != usual[0]}
        found = _choices[op, device] = Choice(op, usual, _off(op, device), measured, _key_of(op))
    return found


def backend_order(op: str, arguments: Arguments, device: torch.device) -> tuple[str, ...]:
    """The backends that a call is offered to, one after the other; those switched off are among them."""
    return choice(op, device).order(arguments)


def forget() -> None:
    """Read the files again at the next choice."""
    _choices.clear()
    _contents.cache_clear()
    cuda_tiles.cache_clear()


@functools.cache
def warn_once(text: str) -> None:
    """Warn, unless these words were said already."""
    warnings.warn(text, stacklevel=2)


def user_file(device: torch.device) -> Path:
    """This user's measurements on a device."""
    return configurations.cache_folder() / configurations.file_name(configurations.gpu_of(device))


def _damaged(path: Path, why: object) -> str:
    return f"{path} is damaged ({why}): remove it, then run `ldmq bench --tune` and `ldmq doctor` again"


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file of measurements; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(_damaged(path, error)) from None
    if not isinstance(content, dict) or not isinstance(content.get("tiles"), dict):
        raise ValueError(_damaged(path, 'an object with "tiles" is expected'))
    return content


@functools.cache
def _contents(device: torch.device) -> tuple[tuple[Path, dict[str, Any]], ...]:
    """The file that ships and the user's; one that is damaged is told, and counts as empty."""
    name = configurations.file_name(configurations.gpu_of(device))
    found = []
    for place in (lambda: configurations.SHIPPED / name, lambda: user_file(device)):
        path, content = Path(name), {}
        try:
            path = place()
            content = read_file(path)
        except (ValueError, OSError, RuntimeError) as error:  # the last where a user has no home
            warn_once(f"{error}; until then no backend is chosen by this file, and none is switched off")
        found.append((path, content))
    return tuple(found)


def _section(path: Path, content: dict[str, Any], *names: str) -> dict[str, Any]:
    """A dict inside a file, empty where it is missing; one that is no dict is told, and counts as empty."""
    found: Any = content
    for name in names:
        found = found.get(name, {})
        if not isinstance(found, dict):
            warn_once(_damaged(path, f"{' '.join(map(repr, names))}: {name!r} is {found!r}, must be an object"))
            return {}
    return found


def _best(op: str, device: torch.device) -> dict[str, str]:
    """The fastest backend by the text of a shape, where it is there and has the op."""
    best: dict[str, str] = {}
    for path, content in _contents(device):
        for text, line in _section(path, content, "backends", op).items():
            name = line.get("backend") if isinstance(line, dict) else line
            if name in MEASURABLE:
                best[text] = name
            else:
                accepted = ", ".join(MEASURABLE)
                warn_once(_damaged(path, f"the backend of {op} at {text!r} is {name!r}, must be one of {accepted}"))
    there = {name for name in set(best.values()) if _has(name, op, device)}
    return {text: name for text, name in best.items() if name in there}


def _has(name: str, op: str, device: torch.device) -> bool:
    backend = importlib.import_module(f"ldmq_kernels.kernels.{name}")
    return bool(backend.serves(device)) and hasattr(backend, op)


@functools.cache
def cuda_tiles(device: torch.device) -> dict[str, str]:
    """The fastest tile of the CUDA backend by "op rowsxcolumnsxdepth"; the user's file before the one that ships."""
    found: dict[str, str] = {}
    for path, content in _contents(device):
        found |= _section(path, content, "cuda_tiles")
    return found


def _off(op: str, device: torch.device) -> dict[str, str]:
    """Why each backend is switched off for an op, by this version of the package."""
    path, content = _contents(device)[-1]
    reasons = {}
    for name, line in _section(path, content, "switched_off", op).items():
        if not isinstance(line, dict) or not {"reason", "date", "version"} <= set(line):
            told = f"what switches {op} off on {name!r} is {line!r}, must have a reason, a date and a version"
            warn_once(_damaged(path, told))
        elif line["version"] == __version__ and name != "reference":
            reasons[name] = f"{line['reason']} ({line['date']}, ldmq_kernels {line['version']})"
    return reasons


def switched_off(op: str, backend: str, device: torch.device) -> str | None:
    """Why an op is switched off on a backend, with the date and the version that found it; None where it is not."""
    return choice(op, device).off.get(backend)


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
    if backend == "reference":
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
    content = _for_change(device)
    off = content.get("switched_off", {})
    if backend not in off.get(op, {}):
        return False
    del off[op][backend]
    content["switched_off"] = {name: backends for name, backends in off.items() if backends}
    _write(device, content)
    return True


def _for_change(device: torch.device) -> dict[str, Any]:
    path = user_file(device)
    content = read_file(path) or {"gpu": configurations.gpu_of(device).name, "tiles": {}}
    off = content.get("switched_off", {})
    if not isinstance(off, dict) or not all(isinstance(backends, dict) for backends in off.values()):
        raise ValueError(_damaged(path, '"switched_off" must hold an object for each op'))
    return content


def _write(device: torch.device, content: dict[str, Any]) -> None:
    write_whole(user_file(device), (json.dumps(content, indent=1) + "\n").encode())
    forget()
