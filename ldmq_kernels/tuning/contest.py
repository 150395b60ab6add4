"""The CUDA backend at a call: its own fastest tile, and whether that beats Triton's."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ldmq_kernels.kernels import agreement, choices, dispatch, measurements
from ldmq_kernels.kernels import cuda as cuda_backend
from ldmq_kernels.timing import Clock, Context, interleaved
from ldmq_kernels.tuning.calls import Call
from ldmq_kernels.tuning.fastest import Run, Tiles, fastest
from ldmq_kernels.tuning.shapes import Input

RIVAL = "cuda"
_SHOWN_DIGITS = 4


def rival_runs(op: str, device: torch.device) -> bool:
    """Whether the CUDA backend serves the device, has the op, and is not switched off for it."""
    has_it = cuda_backend.serves(device) and hasattr(cuda_backend, op)
    return has_it and measurements.switched_off(op, RIVAL, device) is None


@contextlib.contextmanager
def _served_by(backend: str, *contexts: Context) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use_backend(backend))
        for context in contexts:
            stack.enter_context(context())
        yield


def _rival_tiles(call: Call, product: str, device: torch.device, found: dict[str, Any]) -> Tiles:
    """What the CUDA backend may take for a call: the tile that is known already, if it is; None without tiles."""
    key = f"{RIVAL} {call.op} {call.shape}"
    if not isinstance(call.shape, Input):
        tiles = importlib.import_module(f"{cuda_backend.__name__}.tiles")
        candidates = tiles.candidates(call.op, *call.shape.product, device)
        known = [tile for tile in candidates if tile.name == found["cuda_tiles"].get(product)]
        if candidates:
            return Tiles(key, known or candidates, tiles.forced, lambda tile: tile.name)
    return Tiles(key, [None], contextlib.nullcontext, lambda _: None)


def _product(call: Call) -> str:
    """The key of a call's tile in "cuda_tiles": "op mxnxk"."""
    return "" if isinstance(call.shape, Input) else f"{call.op} {'x'.join(map(str, call.shape.product))}"


def compete(
    call: Call, arguments: tuple[Any, ...], run: Run, usual: Context, device: torch.device, timer: Clock, found: Any
) -> None:
    """Add the CUDA backend's fastest tile, and who is faster, to `found`; nothing where it does not take the call.

    Args:
        call: what is measured.
        arguments: its operands.
        run: the call with them.
        usual: makes Triton take its fastest tiles inside a block.
        device: where.
        timer: milliseconds of a call on a device.
        found: the content of the file of measurements.

    Raises:
        TuningError: a tile left the device unusable.
    """
    product = _product(call)
    tiles = _rival_tiles(call, product, device, found)
    with _served_by("triton", usual):
        expected = run()
    with dispatch.use_backend(RIVAL):
        check = partial(agreement.difference, call.op, expected=expected)
        times = fastest(run, tiles, device, timer, found["refused"], check)
    if not times:
        return
    best = min(times, key=lambda tile: times[tile])
    if best is not None:
        found["cuda_tiles"][product] = tiles.written(best)
    rivals = {
        "triton": partial(_served_by, "triton", usual),
        RIVAL: partial(_served_by, RIVAL, partial(tiles.forced, best)),
    }
    samples = interleaved(dict.fromkeys(rivals, run), device, warm_up=0, clock=timer, contexts=rivals)
    medians = {name: round(taken.median, _SHOWN_DIGITS) for name, taken in samples.items()}
    line = {"backend": min(samples, key=lambda name: samples[name].median), "milliseconds": medians}
    found["backends"].setdefault(call.op, {})[choices.shape_text(call.op, arguments)] = line
