"""Which backends `ldmq bench --op` measures, and the tile that one of them is made to take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ldmq_kernels.cli.bench.cases import Case
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import DEFINITION, backends
from ldmq_kernels.timing import Call, Context


def backends_of(op: str, asked: Sequence[str], device: torch.device) -> list[str]:
    """The backends to measure: those asked for, or all that serve the device, the definition only where it is alone.

    Raises:
        ValueError: one that is asked for does not exist, does not serve the device, or has no such op.
    """
    known = backends()
    serving = [name for name, backend in known.items() if backend.serves(device)]
    having = [name for name in serving if known[name].has(op)]
    for name in asked:
        if name not in known:
            raise ValueError(f"--backend {name}: there is no such backend: choose among {', '.join(known)}")
        if name not in serving:
            why, others = known[name].why_not(device), ", ".join(serving)
            raise ValueError(f"--backend {name}: it does not serve {device}, {why}: choose among {others}")
        if name not in having:
            raise ValueError(f"--backend {name}: it has no {op}: choose among {', '.join(having)}")
    return list(asked) or [name for name in having if name != DEFINITION] or having


def _tile_name(written: Any) -> str:
    """A tile, as a file of measurements has it, in one line: the sizes of a step, then whatever else is set."""
    if not isinstance(written, dict):
        return str(written)
    fields = {key: value for key, value in written.items() if isinstance(value, int) and key != "splittable"}
    numbers = [(key, value) for key, value in fields.items() if not isinstance(value, bool)]
    sizes, others = numbers[:3], [f"{key} {value}" for key, value in numbers[3:] if (key, value) != ("split_k", 1)]
    flags = [key for key, value in fields.items() if value is True]
    return " ".join(["x".join(str(value) for _, value in sizes), *others, *flags])


def tile_context(case: Case, backend: str, text: str, run: Call, device: torch.device) -> tuple[str, Context]:
    """What makes a backend take a tile.

    Args:
        case: the op and shape that the tile is for.
        backend: whose tile.
        text: its name, or as much of its beginning as tells it from the others.
        run: the call.
        device: where.

    Returns:
        The whole name of the tile, and the context to call the op in.

    Raises:
        ValueError: the backend has no tiles for this op, or none or several of such a name.
    """
    tiles = backends()[backend].tiles
    if tiles is None or case.product is None or not tiles.has(case.op):
        raise ValueError(f"--tile {text}: {case.op} has no choice of tiles on {backend}: leave --tile out")
    with dispatch.use_backend(backend):
        keys = tiles.asked_by(case.op, case.product, run)
    named = {_tile_name(tiles.written(tile)): tile for key in keys for tile in tiles.candidates(key, device)}
    found = [text] if text in named else [name for name in named if name.startswith(text)]
    if len(found) != 1:
        what = "names several tiles" if found else "is no tile"
        listed = "; ".join(found or named)
        raise ValueError(f"--tile {text} {what} of {case.op} at {case.label} on {backend}: choose one of {listed}")
    return found[0], partial(tiles.forced, named[found[0]])


@contextlib.contextmanager
def served_by(backend: str, tile: Context = nullcontext) -> Iterator[None]:
    """Serve an op from one backend inside a block, by one tile or by the tile that the backend chooses."""
    with dispatch.use_backend(backend), tile():
        yield
