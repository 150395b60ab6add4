"""Programmatic dependent launch in Triton: a kernel that is compiled for it waits itself for the kernel before."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ldmq_kernels.kernels.dependent_launch import is_on


@triton.jit
def begin(DEPENDENT: tl.constexpr) -> None:
    """What a kernel does before all else: wait until the kernel before has ended, and let the next one be launched.

    The next one waits in its turn, so that nothing but its start runs meanwhile. Never in a loop: Triton 3.7 moves the
    loads of a pipelined loop before a wait within it (triton-lang/triton#11905). Without DEPENDENT it is no code.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


def dependent(x: Tensor) -> dict[str, Any]:
    """The options of every launch on x's device: whether it may come before the kernel in front of it has ended."""
    return {"DEPENDENT": True, "launch_pdl": True} if is_on(x.device) else {"DEPENDENT": False}
