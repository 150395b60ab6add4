"""Whether somebody else has a part in a call of this thread: a compiler, or a mode or transform of torch.

A compiler traces it where `torch.compiler.is_dynamo_compiling() or is_exported()`.

torch.compiler.is_compiling() tells of the process: it is true in every thread while one of them compiles, and a thread
that took it for its own would leave the timestep of its eager call to a graph that it is no part of. The first half
stands at each place by itself, as Dynamo compiles a function that asks for it apart from an eager caller, to a
constant.
"""

from __future__ import annotations

import torch
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch._guards import TracingContext
from torch.autograd import _profiler_enabled


def is_exported() -> bool:
    """Whether torch.export runs this in this thread, with strict=False: Python runs, on tensors without values."""
    return torch.compiler.is_exporting() and TracingContext.try_get() is not None


def is_compiled() -> bool:
    """Whether a compiler runs this in this thread to learn the metadata of what it traced."""
    return torch.compiler.is_compiling() and TracingContext.try_get() is not None


def is_plain() -> bool:
    """Whether torch's dispatcher would do nothing but call the op: no mode, transform, profiler, autocast or trace."""
    return not (
        _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or _is_torch_function_mode_enabled()
        or _profiler_enabled()
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
    )
