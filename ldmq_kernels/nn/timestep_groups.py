"""The input scales of timestep layers follow the timestep that their model is called with.

All scales of a model lie in one table with a row for each group of sampling steps. When a call begins, a hook on the
model looks up its row on the device, without waiting for it, and writes it where the layers read in this thread: one
bucketize and one gather in each call. While a compiler traces the call, or a CUDA graph is recorded, the row is a value
of the graph and layers take views of it.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.nn.quantized import QuantizedLayer
from ldmq_kernels.nn.timestep_scales import Place, ThreadCall, TimestepScales, TimestepScaleView

TIMESTEP_NAMES = ("timestep", "timestep_ratio")  # how models call it; Stable Cascade's have the share of noise
ALIGNMENT = 4  # floats: kernels read inverse scales in pieces of 16 bytes
_FINDING = threading.Lock()  # the first calls of a model may begin in several threads


class TimestepGroups:
    """The hooks of a model that choose the scales of its timestep layers; see `attach`.

    Attributes:
        name: of the model's argument that is its timestep, and `position` its place.
        is_recorded: a CUDA graph of the model has a row of its own, chosen in each replay: threads share the graph.
        devices: the scales on each device; None while the model's timestep layers are not found.
    """

    is_recorded = True

    def __init__(self, boundaries: Sequence[float], name: str, position: int) -> None:
        self.boundaries = tuple(boundaries)
        self.name, self.position = name, position
        self.handles: list[Any] = []
        self.devices: list[TimestepScales] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether a timestep layer was filled, loaded or moved since the tables were made."""
        return self.devices is None or any(values.is_stale for values in self.devices)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose the group of the timestep that the model is called with; of a batch, of its first element's."""
        if self.name not in kwargs and len(args) <= self.position:
            raise ValueError(f"{type(model).__name__} has timestep layers and must be called with a {self.name}")
        timestep = kwargs[self.name] if self.name in kwargs else args[self.position]
        self.refresh(model)
        if self.is_stale:  # a compiler, which reads the tables only from here on, traces again once this is true
            raise RuntimeError(f"the timestep layers of {type(model).__name__} changed while their scales were read")
        for values in self.devices or ():
            values.choose(_on_device(timestep, values.table.device))

    def after(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        """Let go of what a compiler traced or a CUDA graph recorded."""
        for values in self.devices or ():
            values.thread.call.leave()

    @torch.compiler.assume_constant_result
    def refresh(self, model: nn.Module) -> None:
        """Build the tables anew if they are stale; a compiler does so while it traces, and reads nothing of it."""
        if self.is_stale:
            with _FINDING:
                if self.is_stale:
                    self.find_layers(model)

    def find_layers(self, model: nn.Module) -> int:
        """Build the tables of the model's timestep layers anew; gives the number of layers."""
        by_device: dict[torch.device, list[QuantizedLayer]] = {}
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer) and layer.scheme.has_timestep_scales:
                by_device.setdefault(layer.input_scale.device, []).append(layer)
        with torch.inference_mode(False), torch.no_grad():
            self.devices = [self._tabulate(layers, device) for device, layers in by_device.items()]
        return sum(map(len, by_device.values()))

    def _tabulate(self, layers: list[QuantizedLayer], device: torch.device) -> TimestepScales:
        groups = len(self.boundaries) + 1
        rows: list[list[Tensor]] = [[] for _ in range(groups)]
        places: list[Place] = []
        width = 0
        for layer in layers:
            start = width
            for index in range(groups):
                entry = [_padded(t) for t in layer.scale_of_group(min(index, layer.input_scale.numel() - 1))]
                rows[groups - 1 - index] += entry
            size = 1 if layer.smoothing is None else layer.smoothing.numel()
            places.append(Place(start, start + ALIGNMENT, size))
            width = start + sum(tensor.numel() for tensor in entry)
        table = torch.stack([torch.cat(row) for row in rows])
        edges = torch.tensor(sorted(self.boundaries), dtype=torch.float32, device=device)
        values = TimestepScales(edges, table, places, ThreadCall(table, places))
        for index, layer in enumerate(layers):
            layer.follow(TimestepScaleView(values, index))
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "devices": None}  # a copy finds its own layers


def _on_device(timestep: Any, device: torch.device) -> Tensor:
    """(1,) float32 on the device, which is not waited for."""
    if not isinstance(timestep, Tensor):
        return torch.full((1,), float(timestep), dtype=torch.float32, device=device)
    return timestep.reshape(-1)[:1].to(device=device, dtype=torch.float32, non_blocking=True)


def _padded(values: Tensor) -> Tensor:
    return nn.functional.pad(values, (0, -values.numel() % ALIGNMENT), value=1.0)


def attached(model: nn.Module) -> TimestepGroups | None:
    """What `attach` gave the model."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, TimestepGroups)), None)


def attach(model: nn.Module, boundaries: Sequence[float]) -> None:
    """Make a model's timestep layers follow the timestep that it is called with; in place of an earlier attachment.

    Where no such hook has run, or the layer is called by itself, a timestep layer takes the scale of its first group.
    A layer that is put into the model later is found when one of its timestep layers is moved or loaded, or by
    attaching again.

    Args:
        model: with a `timestep` (or `timestep_ratio`) among its forward's arguments.
        boundaries: timesteps, descending: a call belongs to the group of as many as are above its timestep.

    Raises:
        ValueError: the model has timestep layers, but no `timestep` to tell the groups by.
    """
    detach(model)
    if not any(isinstance(m, QuantizedLayer) and m.scheme.has_timestep_scales for m in model.modules()):
        return
    groups = TimestepGroups(boundaries, *timestep_place(model))
    groups.find_layers(model)
    # the handles go with every copy: they keep the ids of later hooks from colliding with these
    groups.handles = [
        model.register_forward_pre_hook(groups.before, with_kwargs=True),
        model.register_forward_hook(groups.after),
    ]


def timestep_place(model: nn.Module) -> tuple[str, int]:
    """The name and place of the timestep among the arguments of a model's forward.

    Raises:
        ValueError: it takes none.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    name = next((name for name in TIMESTEP_NAMES if name in parameters), None)
    if name is None:
        raise ValueError(
            f"a {type(model).__name__} is called without a timestep, which timestep layers need: give them a static "
            "or a dynamic scheme"
        )
    return name, parameters.index(name)


def detach(model: nn.Module) -> None:
    """Undo `attach`; timestep layers stay at the group of the last call."""
    groups = attached(model)
    if groups is not None:
        for handle in groups.handles:
            handle.remove()


@contextlib.contextmanager
def following(model: nn.Module, boundaries: Sequence[float]) -> Iterator[None]:
    """Attach inside this block only: for quantized copies that stand in a float model for a while."""
    attach(model, boundaries)
    try:
        yield
    finally:
        detach(model)
