"""The choice of the extension's tiles, as the tuner sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ldmq_kernels.kernels.backend import Tiles


class CudaTiles(Tiles):
    """A call is one product, and a tile is one that the extension was compiled with."""

    section = "cuda_tiles"

    def has(self, op: str) -> bool:
        """The int8 products."""
        return op.startswith(("linear", "conv2d"))

    def asked_by(self, op: str, product: tuple[int, int, int], run: Callable[[], Any]) -> list[str]:
        """The product itself."""
        return [f"{op} {'x'.join(map(str, product))}"]

    def candidates(self, key: str, device: torch.device) -> list[Any]:
        """The tiles of the op that the GPU runs, the least estimate first."""
        from ldmq_kernels.kernels.cuda import tiles

        op, product = key.split()
        m, n, k = map(int, product.split("x"))
        return tiles.candidates(op, m, n, k, device)

    def chosen(self, key: str, device: torch.device) -> Any:
        """The measured tile, or the one with the least estimate; a K that nine taps divide is that of a 3x3 kernel."""
        from ldmq_kernels.kernels.cuda import tiles
        from ldmq_kernels.kernels.dispatch import Unsupported

        op, product = key.split()
        m, n, k = map(int, product.split("x"))
        taps = 9 if op.startswith("conv2d") and k % 9 == 0 else 1
        try:
            return tiles.choose(op, m, n, k, device, taps)
        except Unsupported:
            return None

    def forced(self, tile: Any) -> AbstractContextManager[Any]:
        """Take this tile for every product inside a block."""
        from ldmq_kernels.kernels.cuda import tiles

        return tiles.forced(tile)

    def taking(self, tiles: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Take the one tile inside a block."""
        return self.forced(next(iter(tiles.values()))) if tiles else contextlib.nullcontext()

    def written(self, tile: Any) -> str:
        """A tile's name."""
        return tile.name

    def read(self, key: str, written: Any, device: torch.device) -> Any:
        """The tile of this name, if this build still has it."""
        return next((tile for tile in self.candidates(key, device) if tile.name == written), None)

    def mark(self, text: str) -> str:
        """The text after the backend's name."""
        return f"cuda {text}"

    def check(self, device: torch.device) -> None:
        """Names of tiles are compared, not read: none is damaged."""
