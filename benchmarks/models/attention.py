"""Milliseconds of attention in bfloat16 on this CPU, beside torch's: python -m benchmarks attention --threads 2

Where `kernels/cpu/attention.py` leaves a call to torch, both are the same; `--all` asks C for these, too: its limits
are chosen by what this shows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn

from ldmq_kernels import ops
from ldmq_kernels.kernels.cpu import attention as cpu
from ldmq_kernels.timing import interleaved

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """The sizes of a call: samples, tokens, keys, heads and channels of a head."""

    batch: int
    tokens: int
    keys: int
    heads: int
    channels: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens} to {self.keys}, {self.heads} heads of {self.channels}"


# Stable Diffusion 1.5's at 512 x 512, its own tokens and the text's; SDXL's; a transformer's
SHAPES = (
    *(Shape(2, tokens, tokens, 8, channels) for tokens, channels in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
    *(Shape(2, tokens, 77, 8, channels) for tokens, channels in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
    *(Shape(1, tokens, keys, heads, 64) for tokens, heads in ((4096, 10), (1024, 20)) for keys in (tokens, 77)),
    Shape(1, 1536, 1536, 24, 128),
)


def measured(shape: Shape, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of the op and of torch's function in turn, and the median of their ratios in each turn."""
    sizes = (shape.tokens, shape.keys, shape.keys)
    query, key, value = (
        torch.randn(shape.batch, length, shape.heads * shape.channels).bfloat16().unflatten(2, (shape.heads, -1))
        for length in sizes
    )

    def by_torch() -> torch.Tensor:
        parts = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*parts)

    found = interleaved({"op": lambda: ops.attention(query, key, value), "torch": by_torch}, CPU, rounds=rounds)
    own, torchs = found["op"].milliseconds, found["torch"].milliseconds
    ratio = statistics.median(b / a for a, b in zip(own, torchs, strict=True))
    return statistics.median(own), statistics.median(torchs), ratio


def main(arguments: Sequence[str]) -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__)
    parser.add_argument("--shape", action="append", metavar="BxTxSxHxD", help="without, the models' shapes")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--all", action="store_true", help="also the sizes that are left to torch")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    limits = {name: 1 if options.all else getattr(cpu, name) for name in ("FEWEST_QUERIES", "FEWEST_KEYS")}
    with torch.inference_mode(), patch.multiple(cpu, **limits):
        for shape in [Shape(*map(int, text.split("x"))) for text in options.shape or ()] or SHAPES:
            own, torchs, ratio = measured(shape, options.rounds)
            print(f"{shape!s:40} {own:9.3f} ms, torch {torchs:9.3f} ms: {ratio:.2f}x as fast", flush=True)
