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


@dataclass
class _Runs:
    """The runs of one module in a call: when the first began and the last ended, and what each gave."""

    began: int
    ended: int = -1
    outputs: list[Any] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    is_plain: bool = True  # gives tensors and numbers alone, as far as is known

    def end(self, time: int, output: Any) -> None:
        """A run ends."""
        self.ended = time
        leaves = pytree.tree_leaves(output)
        self.is_plain = self.is_plain and all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)
        self.outputs.append(output)
        self.versions += [(leaf, _version(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def is_kept(self) -> bool:
        """Whether what each run gave is known, and was not written over since."""
        return self.is_plain and all(_version(tensor) == version for tensor, version in self.versions)


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
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, call: UNetCall, layers: Iterable[str]) -> None:
        self._model, self._call = model, call
        self._runs: dict[str, _Runs] = {}
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
        last = max((layer for layer in layers if layer in self._runs), key=self._began, default=None)
        if last is not None and self._kept:
            with self.skipped([last]):
                again = call.run(model)
            if not torch.equal(again, output):
                logger.info("a %s is run whole: its modules do more than give outputs", type(model).__name__)
                self._kept = set()

    def _began(self, layer: str) -> int:
        return self._runs[layer].began

    def _watch(self, name: str, module: nn.Module, clock: Iterator[int]) -> list[Any]:
        def before(_module: nn.Module, _args: Any) -> None:
            self._runs.setdefault(name, _Runs(next(clock)))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._runs[name].end(next(clock), output)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

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
                    module.forward = _giving(self._runs[name].outputs)
            yield
        finally:
            for module, forward in reversed(before):
                del module.forward
                if forward is not None:
                    module.forward = forward


def _giving(outputs: list[Any]) -> Any:
    """A forward that gives one output after the other; containers are new ones, since models take things out."""
    following = iter(outputs)
    return lambda *_args, **_kwargs: pytree.tree_map(lambda value: value, next(following))
