"""A server in this process: tiny quantized pipelines, or a pipeline that takes a fixed time for a step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from PIL import Image

from ldmq_kernels.serving.app import make_app
from ldmq_kernels.serving.settings import Limits, ServedModel, ServerSettings

GENERATIONS = "/v1/images/generations"


def settings_of(*names: str, limits: Mapping[str, Any] | None = None, **changes: Any) -> ServerSettings:
    """Settings for models that a loader of the test's own gives."""
    models = [ServedModel(Path(name), name) for name in names or ("tiny",)]
    small = {"max_pixels": 64 * 64, "max_steps": 400, "max_batch": 8} | dict(limits or {})
    return ServerSettings(models, **({"steps": 2, "devices": ("cpu",), "limits": Limits(**small)} | changes))


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application without a port; the lifespan is run around it."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://served", timeout=60) as client:
            yield client


class SlowPipeline:
    """Draws nothing, in a fixed time for each step of any batch.

    Attributes:
        seen: prompts of each batch.
        steps: that were made.
    """

    vae_scale_factor = 8

    def __init__(self, step_seconds: float = 0.01, memory_for: int = 100) -> None:
        self.step_seconds, self.memory_for = step_seconds, memory_for
        self.unet = torch.nn.Conv2d(1, 1, 1)
        self.unet.config = type("Config", (), {"sample_size": 2})()
        self.seen: list[list[str]] = []
        self.steps = 0

    def __call__(
        self,
        prompt: Sequence[str],
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
        generator: Any = None,
        callback_on_step_end: Any = None,
        output_type: str = "pil",
        height: int = 16,
        width: int = 16,
    ) -> Any:
        if len(prompt) > self.memory_for:
            raise torch.OutOfMemoryError("pretended")
        self.seen.append(list(prompt))
        for step in range(num_inference_steps):
            time.sleep(self.step_seconds)
            self.steps += 1
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, 0, {})
        pictures = [Image.new("RGB", (width, height), (int(g.initial_seed()) % 256, 0, 0)) for g in generator]
        if output_type == "np":
            return type("Out", (), {"images": [[g.initial_seed()] for g in generator]})()
        return type("Out", (), {"images": pictures})()


class Server:
    """uvicorn in a thread, on a free port."""

    def __init__(self, app: Any) -> None:
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def slow_app(pipe: SlowPipeline, **changes: Any) -> Any:
    """The application over a slow pipeline."""
    return make_app(settings_of("slow", **changes), lambda *_: {"slow": pipe})


async def until(condition: Any, seconds: float = 10) -> None:
    """Wait until something holds."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to hold")
