"""A server's parts, which its routes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldmq_kernels.serving.drawing import Lane
from ldmq_kernels.serving.engine import Engine
from ldmq_kernels.serving.images import Kept, Pictures
from ldmq_kernels.serving.loading import Served, describe, devices_here, is_invariant
from ldmq_kernels.serving.metrics import Metrics
from ldmq_kernels.serving.settings import ServerSettings


class State:
    """A server's parts, made when it starts."""

    engine: Engine
    models: dict[str, Served]
    invariant: dict[str, bool]

    def __init__(self, settings: ServerSettings, kept: Pictures | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.kept: Pictures = kept or Kept(settings.limits.max_kept, settings.limits.kept_s)
        self.models, self.invariant = {}, {}

    def load(self, loader: Callable[[ServerSettings, str], dict[str, Any]]) -> list[Lane]:
        """Load all models on all devices, and draw with each."""
        devices = self.settings.devices or devices_here()
        lanes = [Lane(loader(self.settings, device), self.metrics) for device in devices]
        most = self.settings.limits.max_batch
        for name, pipe in lanes[0].pipes.items():
            served = self.models[name] = describe(pipe, name, self.settings)
            self.invariant[name] = is_invariant(pipe, served, sorted({min(2, most), most}))
            self.metrics.invariant.labels(name).set(self.invariant[name])
            self.metrics.weights.labels(name).set(served.about["weights_bytes"])
            for scheme, count in served.about["layers"].items():
                self.metrics.layers.labels(name, scheme).set(count)
        return lanes

    def is_ready(self) -> bool:
        """Whether a request would be drawn."""
        return hasattr(self, "engine") and self.engine.is_alive()
