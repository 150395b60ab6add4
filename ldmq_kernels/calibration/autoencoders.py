"""Autoencoders in a pipeline, which are called by `encode` and `decode` and not as modules, recorded as calls.

Inside `through_forward` both go through the module's own call, so that hooks see them, with which of the two it is
among the keywords. Whole pictures are encoded and decoded there, also where the pipeline cuts them into tiles or
slices: scales do not depend on how a picture is cut.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ldmq_kernels.nn.timestep_groups import TIMESTEP_NAMES

METHODS = ("encode", "decode")
WHICH = "ldmq_method"  # the keyword that says which of them a recorded call is of
CUT = ("use_tiling", "use_slicing")


def takes_a_timestep(model: nn.Module) -> bool:
    """Whether a model is called with a timestep, as those that denoise are and what steers them."""
    return not {*TIMESTEP_NAMES}.isdisjoint(inspect.signature(type(model).forward).parameters)


def is_autoencoder(model: nn.Module) -> bool:
    """Whether a pipeline calls a model by its `encode` and `decode`."""
    return all(callable(getattr(model, method, None)) for method in METHODS) and not takes_a_timestep(model)


@contextlib.contextmanager
def through_forward(model: nn.Module) -> Iterator[None]:
    """Have `encode` and `decode` of an autoencoder go through the module's call, in its input's dtype, uncut.

    Other models stay as they are.
    """
    if not is_autoencoder(model) or "forward" in vars(model):
        yield
        return
    methods = {method: getattr(model, method) for method in METHODS}
    cut = {name: getattr(model, name) for name in CUT if hasattr(model, name)}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    @functools.wraps(model.forward)  # pipelines look at its parameters
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(WHICH)
        inputs = (value.dtype for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        wanted = next(inputs, dtype)
        if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
            model.to(wanted)  # as the pipeline had it: those of SDXL upcast one that overflows in float16
        return methods[given](*args, **kwargs)

    own: dict[str, Any] = {"forward": forward}
    for method in METHODS:
        own[method] = lambda *args, _method=method, **kwargs: model(*args, **{WHICH: _method, **kwargs})
    vars(model).update(own | dict.fromkeys(cut, False))
    try:
        yield
    finally:
        for name in own:
            vars(model).pop(name, None)
        vars(model).update(cut)
        if dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point()):
            model.to(dtype)
