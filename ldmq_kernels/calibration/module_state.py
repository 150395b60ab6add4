"""What a pipeline changes in its model between calls, beside the arguments: switches, scales, attention processors.

GLIGEN switches its gated attention off after some steps, and perturbed-attention guidance puts other attention
processors in while it draws. A call is the same again only with the model as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

Place = tuple[str, str]  # a module's name, and that of its attribute
State = Mapping[Place, Any]


def state_of(model: nn.Module) -> dict[Place, Any]:
    """The plain attributes of all modules, and their attention processors."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if (type(value) in (bool, int, float, str) or key == "processor") and key != "training"
    }


class StateChanges:
    """Notes a model's state at each call, as what differs from the first one."""

    def __init__(self) -> None:
        self._first: dict[Place, Any] = {}
        self._changes: list[dict[Place, Any]] = []

    def note(self, model: nn.Module) -> None:
        """The model is called now."""
        now = state_of(model)
        self._first = self._first or now
        self._changes.append(self._difference(now))

    def _difference(self, now: Mapping[Place, Any]) -> dict[Place, Any]:
        return {place: v for place, v in now.items() if place in self._first and _differ(v, self._first[place])}

    def of_calls(self, model: nn.Module) -> list[State]:
        """For each call, in their order, whatever is not the same at all of them and after the last."""
        varying = set(self._difference(state_of(model))).union(*self._changes)
        return [{place: changes.get(place, self._first[place]) for place in varying} for changes in self._changes]


def _differ(one: Any, other: Any) -> bool:
    return one != other if isinstance(one, bool | int | float | str) else one is not other


@contextlib.contextmanager
def in_state(model: nn.Module, state: State) -> Iterator[None]:
    """The model as it was in a call, inside this block; layers that were put in since keep what they have."""
    modules = [(model.get_submodule(name), key, value) for (name, key), value in state.items()]
    known = [(module, key, value) for module, key, value in modules if key in vars(module)]
    before: Sequence[Any] = [vars(module)[key] for module, key, _ in known]
    try:
        for module, key, value in known:
            setattr(module, key, value)
        yield
    finally:
        for (module, key, _), value in zip(known, before, strict=True):
            setattr(module, key, value)
