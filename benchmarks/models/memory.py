"""Megabytes that this process holds while two layers see one new input size after another: python -m benchmarks memory

What a CPU's backend keeps for each size is to be bounded (ONEDNN_PRIMITIVE_CACHE_CAPACITY), so that a server's memory
does not grow with the sizes that it sees.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ldmq_kernels.kernels.dispatch import dispatch_report
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES

CHANNELS = 64
HEIGHTS = 60


def resident_mb() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(shapes: int, every: int) -> Iterator[tuple[int, float]]:
    """After the first size and after every so many: how many sizes were seen, and the megabytes in memory."""
    torch.manual_seed(0)
    scheme = SCHEMES["w8a8-dynamic"]
    convolution = QuantConv2d.from_float(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), scheme)
    linear = QuantLinear.from_float(nn.Linear(CHANNELS, CHANNELS), scheme)
    with torch.inference_mode():
        for seen in range(1, shapes + 1):
            x = torch.randn(1, CHANNELS, 1 + seen % HEIGHTS, 4 + seen // HEIGHTS)
            linear(convolution(x).flatten(2).transpose(1, 2))
            if seen == 1 or seen % every == 0:
                yield seen, resident_mb()


def main(arguments: list[str]) -> None:
    """Print the megabytes as they come, and who served."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--shapes", type=int, default=600)
    parser.add_argument("--every", type=int, default=100)
    options = parser.parse_args(arguments)
    for seen, megabytes in growth(options.shapes, options.every):
        print(f"{seen:6} sizes {megabytes:9.1f} MB", flush=True)
    print(dispatch_report())
