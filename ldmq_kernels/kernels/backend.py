"""What a backend is, and the table of those that there are.

A backend is a folder beside this file. Its `__init__` makes an object of a class over `Backend` and registers it; a
module in it that has an op's name holds the function of that name, and is imported when the op is first asked for.
Nothing else in the package names a backend, but for the reference: it defines the ops.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldmq_kernels import kernels

DEFINITION = "reference"  # the backend by which the others are judged, and which no measurement switches off


class Unsupported(Exception):
    """A backend cannot take these arguments; the text says why."""


@dataclass(frozen=True)
class Packer:
    """How a backend holds the weight of an op, exact both ways.

    Attributes:
        layout: whose layout it is, as a layer's repr shows it: "oneDNN".
        is_packed: whether a weight is in this layout.
        pack: (weight, multiplier, channels) -> the packed tensor. The weight and its multiplier, None where it has
            none, are as the op takes them; channels is the length of the weight's last axis in integers.
        unpack: (packed, multiplier, outputs) -> the weight that was packed, of this many output channels.
        join: (packed weights, output channels of each) -> one of all their outputs in turn, with the weights one after
            the other along its first axis; None where these cannot be joined. No function where none can.
    """

    layout: str
    is_packed: Callable[[Tensor], bool]
    pack: Callable[[Tensor, Tensor | None, int], Tensor]
    unpack: Callable[[Tensor, Tensor | None, int], Tensor]
    join: Callable[[Sequence[Tensor], Sequence[int]], Tensor | None] | None = None


class Tiles(ABC):
    """What the tuner asks of a backend whose products have a choice of tiles.

    A key names a product as the file of measurements does: "linear_w8a8 64x40x320".

    Attributes:
        section: of the file, where the fastest tile of each key stands.
    """

    section: str

    @abstractmethod
    def has(self, op: str) -> bool:
        """Whether there is a choice of tiles for an op."""

    @abstractmethod
    def asked_by(self, op: str, product: tuple[int, int, int], run: Callable[[], Any]) -> list[str]:
        """The keys of the products that a call is made of.

        Args:
            op: its name.
            product: m, n and k of the call.
            run: the call.
        """

    @abstractmethod
    def candidates(self, key: str, device: torch.device) -> list[Any]:
        """The tiles worth a measurement, the most promising first."""

    @abstractmethod
    def chosen(self, key: str, device: torch.device) -> Any:
        """The tile that an op takes for a product: the one that was measured, or else the best estimate.

        Returns:
            None where there is none.
        """

    @abstractmethod
    def forced(self, tile: Any) -> AbstractContextManager[Any]:
        """Take this tile for every product inside a block."""

    @abstractmethod
    def taking(self, tiles: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Take these tiles, by key, inside a block; where there is none, the usual choice holds."""

    @abstractmethod
    def written(self, tile: Any) -> Any:
        """A tile as it stands in the file."""

    @abstractmethod
    def read(self, key: str, written: Any, device: torch.device) -> Any:
        """The tile that was written; None where there is no such tile any more."""

    @abstractmethod
    def mark(self, text: str) -> str:
        """How the file's "seen", "refused" and "milliseconds" name this backend's share of something."""

    def updated(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a file of measurements, which an earlier version may have written, as this one writes it.

        Raises:
            TypeError, KeyError, AttributeError: it is damaged.
        """
        return content

    @abstractmethod
    def check(self, device: torch.device) -> None:
        """Read what was measured for a device, as the ops will.

        Raises:
            ValueError: a file is damaged; the text says which, and what to do.
        """


class Backend:
    """A backend; a folder's own class says what differs.

    Its ops are attributes: `backend.linear_w8a8(...)`. One that cannot take its arguments raises `Unsupported` with
    the reason, and the next backend gets them.

    Attributes:
        name: as `use_backend`, reports and files name it: its folder's.
        device_type: the kind of device that it is for; empty for all.
        rank: its place in the usual order on devices of that type, the highest first. Without one it is offered no
            call, unless it was measured to be the fastest, or is asked for.
        is_raced: whether `ldmq bench --tune` measures it against the others, so that a file may name it.
        tiles: its choice of tiles, if its ops have one.
    """

    name: str
    device_type: str = ""
    rank: int | None = None
    is_raced: bool = False
    tiles: Tiles | None = None

    def serves(self, device: torch.device) -> bool:
        """Whether its ops run on a device of this machine."""
        raise NotImplementedError(f"the backend {self.name} does not say which devices it serves")

    def rank_on(self, device: torch.device) -> int | None:
        """Its rank on a device of its type, where that differs between them."""
        return self.rank

    def why_not(self, device: torch.device) -> str:
        """Why a device is not served, and how to change that."""
        return f"it is for devices of type {self.device_type or 'any'}"

    def remark(self, device: torch.device) -> str:
        """What to know of how it serves a device, for `ldmq doctor`; empty where nothing is unusual."""
        return ""

    def launch_failure(self, error: Exception) -> str:
        """Why a call could not be launched here, where another backend can still serve it.

        Args:
            error: what the call raised.

        Returns:
            Empty for anything else, above all for a fault of a kernel that ran: the device is unusable then.
        """
        return ""

    def packer(self, op: str) -> Packer | None:
        """How it holds an op's weight; None where that is as a checkpoint does."""
        return None

    def has(self, op: str) -> bool:
        """Whether it has an op; imports nothing."""
        return op in vars(self) or op in self._modules

    @functools.cached_property
    def _modules(self) -> frozenset[str]:
        folder = getattr(sys.modules[type(self).__module__], "__path__", [])
        return frozenset(module.name for module in pkgutil.iter_modules(folder))

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_") or op not in self._modules:
            raise AttributeError(f"the backend {type(self).__name__} has no op {op!r}")
        function = getattr(importlib.import_module(f"{type(self).__module__}.{op}"), op)
        vars(self)[op] = function
        return function


Registered = TypeVar("Registered", bound=Backend)
_registered: dict[str, Backend] = {}


def register(backend: Registered) -> Registered:
    """Add a backend to the table; one of the same name is replaced.

    Returns:
        The backend.
    """
    _registered[backend.name] = backend
    ordered = sorted(_registered.items(), key=lambda item: (item[0] != DEFINITION, item[0]))
    _registered.clear()
    _registered.update(ordered)
    return backend


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            importlib.import_module(f"{kernels.__name__}.{module.name}")


def backends() -> Mapping[str, Backend]:
    """The backends by name: the definition of the ops, then the others in the order of their names."""
    _discover()
    return _registered


def usual_order(device: torch.device) -> tuple[str, ...]:
    """The backends that a call is offered to without a measurement, the definition last."""
    ranks = {b.name: b.rank_on(device) for b in backends().values() if b.device_type == device.type}
    offered = {name: rank for name, rank in ranks.items() if rank is not None}
    return (*sorted(offered, key=lambda name: -offered[name]), DEFINITION)
