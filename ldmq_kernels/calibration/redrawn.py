"""A pipeline's own run with recorded outputs in place of its UNet's, with gradients from the end to each of them.

Autograd sees what guidance and scheduler make of the outputs, whatever these are: multistep schedulers, ancestral
ones, a call that the user wrote.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.outputs import output_tensor
from ldmq_kernels.calibration.trajectory import UNetCall

SAME = 1e-2  # relative difference of a call's input, drawn again, from the recorded one


class NoAdjoint(Exception):
    """A pipeline that gradients do not run through from the end to every call of its UNet; the text says why."""


class _WithGradients(TorchFunctionMode):
    """Computes with gradients from the first call of the UNet on, also where the pipeline switches them off."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.begun or func is torch._C._set_grad_enabled:  # a block that ends gives back what held before it
            return func(*args, **(kwargs or {}))
        with torch.enable_grad():
            return func(*args, **(kwargs or {}))


class _StandIn:
    """Answers a model's calls with the recorded outputs, and keeps what it was called with in the graph."""

    def __init__(self, model: nn.Module, calls: Sequence[UNetCall], mode: _WithGradients) -> None:
        self.outputs: list[Tensor] = []  # the leaves of the graph
        self.inputs: list[list[Tensor]] = []  # floating tensors of each call, in the order of its arguments
        self._calls, self._mode = calls, mode
        self.__signature__ = inspect.signature(model.forward)  # which pipelines ask for
        args, kwargs = pytree.tree_map(lambda value: value, (calls[0].args, calls[0].kwargs))
        with torch.no_grad():
            self._answer = model(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._mode.begun = True
        index = len(self.outputs)
        if index == len(self._calls):
            raise NoAdjoint(f"it calls its model more often than the {index} times that were recorded")
        recorded = self._calls[index]
        given, before = _floating((args, kwargs)), _floating((recorded.args, recorded.kwargs))
        if not _are_alike(given, before):
            raise NoAdjoint(f"it draws something else the second time: call {index} of its model has another input")
        self.inputs.append([tensor.clone() for tensor in given])
        leaf = recorded.output.detach().clone().requires_grad_()
        self.outputs.append(leaf)
        return _with_output(self._answer, leaf.clone())


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _are_alike(given: Sequence[Tensor], recorded: Sequence[Tensor]) -> bool:
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in recorded]:
        return False
    pairs = [(a.detach().double(), b.double()) for a, b in zip(given, recorded, strict=True)]
    return all(float((a - b).norm()) <= SAME * float(b.norm()) for a, b in pairs)


def _with_output(answer: Any, output: Tensor) -> Any:
    """What a model answered, with another tensor in the place of its first one."""
    leaves, form = pytree.tree_flatten(answer)
    place = next(i for i, leaf in enumerate(leaves) if leaf is output_tensor(answer))
    return pytree.tree_unflatten([*leaves[:place], output, *leaves[place + 1 :]], form)


@contextlib.contextmanager
def _forwards(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Put other functions in place of modules' forward inside this block."""
    before: list[tuple[nn.Module, Any]] = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes gradients inside this block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _computed_again(module: nn.Module) -> Callable[..., Any]:
    """A module's forward that keeps no activations for the way back: of a ControlNet, all steps' would be too many."""
    forward = module.forward

    @functools.wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


@contextlib.contextmanager
def _with_a_scheduler_of_its_own(pipe: Any) -> Iterator[None]:
    """The pipeline with a copy of its scheduler: a multistep one keeps outputs, here with all of the graph."""
    pipe = whole_pipeline(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    try:
        if scheduler is not None:
            pipe.scheduler = copy.deepcopy(scheduler)
        yield
    finally:
        if scheduler is not None:
            pipe.scheduler = scheduler


class Redrawn:
    """One run of the pipeline whose graph reaches from each recorded output to the end.

    Attributes:
        outputs: the recorded outputs, leaves of the graph.
        inputs: the floating tensors that each call was given.
        latents: the end.
    """

    def __init__(self, pipe: Any, calls: Sequence[UNetCall], draw: Callable[[], Tensor | None]) -> None:
        model, mode = denoiser(pipe), _WithGradients()
        parts = getattr(whole_pipeline(pipe), "components", {})
        modules = dict.fromkeys(
            part for part in parts.values() if isinstance(part, nn.Module)
        )  # one may have two places
        others = [part for part in modules if part is not model]
        stand_in = _StandIn(model, calls, mode)
        replaced: list[tuple[nn.Module, Callable[..., Any]]] = [
            (model, stand_in),
            *((part, _computed_again(part)) for part in others),
        ]
        with contextlib.ExitStack() as stack:
            for part in others:
                stack.enter_context(frozen(part))
            stack.enter_context(_forwards(replaced))
            stack.enter_context(_with_a_scheduler_of_its_own(pipe))
            stack.enter_context(mode)
            latents = draw()
        self.outputs, self.inputs = stand_in.outputs, stand_in.inputs
        if len(self.outputs) != len(calls):
            raise NoAdjoint(f"it calls its model {len(self.outputs)} times, {len(calls)} times when it was recorded")
        if latents is None or not latents.requires_grad:
            raise NoAdjoint("no gradient runs from its latents to any output of its model")
        self.latents = latents
