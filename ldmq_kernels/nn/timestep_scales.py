"""The input scales of a model's timestep layers in the current call: one table, and each layer's view of its row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class TimestepScales:
    """The scales of all timestep layers of a model that are on one device.

    Attributes:
        edges: (groups - 1,) float32, the boundaries ascending.
        table: (groups, width) float32, a row for each group, the last one, of the least noise, first.
        current: (1, width) float32, the row of the current call.
        traced: (width,) the same while a compiler traces the call.
        is_stale: whether a layer that reads the table was filled, loaded or moved since the table was made.
    """

    edges: Tensor
    table: Tensor
    current: Tensor
    traced: Tensor | None = None
    is_stale: bool = False


@dataclass(eq=False)
class TimestepScaleView:
    """A layer's place in a row: its scale at `start`, its inverse scale of `size` from `inv_scale` on."""

    scales: TimestepScales
    start: int
    inv_scale: int
    size: int

    def current(self) -> tuple[Tensor, Tensor]:
        """The scale (1,) and the inverse scale (size,) of the current call, which later calls overwrite in place."""
        row = self.scales.current[0]
        return row[self.start : self.start + 1], row[self.inv_scale : self.inv_scale + self.size]

    def traced_scale(self, otherwise: Tensor | None) -> Tensor | None:
        """The scale (1,) of the traced call; `otherwise` where only a part of the model is traced."""
        row = self.scales.traced
        return otherwise if row is None else row[self.start : self.start + 1]

    def traced_inv_scale(self, otherwise: Tensor | None) -> Tensor | None:
        """The inverse scale (size,) of the traced call; `otherwise` where only a part of the model is traced."""
        row = self.scales.traced
        return otherwise if row is None else row[self.inv_scale : self.inv_scale + self.size]
