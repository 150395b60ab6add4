"""Whether a compiler traces the call of this thread: `torch.compiler.is_dynamo_compiling() or is_exported()`.

torch.compiler.is_compiling() tells of the process: it is true in every thread while one of them compiles, and a thread
that took it for its own would leave the timestep of its eager call to a graph that it is no part of. The first half
stands at each place by itself, as Dynamo compiles a function that asks for it apart from an eager caller, to a
constant.
"""

from __future__ import annotations

import torch
from torch._guards import TracingContext


def is_exported() -> bool:
    """Whether torch.export runs this in this thread, with strict=False: Python runs, on tensors without values."""
    return torch.compiler.is_exporting() and TracingContext.try_get() is not None


def is_compiled() -> bool:
    """Whether a compiler runs this in this thread to learn the metadata of what it traced."""
    return torch.compiler.is_compiling() and TracingContext.try_get() is not None
