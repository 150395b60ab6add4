"""The input scales of a model's timestep layers in a call: one table, a row of it for each thread that calls the model,
and each layer's views of that row.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmq_kernels.tracing import is_exported


@dataclass(frozen=True)
class Place:
    """Where a layer's values lie in a row: its scale at `start`, its inverse scale of `size` from `inv_scale` on."""

    start: int
    inv_scale: int
    size: int

    def of(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The scale (1,) and the inverse scale (size,), views of a row (width,)."""
        return row[self.start : self.start + 1], row[self.inv_scale : self.inv_scale + self.size]


class Call:
    """The row of the call that a thread is in.

    Attributes:
        own: (1, width) float32, the thread's, written by each of its calls; the first group's until one begins.
        views: each layer's scale and inverse scale in this call: of `own`, or of a row that is being recorded.
        traced: (width,) the row while a compiler traces the call; None where it traces a part of the model alone.
    """

    def __init__(self, table: Tensor, places: Sequence[Place]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # a thread makes it in its first call, whatever holds there
            self.own = table[-1:].clone()
        self.traced: Tensor | None = None
        self._own_views = self.views = [place.of(self.own[0]) for place in places]

    def record(self, row: Tensor, places: Sequence[Place]) -> None:
        """Read a row (1, width) that belongs to a CUDA graph, until `leave`."""
        self.views = [place.of(row[0]) for place in places]

    def leave(self) -> None:
        """Read the thread's own row, and nothing that was traced or recorded."""
        self.traced, self.views = None, self._own_views


class ThreadCall(threading.local):
    """A `Call` for each thread: threads that share a model may be at different timesteps.

    Attributes:
        call: of the thread that asks.
    """

    def __init__(self, table: Tensor, places: Sequence[Place]) -> None:
        self.call = Call(table, places)  # threading.local calls this in each thread


@dataclass(eq=False)
class TimestepScales:
    """The scales of all timestep layers of a model that are on one device.

    Attributes:
        edges: (groups - 1,) float32, the boundaries ascending.
        table: (groups, width) float32, a row for each group, the last one, of the least noise, first.
        places: of each layer in a row.
        thread: the call of each thread.
        is_stale: whether a layer that reads the table was filled, loaded or moved since the table was made.
    """

    edges: Tensor
    table: Tensor
    places: Sequence[Place]
    thread: ThreadCall
    is_stale: bool = False

    def choose(self, timestep: Tensor) -> None:
        """Take the row of a timestep (1,) on this device, without waiting for it, for this thread's call."""
        row = torch.bucketize(timestep, self.edges, right=True)
        if torch.compiler.is_dynamo_compiling() or is_exported():
            self.thread.call.traced = self.table.index_select(0, row)[0]
        elif self.table.is_cuda and torch.cuda.is_current_stream_capturing():
            # a thread's own row is written by later calls, which must not reach the replays of a graph
            self.thread.call.record(self.table.index_select(0, row), self.places)
        else:
            self.thread.call.leave()
            torch.index_select(self.table, 0, row, out=self.thread.call.own)


@dataclass(eq=False)
class TimestepScaleView:
    """A layer's part of the scales: the one at `index`."""

    scales: TimestepScales
    index: int

    def scale(self) -> Tensor:
        """The scale (1,) of this thread's current call, which its later calls overwrite in place."""
        return self._of_call()[0]

    def inv_scale(self) -> Tensor:
        """The inverse scale (size,) of this thread's current call, which its later calls overwrite in place."""
        return self._of_call()[1]

    def _of_call(self) -> tuple[Tensor, Tensor]:
        call = self.scales.thread.call
        if call.traced is not None and (torch.compiler.is_dynamo_compiling() or is_exported()):
            return self.scales.places[self.index].of(call.traced)
        return call.views[self.index]
