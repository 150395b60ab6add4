"""A quantized model on disk, a server of it in a process of its own, and requests to that."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import ldmq_kernels as ldmq

DEMO = Path(ldmq.__file__).parent / "demo" / "weights"
PROMPT = "a small orange square above a large blue triangle on a black background"
STEPS, GUIDANCE, SIZE = 2, 4.0, 64
READY_SECONDS = 600


def save_model(folder: Path) -> Any:
    """The demo model in 8 bits, saved; gives the pipeline as it is loaded again."""
    pipe = StableDiffusionPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    ldmq.quantize(pipe, scheme="w8a8-dynamic").save_pretrained(folder)
    loaded = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any, seed: int) -> np.ndarray:
    """The picture that a request of that seed has to give, (H, W, 3) in 0..255."""
    generator = torch.Generator().manual_seed(seed)
    picture = pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIZE, width=SIZE, generator=generator
    )
    return np.asarray(picture.images[0])


class Server:
    """A running server's address and log."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self.log = address, log

    def ask(self, timeout: float = 300.0, **more: Any) -> dict[str, Any]:
        """The answer of the images API."""
        asked = {
            "prompt": PROMPT,
            "size": f"{SIZE}x{SIZE}",
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "response_format": "b64_json",
            "output_format": "png",
            **more,
        }
        request = urllib.request.Request(
            f"{self.address}/v1/images/generations",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def pictures(self, **more: Any) -> list[np.ndarray]:
        """The pictures of one request."""
        entries = self.ask(**more)["data"]
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))).convert("RGB")) for entry in entries
        ]

    def at_once(self, seeds: Sequence[int]) -> list[np.ndarray]:
        """The pictures of as many requests, sent together."""
        with ThreadPoolExecutor(len(seeds)) as pool:
            return list(pool.map(lambda seed: self.pictures(seed=seed)[0], seeds))

    def says(self, words: str, seconds: float = 60.0) -> bool:
        """Whether the log has these words, now or a little later."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if words in self.log.read_text(errors="replace"):
                return True
            time.sleep(0.2)
        return False


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, **variables: str) -> Iterator[Server]:
    """Run a command of this environment that serves, at a free port; the block begins when it is ready."""
    port = free_port()
    program = Path(sys.executable).parent / command[0]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(program), *command[1:], "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=os.environ | variables,
            start_new_session=True,
        )
    try:
        _await(process, f"http://127.0.0.1:{port}/health", log)
        yield Server(f"http://127.0.0.1:{port}", log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _await(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server is not ready: {log.read_text(errors='replace')[-4000:]}")
