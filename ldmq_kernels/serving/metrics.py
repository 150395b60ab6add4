"""What /metrics tells, in Prometheus' format; each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from ldmq_kernels.kernels import dispatch

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.running = Gauge("ldmq_requests_running", "Pictures that are being drawn.", registry=r)
        self.waiting = Gauge("ldmq_requests_waiting", "Pictures that wait.", registry=r)
        self.requests = Counter("ldmq_requests", "Requests by the status of their answer.", ["status"], registry=r)
        self.queued = Histogram("ldmq_queue_seconds", "Waiting for a batch.", buckets=SECONDS, registry=r)
        self.seconds = Histogram("ldmq_request_seconds", "Arrival to answer.", buckets=SECONDS, registry=r)
        self.step = Histogram("ldmq_step_seconds", "One step of a batch.", buckets=SECONDS, registry=r)
        self.batch = Histogram("ldmq_batch_size", "Pictures of a batch.", buckets=SIZES, registry=r)
        self.steps = Counter("ldmq_steps", "Steps of batches.", registry=r)
        self.images = Counter("ldmq_images", "Pictures drawn.", registry=r)
        self.pixels = Counter("ldmq_image_pixels", "Pixels drawn.", registry=r)
        self.stopped = Counter("ldmq_batches_stopped", "Batches stopped since all clients had left.", registry=r)
        self.halved = Counter("ldmq_batches_halved", "Batches halved since memory was short.", registry=r)
        self.tiled = Counter("ldmq_tiled_decodes", "Pictures decoded in tiles since memory was short.", registry=r)
        self.weights = Gauge("ldmq_weights_bytes", "Bytes of the denoiser's weights.", ["model"], registry=r)
        self.layers = Gauge("ldmq_layers", "Layers by scheme.", ["model", "scheme"], registry=r)
        self.invariant = Gauge(
            "ldmq_batch_invariant", "1: pictures were the same alone and in a batch.", ["model"], registry=r
        )
        self.calls = Gauge("ldmq_op_calls_total", "Calls of quantized ops.", ["op", "backend"], registry=r)

    def families(self) -> list[Metric]:
        """All of it now, by names."""
        for (op, backend), count in dispatch.calls_by_backend().items():
            self.calls.labels(op, backend).set(count)
        return list(self.registry.collect())


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterable[Metric]:
        return self.families


def exposition(families: Iterable[Metric]) -> bytes:
    """Figures in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def by_replica(told: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """The figures of several servers as those of one, each with its server's name as the label `replica`."""
    together: dict[str, Metric] = {}
    for replica, families in told.items():
        for family in families:
            whole = together.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [one._replace(labels=one.labels | {"replica": replica}) for one in family.samples]
    return [*together.values()]
