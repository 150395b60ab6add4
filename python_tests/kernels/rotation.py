"""The definition of the rotation, in numpy and in place."""

from __future__ import annotations

import numpy as np


def rotated(y: np.ndarray) -> np.ndarray:
    """H y over the last axis of float32: blocks of the largest power of two up to 32 that divides it."""
    size = min(y.shape[-1] & -y.shape[-1], 32)
    index = np.arange(y.shape[-1]) % size
    signs = [(-1) ** sum(i >> bit & i >> bit + 1 & 1 for bit in range(4)) for i in index.tolist()]
    y = (y * np.array(signs, np.float32)).reshape(-1, size)
    distance = 1
    while distance < size:
        first = [i for i in range(size) if not i & distance]
        second = [i + distance for i in first]
        y[:, first], y[:, second] = y[:, first] + y[:, second], y[:, first] - y[:, second]
        distance *= 2
    return y
