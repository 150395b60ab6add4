"""What the kernels ask of a GPU: its name, architecture and multiprocessors, and where its measurements are kept."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What the choice of a tile depends on; capability 9.0 is 90."""

    name: str
    capability: int
    multiprocessors: int


FLOAT8_FROM = 89  # the first capability with FP8 in its instructions: Ada, then Hopper and Blackwell
ABSENT = Gpu("no GPU", 90, 132)  # in Triton's interpreter: tiles as on an H100 or H200


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; `ABSENT` for a device that is none."""
    if device.type != "cuda":
        return ABSENT
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.major * 10 + properties.minor, properties.multi_processor_count)


def file_name(gpu: Gpu) -> str:
    """The name of a GPU's file of measurements, such as "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-") + ".json"


def cache_folder() -> Path:
    """The folder of this user's measurements: $LDMQ_CACHE, or ldmq_kernels in the user's cache folder.

    Raises:
        FileNotFoundError: the user has no home, and the environment names no folder.
    """
    given, base = os.environ.get("LDMQ_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "ldmq_kernels"
    except RuntimeError:
        raise FileNotFoundError(
            "this user has no home, where measurements are kept: set LDMQ_CACHE to a folder for them"
        ) from None
