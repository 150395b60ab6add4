"""At which sizes `ldmq doctor` compares a GPU's kernels: those whose tiles carry the work of the models.

A small call takes a small tile, and proves nothing of the large ones that SD 1.5 and SDXL spend their time in. So for
each tile that a backend takes at the models' products, measured or estimated, the smallest of these products is
compared, those with the most work first, until little work is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ldmq_kernels.kernels.backend import Backend
from ldmq_kernels.ops import spec_of
from ldmq_kernels.tuning.calls import Call, calls, sizes_of
from ldmq_kernels.tuning.shapes import Input

MODELS = ("sd15", "sdxl")
CARRIED = 0.95  # of a model's work, by the tiles that are compared
ALIGNED = 16  # channels that the kernels for models read at once; fewer take other kernels, which small odd sizes prove


def compared(op: str, backend: Backend, device: torch.device) -> list[Call]:
    """The calls of an op at which a backend is compared on a GPU, besides small odd ones.

    Args:
        op: a product, or an op that quantizes, of which the largest input in each way to scale it is taken.
        backend: of its tiles those count that it takes on this device.
        device: a GPU that it serves.
    """
    if not spec_of(op).is_product:
        return list(_largest(op, device))
    if backend.tiles is None or not backend.tiles.has(op):
        return []
    work, smallest = carried_by(op, backend, device)
    left, found = (1 - CARRIED) * sum(work.values()), list[Call]()
    for tile in sorted(work, key=lambda each: work[each]):  # the least first: they are left out
        left -= work[tile]
        if left < 0:
            found.append(smallest[tile])
    return found[::-1]


def carried_by(op: str, backend: Backend, device: torch.device) -> tuple[dict[Any, int], dict[Any, Call]]:
    """The work of the models by the tile that a backend takes for it, and the call with the least work of each tile."""
    assert backend.tiles is not None
    work: dict[Any, int] = {}
    smallest: dict[Any, Call] = {}
    for call in calls((op,), MODELS, device):
        assert not isinstance(call.shape, Input)
        m, n, k = call.shape.product
        if sizes_of(spec_of(op), call.shape).channels % ALIGNED:
            continue
        tile = backend.tiles.chosen(f"{op} {m}x{n}x{k}", device)
        if tile is None:
            continue
        work[tile] = work.get(tile, 0) + call.work
        if tile not in smallest or m * n * k < _product(smallest[tile]):
            smallest[tile] = call
    return work, smallest


def _product(call: Call) -> int:
    assert not isinstance(call.shape, Input)
    m, n, k = call.shape.product
    return m * n * k


def _largest(op: str, device: torch.device) -> Iterator[Call]:
    by_scale: dict[tuple[str, int], Call] = {}
    for call in calls((op,), MODELS, device):
        assert isinstance(call.shape, Input)
        key = (call.shape.scale, len(call.shape.sizes))
        known = by_scale.get(key)
        if known is None or _elements(call) > _elements(known):
            by_scale[key] = call
    yield from by_scale.values()


def _elements(call: Call) -> int:
    assert isinstance(call.shape, Input)
    return torch.Size(call.shape.sizes).numel()
