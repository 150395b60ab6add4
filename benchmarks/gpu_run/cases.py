"""What is proved of a backend: each op, and each tile that its products can take, on a call of a few tiles.

Everything here runs in a process that may end, hang or leave its GPU unusable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

from benchmarks.harness.machine import device, synchronize
from ldmq_kernels import ops
from ldmq_kernels.kernels.backend import DEFINITION, Backend, Tiles, Unsupported, backends
from ldmq_kernels.ops.operands import EVERY_OPTION, Shape, example
from ldmq_kernels.tuning.calls import calls, sizes_of
from ldmq_kernels.tuning.shapes import Conv2d, Input, Linear

MODELS = ("sdxl", "sd15")
TUNED = ("linear_w8a8", "conv2d_w8a8")
CARRIED = 0.9  # of the models' work, by the shapes whose tiles are compiled ahead
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OK, WRONG, FAILED, REFUSED, MISSING = "ok", "wrong", "failed", "refused", "missing"
# of no tile's size, and with every operand that an op may have
SHAPE = Shape(145, 352, 168, (2, 9, 7), 3, options=EVERY_OPTION, scale_per_row=True)


@dataclass(frozen=True)
class Case:
    """A call of an op on a backend that is compared with the definition.

    Attributes:
        backend, op, dtype: names.
        shape: of the operands.
        tile: taken for the product; None for the backend's own choice.
        keys: of the products for which the file of measurements may name the tile.
        is_default: whether the backend takes the tile for one of them as long as none is measured.
    """

    backend: str
    op: str
    shape: Shape
    dtype: str = "fp16"
    tile: Any = None
    keys: tuple[str, ...] = ()
    is_default: bool = True

    @property
    def name(self) -> str:
        """What the row says."""
        of = f"{self.backend} {self.op} {self.dtype}"
        if self.tile is None:
            return of
        written = self.written
        if isinstance(written, dict):
            written = " ".join(f"{field} {value}" for field, value in written.items() if value is not False)
        sizes = f" at {self.keys[0].split()[-1]}" if len(self.keys) == 1 else ""
        return f"{of} {written}{sizes}"

    @property
    def written(self) -> Any:
        """The tile as the file of measurements has it."""
        tiles = backends()[self.backend].tiles
        return None if tiles is None or self.tile is None else tiles.written(self.tile)


def preload() -> None:
    """Import what a case needs, so that a process that is forked from this one starts at once; touches no GPU."""
    for backend in backends().values():
        for op in ops.specs():
            with contextlib.suppress(ImportError):
                getattr(backend, op, None)


def check(case: Case) -> tuple[str, str]:
    """Compare a case with the definition.

    Returns:
        "ok", "wrong", "failed", "refused" or "missing", and why.
    """
    on, backend = device(), backends()[case.backend]
    try:
        if not backend.serves(on):
            return MISSING, backend.why_not(on)
        function = getattr(backend, case.op)
        spec = ops.spec_of(case.op)
        arguments = example(case.op, case.shape, on, DTYPES[case.dtype], made_on=on)
        expected = getattr(backends()[DEFINITION], case.op)(*arguments)
        tiles = backend.tiles
        with contextlib.nullcontext() if case.tile is None or tiles is None else tiles.forced(case.tile):
            result = function(*arguments)
        synchronize()
        problem = spec.agreement.difference(result, expected)
    except Unsupported as refusal:
        return REFUSED, str(refusal)
    except (ImportError, AttributeError) as error:
        return MISSING, f"{type(error).__name__}: {error}"
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {error}"[:500]
    return (WRONG, problem) if problem else (OK, "")


def is_usable() -> bool:
    """Whether anything can still run on the device: an illegal access ends all work of this process on a GPU."""
    try:
        ok = float(torch.ones(1, device=device()).sum()) == 1
        synchronize()
    except RuntimeError:
        return False
    return ok


# -- which cases there are -----------------------------------------------------------------------------------


def every_case(name: str) -> list[list[Case]]:
    """Each op of a backend in each dtype, and each tile that any product of the models may take; one by one."""
    backend = backends()[name]
    named = [op for op in ops.specs() if backend.has(op)]
    found = [Case(name, op, SHAPE, dtype) for dtype in DTYPES for op in named]
    if backend.serves(device()) and backend.tiles is not None:
        for op in named:
            if ops.spec_of(op).is_product and backend.tiles.has(op):
                found += _of_tiles(backend, backend.tiles, op)
    return [[case] for case in found]


def _of_tiles(backend: Backend, tiles: Tiles, op: str) -> Iterator[Case]:
    """Each tile that a product of the models may take, of split-K the least and the most."""
    keys: dict[Any, list[str]] = {}
    defaults: set[Any] = set()
    for key in dict.fromkeys(key for key, _ in _products(op)):
        candidates = tiles.candidates(key, device())
        defaults.add(tiles.chosen(key, device()))
        for tile in candidates:
            keys.setdefault(tile, []).append(key)
    most: dict[Any, Any] = {}
    for tile in keys:
        plain = _unsplit(tile)
        if getattr(tile, "split_k", 1) >= getattr(most.get(plain), "split_k", 1):
            most[plain] = tile
    for tile in keys:
        if tile == _unsplit(tile) or tile is most[_unsplit(tile)] or tile in defaults:
            yield Case(backend.name, op, _for_tile(op, tile), "fp16", tile, tuple(keys[tile]), tile in defaults)


def _unsplit(tile: Any) -> Any:
    return replace(tile, split_k=1) if is_dataclass(tile) and hasattr(tile, "split_k") else tile


def _for_tile(op: str, tile: Any) -> Shape:
    """More than one tile each way, the last ones partly outside, and a K that the blocks do not divide."""
    channels, out = tile.k * getattr(tile, "split_k", 1) + 32, tile.n + 8
    options = frozenset({"bias", "residual", "out_inv_scale"})
    if not ops.spec_of(op).shape.takes_pictures:
        return Shape(tile.m + 5, channels, out, options=options)
    return Shape(1, channels, out, (2, 7, tile.m // 14 + 2), 3, options=options)


def tuned_cases(seen: set[str]) -> list[list[Case]]:
    """The tiles that the tuner measures at the shapes that carry most of the models' work, those with most first.

    Args:
        seen: keys that were measured already.

    Returns:
        A list for each backend and shape, whose cases may share a process.
    """
    served = [b for b in backends().values() if b.is_raced and b.serves(device()) and b.tiles is not None]
    products = sorted((product for op in TUNED for product in _products(op)), key=lambda each: -_work(each[1]))
    left = CARRIED * sum(_work(shape) for _, shape in products)
    found = []
    for key, shape in products:
        if left <= 0:
            break
        left -= _work(shape)
        op = key.split()[0]
        for backend in served:
            assert backend.tiles is not None
            if not backend.has(op) or backend.tiles.mark(key) in seen:
                continue
            candidates, chosen = backend.tiles.candidates(key, device()), backend.tiles.chosen(key, device())
            sizes = sizes_of(ops.spec_of(op), shape)
            found.append([Case(backend.name, op, sizes, "fp16", t, (key,), t == chosen) for t in candidates])
    return found


def _products(op: str) -> Iterator[tuple[str, Linear | Conv2d]]:
    """The models' products by an op that reads channels 16 at a time, with the keys that a file has for them."""
    for call in calls((op,), MODELS, device()):
        channels = 0 if isinstance(call.shape, Input) else _channels(call.shape)
        if channels and channels % 16 == 0:
            assert not isinstance(call.shape, Input)
            yield f"{op} {'x'.join(map(str, call.shape.product))}", call.shape


def _channels(shape: Linear | Conv2d) -> int:
    return shape.k if isinstance(shape, Linear) else shape.c


def _work(shape: Linear | Conv2d) -> int:
    m, n, k = shape.product
    return shape.count * m * n * k
