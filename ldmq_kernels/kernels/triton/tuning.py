"""The choice of Triton's tiles, as the tuner sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

import torch

from ldmq_kernels.kernels.backend import Tiles
from ldmq_kernels.kernels.gpu import gpu_of
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.kernels.triton.tile_choice import Problem
from ldmq_kernels.kernels.triton.tile_tables import TILES, Tile

SHORTLIST = 8  # tiles by estimate, and the persistent forms of the best of them


class TritonTiles(Tiles):
    """A call may make several products, each with a table of tiles of its own."""

    section = "tiles"

    def has(self, op: str) -> bool:
        """The ops that have a table."""
        return op in TILES

    def asked_by(self, op: str, product: tuple[int, int, int], run: Callable[[], Any]) -> list[str]:
        """What the call looks up while it runs."""
        asked: list[str] = []
        with tile_choice.chosen_by(lambda table, problem: asked.append(f"{table} {problem}")):
            run()
        return asked

    def candidates(self, key: str, device: torch.device) -> list[Tile]:
        """The tiles with the least estimate, and their persistent forms."""
        table, _, sizes = key.rpartition(" ")
        problem, gpu = Problem(*map(int, sizes.split("x"))), gpu_of(device)
        tiles = tile_choice.candidates(table, problem, gpu)
        known = set(tiles)
        plain = sorted((t for t in tiles if not t.persistent), key=lambda t: tile_choice.estimate(t, problem, gpu))
        shortlist = plain[:SHORTLIST]
        forms = [replace(tile, persistent=True, splittable=False) for tile in shortlist[:3] if tile.split_k == 1]
        return shortlist + [tile for tile in forms if tile in known]

    def chosen(self, key: str, device: torch.device) -> Tile:
        """The measured tile, or the one with the least estimate; convolutions are gathered where there is no TMA."""
        table, _, sizes = key.rpartition(" ")
        if f"{table} gather" in TILES and not tile_choice.has_tma(device):
            table = f"{table} gather"
        return tile_choice.choose(table, Problem(*map(int, sizes.split("x"))), device)

    def forced(self, tile: Any) -> AbstractContextManager[None]:
        """Take this tile for every product inside a block."""
        return tile_choice.forced(tile)

    def taking(self, tiles: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Take these tiles inside a block."""
        return tile_choice.chosen_by(lambda table, problem: tiles.get(f"{table} {problem}"))

    def written(self, tile: Tile) -> dict[str, Any]:
        """A tile's fields."""
        return asdict(tile)

    def read(self, key: str, written: Any, device: torch.device) -> Tile:
        """The tile of these fields."""
        return tile_choice.tile_of(written)

    def mark(self, text: str) -> str:
        """The text itself: this backend was the first that had tiles."""
        return text

    def updated(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content with tiles and their tables in the words of this version.

        Raises:
            TypeError: what is written is no tile.
        """

        def current(tile: Any) -> Any:
            return asdict(tile_choice.tile_of(tile)) if isinstance(tile, dict) else tile  # another backend's is a name

        changed = {
            "tiles": {key: asdict(tile_choice.tile_of(tile)) for key, tile in content["tiles"].items()},
            "milliseconds": content.get("milliseconds", {}),
            "refused": {
                key: [[current(tile), why] for tile, why in lines] for key, lines in content.get("refused", {}).items()
            },
        }
        words = tile_choice.current_key
        return content | {name: {words(key): line for key, line in lines.items()} for name, lines in changed.items()}

    def check(self, device: torch.device) -> None:
        """Read the measured tiles.

        Raises:
            ValueError: a file is damaged.
        """
        tile_choice.measured(gpu_of(device))
