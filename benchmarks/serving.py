"""What `ldmq serve` must reach, on the demo model and over a pipeline whose steps take a fixed time.

The demo model's rows are also given in processor seconds, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

import ldmq_kernels as ldmq
from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.models.memory import resident_mb
from ldmq_kernels.demo import load_demo_pipeline
from ldmq_kernels.serving.app import make_app
from python_tests.serving.served import GENERATIONS, Server, SlowPipeline, settings_of, slow_app, until

WHAT = "serving"
PROMPT = "a small red circle above a large blue square on a grey background"
GUIDANCE = 4.0
AT_ONCE = 8
STEP = 0.02
LOAD_STEPS = 4


def _model(folder: Path | None) -> Any:
    if folder is None:
        return ldmq.quantize(load_demo_pipeline(torch.float32), scheme="w8a8-dynamic")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the wall and of the processor, and the result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - processor, result


def _pixels(answer: httpx.Response) -> np.ndarray:
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def of_the_demo_model(folder: Path | None, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """The same picture, the server's overhead, and eight requests at once."""
    pipe = _model(folder)

    def draw(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        made = pipe(PROMPT, generator=generator, num_inference_steps=steps, guidance_scale=GUIDANCE)
        return np.asarray(made.images[0])

    settings = settings_of("demo", steps=steps, guidance=GUIDANCE, limits={"max_batch": AT_ONCE})
    app = make_app(settings, lambda *_: {"demo": pipe})
    with Server(app) as url, httpx.Client(base_url=url, timeout=600) as client:

        def ask(seed: int) -> httpx.Response:
            return client.post(GENERATIONS, json={"prompt": PROMPT, "seed": seed})

        def ask_all() -> list[httpx.Response]:
            answers: dict[int, httpx.Response] = {}
            threads = [threading.Thread(target=lambda s=s: answers.update({s: ask(s)})) for s in range(AT_ONCE)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [answers[seed] for seed in range(AT_ONCE)]

        alone = [draw(seed) for seed in range(AT_ONCE)]
        direct, served = [], []
        for _ in range(rounds):
            direct.append(_timed(lambda: draw(0))[:2])
            served.append(_timed(lambda: ask(0))[:2])
        together = [_timed(ask_all) for _ in range(max(1, rounds // 2))]
        equal = [np.array_equal(_pixels(answer), alone[seed]) for seed, answer in enumerate(together[-1][2])]
        yield {"name": "equal to the bit", "pictures": AT_ONCE, "equal": sum(equal), "steps": steps}
        ours, own = ([statistics.median(times) for times in zip(*found, strict=True)] for found in (served, direct))
        yield {"name": "overhead", "wall": ours[0] / own[0] - 1, "processor": ours[1] / own[1] - 1, "seconds": own[0]}
        eight = [statistics.median(times) for times in zip(*(found[:2] for found in together), strict=True)]
        yield {"name": "8 at once", "wall": eight[0] / ours[0], "processor": eight[1] / ours[1], "seconds": eight[0]}


async def _post(port: int, body: bytes, pause: float = 0.0) -> tuple[int, bytes]:
    """Status and body of an answer, by a connection of its own, which is read slowly if there is a pause."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        parts = []
        while part := await reader.read(256 if pause else 65536):
            parts.append(part)
            await asyncio.sleep(pause)
        head, _, rest = b"".join(parts).partition(b"\r\n\r\n")
        return int(head.split()[1]), rest
    finally:
        writer.close()


async def _one(port: int, number: int, chance: random.Random, over: float) -> Any:
    """One request of the load: a tenth leave, some read slowly, some send what is none."""
    await asyncio.sleep(chance.random() * over)
    body = json.dumps({"prompt": "a", "seed": number % 256, "num_inference_steps": LOAD_STEPS}).encode()
    bad, slow, leaves = number % 20 == 1, number % 20 == 2, number % 10 == 0
    asking = asyncio.create_task(_post(port, body[: 5 if bad else None], 0.01 if slow else 0.0))
    if leaves:
        await asyncio.sleep(chance.random() * 0.05)
        asking.cancel()
    try:
        status, rest = await asking
    except asyncio.CancelledError:
        return "left"
    if status == 200 and [p["seed"] for p in json.loads(rest)["data"]] != [number % 256]:
        return "wrong"
    return status


def of_the_engine(requests: int) -> Iterator[dict[str, Any]]:
    """Eight at once, a leaver and a load of four times the capacity, where a step takes a fixed time."""
    pipe = SlowPipeline(0.01)
    with Server(slow_app(pipe, limits={"batch_wait_s": 0.05})) as url:

        async def small() -> tuple[float, int]:
            async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                ask = {"prompt": "a", "num_inference_steps": 50}
                await client.post(GENERATIONS, json=ask)
                one = time.perf_counter()
                await client.post(GENERATIONS, json=ask)
                one, eight = time.perf_counter() - one, time.perf_counter()
                await asyncio.gather(*(client.post(GENERATIONS, json=ask) for _ in range(AT_ONCE)))
                eight = time.perf_counter() - eight
                pipe.steps = 0
                asking = asyncio.create_task(client.post(GENERATIONS, json=ask | {"num_inference_steps": 300}))
                await until(lambda: pipe.steps >= 3)
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
                at = pipe.steps
                await asyncio.sleep(0.5)
                return eight / one, pipe.steps - at

        ratio, more = asyncio.run(small())
    yield {"name": "8 at once, steps of a fixed time", "wall": ratio}
    yield {"name": "steps after a client left", "steps": more}

    pipe = SlowPipeline(STEP)
    app = slow_app(pipe, limits={"max_waiting": 64 * 256.0 * LOAD_STEPS})
    capacity = AT_ONCE / (STEP * LOAD_STEPS)
    chance, memory = random.Random(0), []
    with Server(app) as url:

        async def load(over: float) -> Counter[Any]:
            port = int(url.rpartition(":")[2])
            return Counter(await asyncio.gather(*(_one(port, i, chance, over) for i in range(requests))))

        asyncio.run(load(requests / (4 * capacity)))  # what is allocated once is there after it
        for _ in range(2):
            memory.append(resident_mb())
            found = asyncio.run(load(requests / (4 * capacity)))
        memory.append(resident_mb())
        engine = app.state.served.engine
        left = len(engine.waiting) + len(engine.running)
    statuses = {str(status): count for status, count in sorted(found.items(), key=str)}
    yield {
        "name": "load",
        "requests": requests,
        "statuses": statuses,
        "memory_growth": memory[-1] / memory[0] - 1,
        "tasks_left": left,
    }


def table(data: dict[str, Any]) -> str:
    """What was reached, for the page of all results."""
    rows = {row["name"]: row for row in data["rows"]}
    lines = []
    if "equal to the bit" in rows:
        row = rows["equal to the bit"]
        lines.append([f"pictures of {row['pictures']} in one batch that equal the pipeline's own", str(row["equal"])])
    if "overhead" in rows:
        row = rows["overhead"]
        shown = f"{100 * row['wall']:+.1f} % of wall time, {100 * row['processor']:+.1f} % of processor time"
        lines.append([f"one request beside the pipeline's own call of {row['seconds']:.1f} s", shown])
    if "8 at once" in rows:
        row = rows["8 at once"]
        shown = f"{row['wall']:.1f} times one, {row['processor']:.1f} times in processor time"
        lines.append(["8 requests at once, the demo model", shown])
    if "8 at once, steps of a fixed time" in rows:
        found = rows["8 at once, steps of a fixed time"]["wall"]
        lines.append(["8 requests at once, steps of a fixed time", f"{found:.2f} times one"])
    if "steps after a client left" in rows:
        lines.append(["steps after a client left", str(rows["steps after a client left"]["steps"])])
    if "load" in rows:
        row = rows["load"]
        statuses = ", ".join(f"{name}: {count}" for name, count in row["statuses"].items())
        lines.append([f"{row['requests']} requests at four times the capacity", statuses])
        lines.append(["memory after the same load again and again", f"{100 * row['memory_growth']:+.1f} %"])
        lines.append(["pictures left in the queue", str(row["tasks_left"])])
    return "**Serving** (`ldmq serve`)\n\n" + markdown(["", "found"], lines)


def main(arguments: list[str]) -> None:
    """Measure, print and with --record keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", description=__doc__)
    parser.add_argument("--model", type=Path, help="a quantized pipeline; the demo model in w8a8-dynamic if left out")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000)
    results.add_options(parser)
    options = parser.parse_args(arguments)
    output = results.Output.of(WHAT, options)
    demo = of_the_demo_model(options.model, options.steps, options.rounds)
    for row in itertools.chain(of_the_engine(options.requests), demo):
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        output.add(row)
