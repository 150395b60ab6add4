"""The application on a Ray cluster of this machine, and a pipeline whose replicas can be told apart."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from ldmq_kernels.serving.ray import ClusterSettings, application
from ldmq_kernels.serving.settings import Limits, ServedModel
from python_tests.servers.serving import free_port
from python_tests.serving.served import GENERATIONS, SlowPipeline

APPLICATION = "images"
BATCH = 4
PROCESSORS = 8  # for Ray to count, not to use
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a proxy's start, on a busy machine
os.environ.setdefault("RAY_worker_niceness", "0")  # else replicas wait behind all other work
MACHINE = {"num_cpus": PROCESSORS, "num_gpus": 1}


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


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, Cluster]]:
    """A cluster of two machines with a GPU each, as Ray counts them; the proxy's address, and what ends the second."""
    machines = Cluster(initialize_head=True, head_node_args=MACHINE | {"include_dashboard": False})
    machines.add_node(**MACHINE)
    port = free_port()
    ray.init(machines.address, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        yield f"http://127.0.0.1:{port}", machines
    finally:
        serve.shutdown()
        ray.shutdown()
        machines.shutdown()


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
    small = {"max_pixels": 64 * 64, "max_batch": BATCH, "deadline_s": 60.0} | dict(limits or {})
    settings = ClusterSettings([ServedModel(Path(name), name)], limits=Limits(**small), **more)
    return application(settings, functools.partial(load_told, folder, step_seconds))


def body(number: int, steps: int = 10, **more: Any) -> dict[str, Any]:
    return {"prompt": str(number), "seed": number, "size": "16x16", "num_inference_steps": steps} | more


def at_once(url: str, bodies: list[dict[str, Any]], meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
    """The answers of as many clients, each of which asks once."""

    async def work() -> list[Any]:
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            asking = [asyncio.create_task(client.post(GENERATIONS, json=one)) for one in bodies]
            await asyncio.to_thread(meanwhile)
            return await asyncio.gather(*asking)

    return asyncio.run(work())


def seeds(answer: httpx.Response) -> list[int]:
    return [picture["seed"] for picture in answer.json()["data"]]


def drawn_by(folder: Path) -> dict[int, list[int]]:
    """Which process has begun which requests."""
    lines = {int(file.name): file.read_text().split("\n") for file in folder.iterdir()}
    return {pid: [int(line) for line in of if line.isdecimal()] for pid, of in lines.items()}


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.1)
