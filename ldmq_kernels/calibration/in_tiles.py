"""A float32 model's linears and convolutions in AMX tiles, where a CPU has them and nothing is differentiated.

Most of what planning takes on a CPU are float32 products of the model itself. In tiles they take a part of the time,
with noise more than 103 dB below them (`kernels/cpu/float_products.py`); a reference and what is measured against it
are both computed so. Packed weights take 6 bytes for each value, as long as the block lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ldmq_kernels.calibration.host_memory import host_memory
from ldmq_kernels.kernels.backend import Unsupported, backends
from ldmq_kernels.plans.layers import quantizable_layers

ROOM = 6 << 30  # bytes of packed weights, and at most a third of the memory: the rest is multiplied as before
CHANNELS_LAST = torch.channels_last
LARGE_MODEL = 100_000_000  # parameters from which calls take seconds: others gain nothing that is worth other bits
LEAST_WORK = 1 << 22  # products of a call


class _InTiles(TorchFunctionMode):
    """Multiplies by some weights in tiles, whoever asks torch for it."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self._weights = {id(weight): weight for weight in weights}  # held, so that no other tensor has their ids
        self._packed: dict[int, tuple[int, Tensor]] = {}  # with how often the weight had been written to
        self._products = _products()
        self._room = min(ROOM, host_memory() // 3)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or multiply in its place."""
        if not (kwargs or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()):
            found = None
            if func is functional.linear and len(args) == 3:
                found = self._linear(*args)
            elif func is functional.conv2d and len(args) == 7:
                found = self._conv2d(*args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        packed = self._weight(x, weight, x.numel() // max(1, x.shape[-1]) if x.dim() else 0)
        if packed is None or x.shape[-1] != weight.shape[1]:
            return None
        return self._products.linear(x, packed, bias, weight.shape[0])

    def _conv2d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Tensor | None:
        sizes = (stride, padding, dilation)
        if groups != 1 or x.dim() != 4 or not all(isinstance(size, tuple) and len(size) == 2 for size in sizes):
            return None
        positions = x.shape[0] * x.shape[2] * x.shape[3] // (stride[0] * stride[1])
        packed = self._weight(x, weight, positions)
        if packed is None or x.shape[1] != weight.shape[1]:
            return None
        try:
            out = self._products.conv2d(x, packed, bias, weight.shape[0], stride, padding, dilation)
        except Unsupported:  # torch says what is wrong
            return None
        is_last = any(not t.is_contiguous() and t.is_contiguous(memory_format=CHANNELS_LAST) for t in (x, weight))
        return out if is_last else out.contiguous()

    def _weight(self, x: Tensor, weight: Tensor, rows: int) -> Tensor | None:
        """The packed form of a weight of the model; None of others, of small products and where no room is left."""
        known = self._weights.get(id(weight))
        is_worth = rows >= self._products.FEWEST_ROWS and rows * weight.numel() >= LEAST_WORK
        is_plain = type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"
        if known is None or not is_worth or not is_plain or weight.device.type != "cpu":  # offloading moves weights
            return None
        version, packed = self._packed.get(id(weight), (-1, None))
        if packed is None:
            size = self._products.packed_bytes(weight)
            if size > self._room:
                return None
            self._room -= size
        if packed is None or version != weight._version:
            packed = self._products.pack(weight.detach())
            self._packed[id(weight)] = weight._version, packed
        return packed


_held: list[tuple[nn.Module, _InTiles]] = []


def _products() -> Any:
    """`float_products` of the backend for CPUs."""
    return backends()["cpu"].float_products


def _weights(model: nn.Module) -> list[Tensor]:
    """The weights of a large model that can be multiplied by in tiles."""
    if sum(parameter.numel() for parameter in model.parameters()) < LARGE_MODEL:
        return []
    layers = (layer for layer in quantizable_layers(model).values() if type(layer) in (nn.Linear, nn.Conv2d))
    return [layer.weight for layer in layers if _products().takes(layer.weight)]


@contextlib.contextmanager
def in_tiles(model: nn.Module) -> Iterator[AbstractContextManager[Any]]:
    """What a large model's calls run in, to multiply in tiles what would be in float32, on a CPU with AMX.

        with in_tiles(model) as tiles:
            with tiles:
                model(...)

    Packed weights are held as long as the outer block lasts; blocks of the same model inside it share them.
    """
    weights = _weights(model) if _products().serves() else []
    if not weights:
        yield contextlib.nullcontext()
        return
    held = model, next((tiles for other, tiles in _held if other is model), None) or _InTiles(weights)
    _held.append(held)
    try:
        yield held[1]
    finally:
        _held.remove(held)
