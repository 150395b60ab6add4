"""How many kernels an operation beside the products is."""

from __future__ import annotations

import math
from typing import Literal

from ldmq_kernels.prediction.recorded import Operation

SLAB_ELEMENTS = 32768  # of a group of GroupNorm that one program of Triton's kernels reads
STATIC_MAX_N, STATIC_SMALL_M = 640, 128  # up to which Triton quantizes in the product's loop


def launches_of(operation: Operation, backend: Literal["triton", "cuda"]) -> int:
    """Kernels of an operation, by this package's backends or by torch's eager mode."""
    op, facts = operation.op, operation.facts
    if op == "group_norm_silu_quantize":
        return 1 if backend == "cuda" else _of_group_norm(operation)
    if op in ("quantize_per_sample", "rotate_quantize_per_sample"):
        return 2
    if op == "linear_static_w8a8":
        x = facts["x"]
        return 2 if facts["weight_scale"][0] > STATIC_MAX_N and math.prod(x[:-1]) > STATIC_SMALL_M else 1
    return 3 if op == "group_norm" else 1


def early_of(op: str, server: str, launches: int) -> int:
    """Those of an operation's kernels that may be launched before the one in front of them has ended.

    Args:
        op: its name.
        server: the backend that computes it, or "torch", whose kernels never are.
        launches: how many kernels it is.
    """
    if server == "torch":
        return 0
    # a cooperative kernel, and one after a memset
    never = server == "cuda" and op in ("group_norm_silu_quantize", "quantize_per_sample")
    return launches - never


def _of_group_norm(operation: Operation) -> int:
    _, channels, height, width = operation.facts["x"]
    group = channels // operation.facts["num_groups"]
    is_slab = (1 << (group - 1).bit_length()) * height * width <= SLAB_ELEMENTS
    is_static = operation.facts["inv_scale"] is not None
    return (1 if is_static else 2) if is_slab else 3
