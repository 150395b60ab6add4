"""The application on a Ray cluster of this machine, and a pipeline whose replicas can be told apart."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve

from ldmq_kernels.serving.ray import ClusterSettings, application
from ldmq_kernels.serving.settings import Limits, ServedModel
from python_tests.servers.serving import free_port
from python_tests.serving.served import SlowPipeline

APPLICATION = "images"
PROCESSORS = 8  # for Ray to count, not to use


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A cluster without an application; gives the address of its proxy."""
    port = free_port()
    ray.init(num_cpus=PROCESSORS, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def start(app: serve.Application) -> None:
    """Start an application, or update the one that runs."""
    serve.run(app, name=APPLICATION, route_prefix="/")


class Told(SlowPipeline):
    """Writes which process draws what.

    Args:
        folder: for a file of each process, with a line for each picture that it began.
    """

    def __init__(self, folder: Path, step_seconds: float) -> None:
        super().__init__(step_seconds)
        self.place = folder / str(os.getpid())
        self.place.touch()

    @functools.wraps(SlowPipeline.__call__)
    def __call__(self, prompt: Any, **arguments: Any) -> Any:
        with self.place.open("a") as file:
            file.writelines(f"{one}\n" for one in prompt)
        return super().__call__(prompt, **arguments)


def load_told(folder: Path, step_seconds: float, settings: ClusterSettings, _device: str) -> dict[str, Any]:
    """The loader of such pipelines; the model `broken` does not load."""
    names = [model.name for model in settings.models]
    if "broken" in names:
        raise ValueError("pretended")
    return {name: Told(folder, step_seconds) for name in names}


def slow_application(
    folder: Path, name: str = "slow", step_seconds: float = 0.02, limits: Mapping[str, Any] | None = None, **more: Any
) -> serve.Application:
    """The application over such pipelines."""
    small = {"max_pixels": 64 * 64, "max_batch": 4, "deadline_s": 60.0} | dict(limits or {})
    settings = ClusterSettings([ServedModel(Path(name), name)], limits=Limits(**small), **more)
    return application(settings, functools.partial(load_told, folder, step_seconds))
