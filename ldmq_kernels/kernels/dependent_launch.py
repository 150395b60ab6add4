"""Whether kernels may be launched before the one in front of them has ended: programmatic dependent launch.

From compute capability 9.0 on a kernel can be launched while the one before it in the stream still runs. It waits
itself until that has ended before it touches memory, so that only its start overlaps: results are the same, and the gap
between two kernels is shorter. CUDA graphs keep it from CUDA 12.3 on.

It is off until `ldmq doctor` has found on a device of this kind that results are equal with it, eagerly and in a CUDA
graph, and that it is not slower. LDMQ_PDL=0 or 1 overrides what the doctor found.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.gpu import gpu_of

FROM = 90  # the first capability that has it
_asked: ContextVar[bool | None] = ContextVar("ldmq_dependent_launch", default=None)
_IN_WORDS = {"": None, "0": False, "1": True}


@contextlib.contextmanager
def dependent_launches(allowed: bool) -> Iterator[None]:
    """Allow or forbid dependent launches inside a block, whatever the environment and the file say."""
    token = _asked.set(allowed)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for() -> bool | None:
    """What `dependent_launches` or LDMQ_PDL asks for; None where neither does.

    Raises:
        ValueError: LDMQ_PDL is neither 0 nor 1.
    """
    asked = _asked.get()
    if asked is not None:
        return asked
    word = os.environ.get("LDMQ_PDL", "")
    if word not in _IN_WORDS:
        raise ValueError(f"LDMQ_PDL is {word!r}, must be 0 or 1: whether kernels may be launched early, or unset")
    return _IN_WORDS[word]


def is_on(device: torch.device) -> bool:
    """Whether kernels may be launched early on a device: where it can, and is asked for or was found to be right.

    Raises:
        ValueError: LDMQ_PDL is neither 0 nor 1.
    """
    asked = asked_for()
    if asked is None:
        asked = measurements.launches_early(device)
    return asked and gpu_of(device).capability >= FROM
