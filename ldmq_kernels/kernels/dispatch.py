"""Which backend serves an op: chosen when the op runs, counted, and overridable.

A backend is a package beside this file, with a function for each op that it can serve and
`serves(device)`. A function that cannot take its arguments raises `Unsupported` with the reason;
the next backend gets them, and `dispatch_report` tells. Their order is `choices`' business: by measurement on a
GPU, where the shape was measured. A backend that `ldmq doctor` switched off is passed over in the same way, with
a warning. With an override (`use_backend` or the environment variable LDMQ_BACKEND) there is no next one: the
reason becomes an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from ldmq_kernels.kernels import choices, measurements
from ldmq_kernels.kernels.choices import PREFERENCE as PREFERENCE

BACKENDS = ("reference", "cpu", "triton", "cuda")

_override: ContextVar[str | None] = ContextVar("ldmq_backend", default=None)
_calls: Counter[tuple[str, str, str]] = Counter()
_refusals: Counter[tuple[str, str, str]] = Counter()


class Unsupported(Exception):
    """A backend cannot take these arguments; the text says why."""


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op from one backend inside this block: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: there is no such backend.
    """
    token = _override.set(_check(name))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"ldmq_kernels.kernels.{name}")


def forced_backend() -> str | None:
    """The backend that `use_backend` or LDMQ_BACKEND asks for, if any."""
    name = _override.get() or os.environ.get("LDMQ_BACKEND") or None
    return _check(name) if name else None


def _switched_off(op: str, name: str, reason: str) -> Unsupported:
    """The refusal of a backend that was found to be wrong here; said once as a warning, too."""
    told = f"switched off by `ldmq doctor`: {reason}"
    measurements.warn_once(f"ldmq::{op} on {name} is {told}; run `ldmq doctor` again once it is mended")
    return Unsupported(told)


def server(op: str) -> Callable[..., Any]:
    """The implementation of an op: hands the call to the first backend that takes it."""

    def serve(*arguments: Any) -> Any:
        device = arguments[0].device
        forced = forced_backend()
        choice = choices.choice(op, device)
        names = (forced,) if forced else choice.order(arguments)
        reasons = []
        for name in names:
            backend = _backend(name)
            try:
                if name in choice.off:
                    raise _switched_off(op, name, choice.off[name])
                if not backend.serves(device):
                    raise Unsupported(f"not available on {device}")
                function = getattr(backend, op, None)
                if function is None:
                    raise Unsupported("has no such op")
                result = function(*arguments)
            except Unsupported as refusal:
                reasons.append(f"{name}: {refusal}")
                _refusals[op, name, str(refusal)] += 1
                continue
            _calls[op, name, str(device)] += 1
            return result
        raise RuntimeError(f"ldmq::{op}: no backend takes this call ({'; '.join(reasons)})")

    serve.__name__ = op
    return serve


def dispatch_report() -> str:
    """Who served what since the start, and what was refused and why, as text."""
    lines = [f"{op:22} {name:10} {device:8} {count:8} calls" for (op, name, device), count in sorted(_calls.items())]
    lines += [f"{op:22} {name:10} refused {count} times: {why}" for (op, name, why), count in sorted(_refusals.items())]
    return "\n".join(lines) or "no ldmq op has run"


def reset_dispatch_report() -> None:
    """Forget what was counted."""
    _calls.clear()
    _refusals.clear()


def visible_backends() -> dict[str, bool]:
    """Backend by name, and whether it serves the best device of this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: bool(_backend(name).serves(device)) for name in BACKENDS}
