"""The tables of tiles: a few for each op and family of architectures.

`efficiency` is the part of the tensor cores' full rate that a tile is expected to reach in its main loop; it weighs a
large tile's better reuse against a small tile's better fit, until the tuner has measured. The figures are estimates of
2026-11-26 from the bytes that a tile loads for each product, and were never measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

REGISTERS, LANES = 65536, 32  # of a multiprocessor, and of a warp


@dataclass(frozen=True)
class Tile:
    """The part of the output that one program computes, and the pipeline that feeds it.

    Attributes:
        m, n, k: the block of one step of the main loop; n may be 160, which is 128 and 32.
        warps, stages: Triton's num_warps and num_stages.
        efficiency: the expected part of the tensor cores' full rate, in (0, 1].
        split_k: programs that share the K of one block of the output.
        splittable: whether split_k may be more than 1.
        persistent: whether a program goes on with further blocks of the output.
        transposed: whether a convolution's weight is operand A, which comes straight from shared memory, while an
            image tile, being reshaped, does so only as operand B; n is then a multiple of 64.
        ctas: programs that a multiprocessor runs at once, whose registers and shared memory fit it together: one
            multiplies while another waits for its product, loads or stores.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    efficiency: float = 1.0
    split_k: int = 1
    splittable: bool = False
    persistent: bool = False
    transposed: bool = False
    ctas: int = 1

    @property
    def extra_n(self) -> int:
        """The columns of the second accumulator: what 160 has beyond a power of two."""
        return 32 if self.n == 160 else 0

    @property
    def main_n(self) -> int:
        """The columns of the main accumulator."""
        return self.n - self.extra_n

    def programs(self, m: int, n: int) -> int:
        """How many tiles cover an output of m x n."""
        return -(-m // self.m) * -(-n // self.n)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch: without fusion the epilogue rounds as the reference does."""
        options = {
            "BLOCK_M": self.m,
            "BLOCK_N": self.main_n,
            "BLOCK_K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }
        return options if self.ctas == 1 else options | {"maxnreg": REGISTERS // (self.ctas * self.warps * LANES)}


def family(capability: int) -> str:
    """The architectures that share a table: "80" (A100), "86" (also Ada and sm_120: 99 KB), "90", "100"."""
    if capability in (86, 87, 89) or capability >= 120:
        return "86"
    return "80" if capability < 90 else "90" if capability < 100 else "100"


FAMILIES = ("80", "86", "90", "100")
Table = dict[str, tuple[Tile, ...]]

# of which two run at once on sm_90, whose int8 loops empty the tensor cores at each step
_TWO_LINEAR = Tile(128, 128, 128, 8, 3, efficiency=0.9, ctas=2)
_TWO_TRANSPOSED = replace(_TWO_LINEAR, efficiency=0.97, transposed=True)

# int8 by int8; sm_90 and sm_100 have 227 KB of shared memory for deep blocks, sm_80 163 KB, the others 99 KB
_INT8_DEEP = (
    Tile(16, 64, 128, 4, 4, efficiency=0.1, splittable=True),
    Tile(64, 16, 128, 4, 4, efficiency=0.25, splittable=True),
    Tile(128, 16, 128, 8, 4, efficiency=0.3),
    Tile(64, 64, 128, 4, 4, efficiency=0.4, splittable=True),
    Tile(64, 128, 128, 4, 4, efficiency=0.6, splittable=True),
    Tile(128, 128, 128, 8, 4, efficiency=0.85, splittable=True),
    Tile(128, 128, 64, 8, 4, efficiency=0.8),
    Tile(128, 160, 128, 8, 4, efficiency=0.9, splittable=True),
    Tile(128, 160, 64, 8, 4, efficiency=0.85),
    Tile(128, 256, 128, 8, 3, efficiency=1.0),
)
_INT8_SHALLOW = (
    Tile(16, 64, 64, 4, 4, efficiency=0.1, splittable=True),
    Tile(64, 16, 64, 4, 4, efficiency=0.12, splittable=True),
    Tile(64, 64, 64, 4, 4, efficiency=0.5, splittable=True),
    Tile(64, 128, 64, 4, 4, efficiency=0.7, splittable=True),
    Tile(128, 128, 64, 8, 4, efficiency=0.9, splittable=True),
    Tile(128, 160, 64, 8, 4, efficiency=0.9),
    Tile(128, 256, 64, 8, 3, efficiency=1.0),
)
# read in words of 4 bytes or less, each with an address of its own
_INT8_UNALIGNED = (
    Tile(16, 64, 64, 4, 4, efficiency=0.1),
    Tile(64, 16, 64, 4, 4, efficiency=0.1),
    Tile(64, 64, 64, 4, 4, efficiency=0.3),
    Tile(128, 128, 64, 8, 3, efficiency=0.5),
)
# quantizing x in the main loop, which needs registers
_INT8_STATIC = (
    Tile(16, 64, 64, 4, 4, efficiency=0.1),
    Tile(64, 64, 64, 4, 4, efficiency=0.3),
    Tile(64, 160, 64, 4, 3, efficiency=0.5),
    Tile(128, 128, 64, 8, 3, efficiency=0.6),
    Tile(128, 160, 64, 8, 3, efficiency=0.65),
)
# int4 weights are unpacked a group of 64 at a time, as operand A, which wants n = 64 or more
_INT4 = (
    Tile(16, 64, 64, 4, 4, efficiency=0.2, splittable=True),
    Tile(64, 64, 64, 4, 4, efficiency=0.4, splittable=True),
    Tile(64, 128, 64, 8, 4, efficiency=0.5, splittable=True),
    Tile(128, 128, 64, 8, 4, efficiency=0.7, splittable=True),
    Tile(256, 128, 64, 8, 3, efficiency=0.8),
)
# 16 bit by weights that are converted in registers, as operand A, which wants n = 64 or more
_HALF = (
    Tile(16, 64, 64, 4, 4, efficiency=0.2),
    Tile(64, 64, 64, 4, 4, efficiency=0.5),
    Tile(64, 128, 64, 8, 3, efficiency=0.65),
    Tile(128, 128, 64, 8, 3, efficiency=0.9),
)
# tma_tiled convolutions on sm_90: transposed but for widths that only 160 divides, and for few channels
_INT8_TMA_TILED = (
    Tile(64, 16, 128, 4, 4, efficiency=0.25, splittable=True),
    Tile(128, 16, 128, 8, 4, efficiency=0.3),
    Tile(64, 64, 128, 4, 4, efficiency=0.4, splittable=True, transposed=True),
    Tile(128, 64, 128, 4, 4, efficiency=0.65, splittable=True, transposed=True),
    Tile(128, 128, 128, 8, 4, efficiency=0.95, splittable=True, transposed=True),
    Tile(128, 128, 64, 8, 4, efficiency=0.88, transposed=True),
    Tile(256, 64, 128, 8, 4, efficiency=0.8, transposed=True),
    Tile(256, 64, 64, 8, 4, efficiency=0.75, transposed=True),
    Tile(256, 128, 128, 8, 3, efficiency=1.0, transposed=True),
    Tile(128, 160, 128, 8, 4, efficiency=0.85, splittable=True),
    Tile(128, 160, 64, 8, 4, efficiency=0.8),
)
_INT8_GATHER = (
    Tile(16, 64, 64, 4, 4, efficiency=0.1, splittable=True),
    Tile(64, 16, 64, 4, 4, efficiency=0.12, splittable=True),
    Tile(64, 64, 64, 4, 4, efficiency=0.45, splittable=True),
    Tile(128, 128, 64, 8, 4, efficiency=0.8, splittable=True),
)
_HALF_GATHER = (
    Tile(16, 64, 64, 4, 3, efficiency=0.1),
    Tile(64, 16, 64, 4, 3, efficiency=0.12),
    Tile(64, 64, 64, 4, 3, efficiency=0.45),
    Tile(128, 128, 64, 8, 3, efficiency=0.8),
)
# exact float32 GEMMs have no tensor cores: larger or deeper tiles spill, and from m = 64 on
# Triton 3.6 silently multiplies them in TF32 on sm_100
_FLOAT32 = (
    Tile(16, 16, 16, 4, 2, efficiency=0.05),
    Tile(16, 64, 16, 4, 2, efficiency=0.15),
    Tile(32, 64, 16, 4, 2, efficiency=0.3),
)


def _everywhere(tiles: tuple[Tile, ...]) -> Table:
    return dict.fromkeys(FAMILIES, tiles)


def _with_persistent(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    return tiles + tuple(replace(t, persistent=True, splittable=False) for t in tiles if t.m * t.n >= 128 * 128)


def _tma_tiled(table: Table) -> Table:
    """Tiles of tma_tiled convolutions: none on sm_80, and in family "86" for sm_120 alone."""
    return {name: tuple(tile for tile in tiles if tile.m >= 64) for name, tiles in table.items() if name != "80"}


_INT8: Table = {
    "80": _INT8_SHALLOW,
    "86": _INT8_SHALLOW,
    "90": (*_with_persistent(_INT8_DEEP), _TWO_LINEAR),
    # there tiles of m = 64 spill with a deep block and a wide epilogue
    "100": _with_persistent(tuple(tile for tile in _INT8_DEEP if tile.m != 64 or tile.n == 16)),
}


def _gated(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Tiles of which half of the columns are gates: of two equal halves, and each whole, since it is gated at once."""
    return tuple(replace(t, splittable=False) for t in tiles if t.n >= 64 and not t.extra_n)


TILES: dict[str, Table] = {
    "linear_w8a8": _INT8,
    "linear_w8a8 unaligned": _everywhere(_INT8_UNALIGNED),
    "linear_geglu_w8a8": {
        "80": _gated(_INT8_SHALLOW),
        "86": _gated(_INT8_SHALLOW),
        "90": _gated(_INT8_DEEP),
        "100": _gated(tuple(tile for tile in _INT8_DEEP if tile.m != 64)),
    },
    "linear_geglu_w8a8 unaligned": _everywhere(_gated(_INT8_UNALIGNED[:3])),  # wider ones spill
    "linear_static_w8a8": _everywhere(_INT8_STATIC),
    "linear_static_w8a8 unaligned": _everywhere(_INT8_UNALIGNED),
    "linear_w4a8": _everywhere(_INT4),
    "linear_w4a8 unaligned": _everywhere(_INT4[:3]),
    "linear_w8a16": _everywhere(_HALF),
    "linear_w8a16 float32": _everywhere(_FLOAT32),
    "linear_w4a16": _everywhere(_HALF),
    "linear_w4a16 float32": _everywhere(_FLOAT32),
    "conv2d_w8a8": {
        "86": tuple(tile for tile in _INT8_SHALLOW if tile.m >= 64),
        "90": (*_with_persistent(_INT8_TMA_TILED), _TWO_TRANSPOSED),
        "100": tuple(tile for tile in _INT8["100"] if tile.m >= 64),  # there transposed ones spill
    },
    "conv2d_w8a8 gather": _everywhere(_INT8_GATHER),
    "conv2d_w4a8": _tma_tiled(_everywhere(_INT4)),
    "conv2d_w4a8 gather": _everywhere(_INT8_GATHER),
    "conv2d_w8a16": _tma_tiled(_everywhere(_HALF)),
    "conv2d_w8a16 gather": _everywhere(_HALF_GATHER),
    "conv2d_w8a16 gather float32": _everywhere(_FLOAT32),
}
# FP8 loads as many bytes and multiplies at the same rate
TILES |= {
    table.replace("w8a8", "fp8"): TILES[table]
    for table in TILES
    if table.startswith(("linear_w8a8", "linear_geglu", "conv2d_w8a8"))
}
