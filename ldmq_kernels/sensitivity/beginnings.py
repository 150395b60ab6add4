"""Calls of a model with some layers swapped, whose beginning is not computed again.

What a model computes before the first of the swapped layers is what the float model computes. So one float call keeps
what modules give, and with a layer swapped each module that was done before the layer began gives that, to the bit.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.trajectory import UNetCall

logger = logging.getLogger(__name__)

PLAIN = (int, float, bool, str, type(None))  # what modules give beside tensors
KEPT = 2 << 30  # bytes of outputs of one call; modules that give more are run again


@dataclass
class _Run:
    """The run of a module in a call: when it began and ended, and what it gave.

    Attributes:
        is_plain: it ran once, gave tensors and numbers alone, and wrote into nothing that it was given.
    """

    began: int
    given: list[tuple[Tensor, int]]
    ended: int = -1
    output: Any = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    is_plain: bool = True

    @property
    def is_kept(self) -> bool:
        """Whether what it gave is known, and was not written over since."""
        return self.ended >= 0 and self.is_plain and _are_as_they_were(self.versions)


def _versions(values: Any) -> list[tuple[Tensor, int]]:
    return [(leaf, _version(leaf)) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _are_as_they_were(versions: list[tuple[Tensor, int]]) -> bool:
    return all(_version(tensor) == version for tensor, version in versions)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _holders(layer: str) -> Iterator[str]:
    """The names of the modules that hold a layer, from the model on."""
    parts = layer.split(".")
    return (".".join(parts[:length]) for length in range(len(parts)))


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a module of this name calls, as far as it holds them: those in lists, in place of the lists."""
    for own, child in module.named_children():
        of_child = f"{name}.{own}" if name else own
        if type(child).forward is nn.Module.forward:
            yield from _parts(of_child, child)
        else:
            yield of_child, child


class Beginnings:
    """What the modules of a float model give in one call, and calls in which those before a layer give it again.

    A model whose modules do more than give outputs is found by a call with all of them skipped that can be: that has
    another output, and nothing is skipped then.

    Args:
        model: the float model.
        call: the call; its own output is not used.
        layers: names of those that will be swapped.
        thorough: find out before the first of the layers, too, which takes nearly a whole call more.

    Attributes:
        is_right: whether skipping was found to change nothing.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, call: UNetCall, layers: Iterable[str], *, thorough: bool = True) -> None:
        self._model, self._call = model, call
        self._runs: dict[str, _Run] = {}
        self._bytes = 0
        layers = list(layers)
        holders = {holder for layer in layers for holder in _holders(layer)}
        watched = dict(unit for holder in holders for unit in _parts(holder, model.get_submodule(holder)))
        clock = itertools.count()
        handles: list[Any] = []
        try:
            for name, module in watched.items():
                handles += self._watch(name, module, clock)
            output = call.run(model)
        finally:
            for handle in handles:
                handle.remove()
        self._kept = {name for name, module in watched.items() if self._can_be_skipped(name, module)}
        ran = sorted((layer for layer in layers if layer in self._runs), key=self._began)
        asked = dict.fromkeys((*ran[:1], *ran[-1:]) if thorough else ran[-1:])
        self.is_right = all(self._gives_the_same([layer], output) for layer in asked)
        if not self.is_right:
            logger.info("a %s is run whole: its modules do more than give outputs", type(model).__name__)
            self._kept = set()
        self._runs = {name: run for name, run in self._runs.items() if name in self._kept or name in layers}

    def _gives_the_same(self, layers: list[str], output: Tensor) -> bool:
        """Whether the call has the same output with all skipped that can be before a layer."""
        try:
            with self.skipped(layers):
                return torch.equal(self._call.run(self._model), output)
        except Exception:  # what a module gives at another time may be of no use to whoever asks it
            return False

    def _began(self, layer: str) -> int:
        return self._runs[layer].began

    def _watch(self, name: str, module: nn.Module, clock: Iterator[int]) -> list[Any]:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in self._runs:
                self._runs[name].is_plain = False  # a module that runs again, maybe under another name
            else:
                self._runs[name] = _Run(next(clock), _versions((args, kwargs)))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            run, leaves = self._runs[name], pytree.tree_leaves(output)
            run.ended = next(clock)
            run.is_plain = (
                run.is_plain
                and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
                and _are_as_they_were(run.given)
            )
            run.given = []
            size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            if run.is_plain and self._bytes + size <= KEPT:
                self._bytes += size
                run.output, run.versions = output, _versions(output)
            else:
                run.is_plain, run.output = False, None

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    def _can_be_skipped(self, name: str, module: nn.Module) -> bool:
        has_hooks = module._forward_hooks or module._forward_pre_hooks  # which would run on the output again
        is_known = name in self._runs and self._runs[name].is_kept
        return is_known and not has_hooks and not isinstance(module, torch.jit.ScriptModule)

    @contextlib.contextmanager
    def skipped(self, layers: Iterable[str]) -> Iterator[None]:
        """Inside this block, modules give what they gave, all that were done before the first of these layers began."""
        begin = min((self._began(layer) for layer in layers if layer in self._runs), default=0)
        before: list[tuple[Any, Any]] = []  # a module that holds another and gives its output does not ask that
        try:
            for name in self._kept:
                if self._runs[name].ended < begin:
                    module: Any = self._model.get_submodule(name)
                    before.append((module, vars(module).get("forward")))
                    module.forward = _giving(self._runs[name].output)
            yield
        finally:
            for module, forward in reversed(before):
                del module.forward
                if forward is not None:
                    module.forward = forward


def _giving(output: Any) -> Any:
    """A forward that gives this; containers are new ones, since models take things out of those that they get."""
    return lambda *_args, **_kwargs: pytree.tree_map(lambda value: value, output)
