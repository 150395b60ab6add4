"""The tiles that the extension is compiled with, for those who ask of a machine that has not built it."""

from __future__ import annotations

from ldmq_kernels.kernels.cuda.tiles import Tile

_COOPERATIVE, _PING_PONG = True, False
# m, n, k, stages, cooperative, cluster, as csrc/sm90_*.cu has them; a test compares
_SM90 = {
    "linear_w8a8": (
        (256, 160, 128, 4, _COOPERATIVE, 2),
        (256, 128, 128, 4, _COOPERATIVE, 2),
        (128, 256, 128, 4, _COOPERATIVE, 2),
        (128, 160, 128, 6, _COOPERATIVE, 2),
        (128, 160, 128, 6, _PING_PONG, 2),
        (128, 160, 128, 6, _PING_PONG, 1),
        (128, 160, 64, 10, _PING_PONG, 2),
        (128, 128, 128, 7, _PING_PONG, 1),
        (64, 160, 128, 7, _PING_PONG, 1),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
    "linear_geglu_w8a8": (
        (128, 256, 128, 4, _COOPERATIVE, 2),
        (128, 128, 128, 7, _PING_PONG, 2),
        (128, 128, 128, 7, _PING_PONG, 1),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
    "conv2d_w8a8": (
        (256, 160, 128, 4, _COOPERATIVE, 2),
        (128, 256, 128, 4, _COOPERATIVE, 2),
        (128, 160, 128, 6, _PING_PONG, 2),
        (128, 160, 64, 10, _PING_PONG, 2),
        (128, 128, 128, 7, _PING_PONG, 1),
        (64, 160, 128, 7, _PING_PONG, 1),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
    "linear_w4a8": (
        (128, 160, 128, 7, _COOPERATIVE, 2),
        (128, 256, 128, 5, _COOPERATIVE, 2),
        (128, 256, 128, 5, _COOPERATIVE, 1),
        (128, 128, 128, 8, _COOPERATIVE, 1),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
    "linear_fp8": (
        (256, 128, 128, 4, _COOPERATIVE, 2),
        (128, 160, 128, 6, _COOPERATIVE, 2),
        (128, 160, 64, 10, _COOPERATIVE, 2),
        (128, 128, 128, 7, _COOPERATIVE, 1),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
    "linear_geglu_fp8": (
        (256, 128, 128, 4, _COOPERATIVE, 2),
        (128, 128, 128, 7, _COOPERATIVE, 1),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
    "conv2d_fp8": (
        (256, 128, 128, 4, _COOPERATIVE, 2),
        (128, 160, 128, 6, _COOPERATIVE, 2),
        (128, 160, 64, 10, _COOPERATIVE, 2),
        (128, 64, 128, 8, _COOPERATIVE, 1),
    ),
}
# the family, and m, n and stages, as csrc/sm80_*.cu and csrc/sm89_*.cu have them; a step has 64 channels
_MMA = {
    "linear_w8a8": (80, ((128, 160, 4), (128, 128, 4), (256, 128, 3), (64, 128, 4), (64, 64, 6))),
    "conv2d_w8a8": (80, ((128, 160, 4), (128, 128, 4), (64, 128, 4), (64, 64, 6))),
    "linear_w4a8": (80, ((128, 160, 4), (128, 128, 4), (64, 128, 4), (64, 64, 6))),
    "linear_geglu_w8a8": (80, ((256, 128, 3), (128, 128, 4), (64, 128, 4))),
    "linear_fp8": (89, ((128, 128, 4), (64, 64, 6))),
    "linear_geglu_fp8": (89, ((128, 128, 4), (64, 128, 4))),
    "conv2d_fp8": (89, ((128, 128, 4), (64, 64, 6))),
}


def compiled_tiles(op: str) -> list[Tile]:
    """The tiles of an op, of both families; none for an op without."""
    wgmma = [
        Tile(-1, op, 90, m, n, k, stages, cluster, cooperative)
        for m, n, k, stages, cooperative, cluster in _SM90.get(op, ())
    ]
    family, mma = _MMA.get(op, (0, ()))
    return wgmma + [Tile(-1, op, family, m, n, 64, stages, 1, False) for m, n, stages in mma]
