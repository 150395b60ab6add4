"""The application on Ray Serve: replicas on the GPUs of several machines, as many as what waits needs.

serve run ldmq_kernels.serving.ray:app models=/models/quantized steps=30 max_replicas=8
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from prometheus_client import Metric
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from ldmq_kernels.serving.app import make_app
from ldmq_kernels.serving.images import Kept
from ldmq_kernels.serving.loading import ServingError, load
from ldmq_kernels.serving.metrics import by_replica
from ldmq_kernels.serving.settings import ServedModel, ServerSettings

RETRY_AFTER_S = 5
STARTS = 3
FIGURES_S = 60.0  # that a replica's figures are told by others after it was last heard: Ray asks it every 10 s


@dataclass(frozen=True)
class ClusterSettings(ServerSettings):
    """What each replica needs, and how many there are.

    Attributes:
        min_replicas, max_replicas: Ray starts and ends replicas between the two, by how many requests wait; the most
            are one for each GPU of the cluster if None.
    """

    min_replicas: int = 1
    max_replicas: int | None = None


class Keeper(Kept):
    """What replicas share, in one actor of the cluster: pictures, and each replica's figures."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        super().__init__(max_bytes, seconds)
        self._told: dict[tuple[str, str], tuple[float, list[Metric]]] = {}

    def tell(self, application: str, replica: str, figures: list[Metric]) -> dict[str, list[Metric]]:
        """Take a replica's figures, and give those of all replicas of its application that told theirs of late."""
        now = time.monotonic()
        self._told[application, replica] = now, figures
        self._told = {by: told for by, told in self._told.items() if now - told[0] <= FIGURES_S}
        return {name: told[1] for (of, name), told in self._told.items() if of == application}


class Shared:
    """A replica's side of the `Keeper`: its pictures are fetched by URL from whichever replica is asked.

    Args:
        max_bytes, seconds: as of `Kept`; a keeper that is there already goes on with its own.
    """

    def __init__(self, max_bytes: int, seconds: float) -> None:
        options = {"namespace": "ldmq_kernels", "lifetime": "detached", "num_cpus": 0}
        options |= {"get_if_exists": True, "max_restarts": -1, "max_task_retries": 1}
        self._keeper = ray.remote(Keeper).options(name="keeper", **options).remote(max_bytes, seconds)
        context = serve.get_replica_context()
        self._replica = context.app_name, context.replica_tag

    def add(self, data: bytes, kind: str) -> str:
        """Keep a picture; its name cannot be guessed."""
        return ray.get(self._keeper.add.remote(data, kind))

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A picture and its format, while it is kept."""
        return ray.get(self._keeper.get.remote(name))

    def tell(self, figures: list[Metric]) -> None:
        """Tell this replica's figures, without waiting."""
        self._keeper.tell.remote(*self._replica, figures)

    def gather(self, figures: list[Metric]) -> list[Metric]:
        """The figures of all replicas, from this one's own."""
        return by_replica(ray.get(self._keeper.tell.remote(*self._replica, figures)))


@serve.ingress()
class Images:
    """A replica, which loads the models on the GPUs that Ray gives it.

    Args:
        settings: models and limits; each replica has the limits for itself.
        loader: (settings, device) -> pipelines by the models' names.
    """

    def __init__(self, settings: ServerSettings, loader: Callable[..., dict[str, Any]] = load) -> None:
        self.shared = Shared(settings.limits.max_kept, settings.limits.kept_s)
        self.app_of_replica = make_app(settings, loader, self.shared, self.shared.gather)

    def __serve_build_asgi_app__(self) -> Any:
        return self.app_of_replica

    def check_health(self) -> None:
        """Tell the figures; raise where a lane draws no more: Ray puts another replica in this one's place.

        Raises:
            RuntimeError: a lane has ended.
        """
        served = self.app_of_replica.state.served
        self.shared.tell(served.metrics.families())
        if not served.is_ready():
            raise RuntimeError("a lane of this replica has ended, its log says why")


def _model(given: Any) -> Any:
    return ServedModel(Path(given), Path(given).name) if isinstance(given, str) else given


def read_settings(given: dict[str, Any]) -> ClusterSettings:
    """Settings from an application's `args`: the fields of ClusterSettings by their names.

    Args:
        given: texts stand for numbers; `models` may be folders, in a list or with commas between them.

    Raises:
        ServingError: a name is not known, or a value is of the wrong type.
    """
    models = given.get("models", [])
    models = models.split(",") if isinstance(models, str) else models
    models = list(map(_model, models)) if isinstance(models, list) else models
    try:
        return TypeAdapter(ClusterSettings).validate_python(given | {"models": models})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        known = ", ".join(field.name for field in dataclasses.fields(ClusterSettings))
        known = f"; known are {known}" if len(first["loc"]) == 1 else ""
        raise ServingError(f"args: {'.'.join(map(str, first['loc']))}: {first['msg']}{known}") from None


def application(settings: ClusterSettings, loader: Callable[..., dict[str, Any]] = load) -> serve.Application:
    """The application of so many replicas.

    Args:
        loader: as of `make_app`; called in each replica.
    """
    gpus, batch = int(ray.cluster_resources().get("GPU", 0)), settings.limits.max_batch
    most = settings.max_replicas or max(gpus, settings.min_replicas)
    deployment = serve.deployment(
        Images,
        ray_actor_options={"num_gpus": min(1, gpus)},
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas, max_replicas=most, target_ongoing_requests=batch
        ),
        # one batch is drawn and one waits: what else waits does so outside, where a new replica can take it
        max_ongoing_requests=2 * batch,
        max_queued_requests=16 * batch,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        # an update begins with new replicas, and the old ones finish what they have
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.limits.deadline_s,
        max_constructor_retry_count=STARTS,
    )
    return deployment.bind(settings, loader)


def app(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and `serve deploy`.

    What it tells Ray of replicas, requests and updates can be changed in `deployments` of Ray's configuration, under
    the name Images.

    Args:
        args: see `read_settings`.

    Raises:
        ServingError: as `read_settings`.
    """
    settings = read_settings(args)
    if not settings.models:
        raise ServingError("args: models is empty: give folders that every machine of the cluster sees")
    # read once, where the application is built: replicas on machines without it would ask for no key
    keys = settings.api_keys or [key for key in [os.environ.get("LDMQ_API_KEY")] if key]
    return application(dataclasses.replace(settings, api_keys=keys))
