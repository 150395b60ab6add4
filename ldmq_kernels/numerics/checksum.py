"""Checksums of tensors by value: the same on every device and in every memory layout."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's values in logical order, as its dtype stores them.

    It tells accidents apart, not forgeries, and reads twice as fast as SHA-256.
    """
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(values.view(torch.uint8).numpy().data) if values.numel() else 0


def combined(checksums: Mapping[str, int]) -> str:
    """One digest of many tensors' checksums, each under its name, in any order: 16 hexadecimal digits."""
    lines = [f"{name} {value:08x}" for name, value in sorted(checksums.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
