"""Batches, the queue, leavers and bodies, over a pipeline that takes a fixed time for a step."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from ldmq_kernels.serving.app import make_app
from ldmq_kernels.serving.images import Kept
from ldmq_kernels.serving.loading import ServingError
from python_tests.serving.served import (
    GENERATIONS,
    Server,
    SlowPipeline,
    client_of,
    settings_of,
    slow_app,
    until,
)

STEP = 0.01


def ask(client: httpx.AsyncClient, prompt: str = "a", **more: Any) -> Any:
    return client.post(GENERATIONS, json={"prompt": prompt, "size": "16x16"} | more)


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_equal_requests_share_a_batch_and_others_do_not() -> None:
    pipe = SlowPipeline()
    app = slow_app(pipe, limits={"batch_wait_s": 0.3})

    async def work() -> None:
        async with client_of(app) as client:
            pipe.seen.clear()
            equal = [ask(client, f"e{i}", seed=i) for i in range(8)]
            answers = await asyncio.gather(*equal, ask(client, "other", num_inference_steps=3))
            assert [answer.status_code for answer in answers] == [200] * 9
            assert sorted(map(len, pipe.seen)) == [1, 8]
            assert [answer.json()["data"][0]["seed"] for answer in answers[:8]] == [*range(8)]

    run(work())


def test_a_batch_waits_while_others_of_its_kind_come() -> None:
    pipe = SlowPipeline()
    app = slow_app(pipe, limits={"batch_wait_s": 0.5})

    async def work() -> None:
        async with client_of(app) as client:
            pipe.seen.clear()

            async def late(number: int) -> Any:
                await asyncio.sleep(0.3 * number)
                return await ask(client, str(number))

            await asyncio.gather(*map(late, range(3)))
            assert [len(batch) for batch in pipe.seen] == [3]

    run(work())


def test_a_batch_stops_within_a_step_when_its_clients_have_left() -> None:
    pipe = SlowPipeline(STEP)
    with Server(slow_app(pipe)) as url:

        async def work() -> None:
            async with httpx.AsyncClient(base_url=url) as client:
                pipe.steps = 0
                asking = asyncio.create_task(ask(client, num_inference_steps=300))
                await until(lambda: pipe.steps >= 3)
                asking.cancel()
                await asyncio.sleep(5 * STEP)  # the news of it comes through the socket
                steps = pipe.steps
                await asyncio.sleep(10 * STEP)
                assert pipe.steps <= steps + 1
                assert pipe.steps < 300
                assert (await ask(client)).status_code == 200
                assert "ldmq_batches_stopped_total 1.0" in (await client.get("/metrics")).text

        run(work())


def test_a_batch_goes_on_for_those_who_stay() -> None:
    pipe = SlowPipeline(STEP)
    with Server(slow_app(pipe, limits={"batch_wait_s": 0.2})) as url:

        async def work() -> None:
            async with httpx.AsyncClient(base_url=url) as client:
                pipe.steps = 0
                stays, leaves = (asyncio.create_task(ask(client, num_inference_steps=30)) for _ in range(2))
                await until(lambda: pipe.steps >= 2)
                leaves.cancel()
                assert (await stays).status_code == 200
                assert len(pipe.seen[-1]) == 2

        run(work())


def test_a_stream_that_is_left_stops_too() -> None:
    pipe = SlowPipeline(STEP)
    with Server(slow_app(pipe)) as url:

        async def work() -> None:
            async with httpx.AsyncClient(base_url=url) as client:
                pipe.steps = 0
                body = {"prompt": "a", "stream": True, "num_inference_steps": 300}
                async with client.stream("POST", GENERATIONS, json=body):
                    await until(lambda: pipe.steps >= 3)
                await asyncio.sleep(10 * STEP)
                steps = pipe.steps
                await asyncio.sleep(10 * STEP)
                assert pipe.steps == steps < 300

        run(work())


def test_the_queue_is_bounded_by_pixels_and_steps() -> None:
    app = slow_app(SlowPipeline(STEP), limits={"max_waiting": 5 * 256 * 20.0, "max_batch": 1})

    async def work() -> None:
        async with client_of(app) as client:
            answers = await asyncio.gather(*(ask(client, num_inference_steps=20) for _ in range(12)))
            count = Counter(answer.status_code for answer in answers)
            assert count[429] >= 5
            assert count[200] >= 5
            assert count[200] + count[429] == 12
            full = next(answer for answer in answers if answer.status_code == 429)
            assert int(full.headers["Retry-After"]) >= 1

    run(work())


def test_past_its_deadline_a_request_ends() -> None:
    pipe = SlowPipeline(STEP)
    app = slow_app(pipe, limits={"deadline_s": 0.1})

    async def work() -> None:
        async with client_of(app) as client:
            pipe.steps = 0
            assert (await ask(client, num_inference_steps=300)).status_code == 504
            await asyncio.sleep(5 * STEP)
            assert pipe.steps < 100

    run(work())


def test_a_batch_without_memory_is_halved() -> None:
    pipe = SlowPipeline(memory_for=2)
    app = slow_app(pipe, limits={"batch_wait_s": 0.2, "max_batch": 8})
    app.state.served.load = lambda loader: _lanes(app, pipe)

    async def work() -> None:
        async with client_of(app) as client:
            answers = await asyncio.gather(*(ask(client, f"p{i}", seed=i) for i in range(8)))
            assert [answer.status_code for answer in answers] == [200] * 8
            assert max(map(len, pipe.seen)) == 2
            assert "ldmq_batches_halved_total 3.0" in (await client.get("/metrics")).text

    run(work())


def _lanes(app: Any, pipe: Any) -> Any:
    """The lanes without the check at the start, for which there is no memory."""
    from ldmq_kernels.serving.drawing import Lane
    from ldmq_kernels.serving.loading import describe

    state = app.state.served
    state.models["slow"] = describe(pipe, "slow", state.settings)
    return [Lane({"slow": pipe}, state.metrics)]


def test_a_picture_without_memory_is_refused_and_the_next_is_drawn() -> None:
    pipe = SlowPipeline()
    app = slow_app(pipe)

    async def work() -> None:
        async with client_of(app) as client:
            pipe.memory_for = 0
            answer = await ask(client)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_memory")
            pipe.memory_for = 8
            assert (await ask(client)).status_code == 200

    run(work())


def test_a_key_is_needed_where_there_are_keys() -> None:
    app = slow_app(SlowPipeline(), api_keys=["right", "also"])

    async def work() -> None:
        async with client_of(app) as client:
            for headers, status in [({}, 401), ({"Authorization": "Bearer wrong"}, 401)]:
                assert (await client.post(GENERATIONS, json={"prompt": "a"}, headers=headers)).status_code == status
                assert (await client.get("/v1/models", headers=headers)).status_code == status
            right = {"Authorization": "Bearer also"}
            assert (await client.post(GENERATIONS, json={"prompt": "a"}, headers=right)).status_code == 200
            assert (await client.get("/health")).status_code == 200

    run(work())


def test_an_error_of_the_servers_own_has_the_form_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    app = slow_app(SlowPipeline())
    monkeypatch.setattr(app.state.served.kept, "add", lambda *_: 1 / 0)

    async def work() -> None:
        async with client_of(app) as client:
            answer = await ask(client, response_format="url")
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "failed")
            assert 'ldmq_requests_total{status="500"} 1.0' in (await client.get("/metrics")).text

    run(work())


class Film(SlowPipeline):
    def __call__(self, *given: Any, **arguments: Any) -> Any:
        return type("Out", (), {"frames": super().__call__(*given, **arguments).images})()

    __call__.__signature__ = inspect.signature(SlowPipeline.__call__)  # type: ignore[attr-defined]


class AtOnce(SlowPipeline):
    def __call__(self, prompt: Any, generator: Any = None) -> Any:
        return super().__call__(prompt, generator=generator)


@pytest.mark.parametrize(("kind", "said"), [(Film, "draws no pictures"), (AtOnce, "takes no callback_on_step_end")])
def test_a_pipeline_that_draws_no_pictures_is_refused(kind: type[SlowPipeline], said: str) -> None:
    app = slow_app(kind())

    async def work() -> None:
        with pytest.raises(ServingError, match=f"slow is a {kind.__name__}, .*{said}"):
            async with client_of(app):
                pass

    run(work())


def test_pictures_are_kept_within_bytes_and_seconds() -> None:
    kept = Kept(10, 3600)
    first, second = kept.add(b"x" * 6, "png"), kept.add(b"y" * 6, "webp")
    assert kept.get(first) is None
    assert kept.get(second) == (b"y" * 6, "webp")
    over = Kept(10, -1)
    assert over.get(over.add(b"x", "png")) is None


async def raw(url: str, head: str, body: bytes = b"", wait: float = 5) -> bytes:
    """What comes back for bytes that no client would send."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        await writer.drain()
        return await asyncio.wait_for(reader.read(2000), wait)
    finally:
        writer.close()


def test_bodies_that_are_too_large_too_slow_or_cut_off() -> None:
    with Server(slow_app(SlowPipeline(), limits={"body_s": 0.2, "max_json": 1000, "max_form": 2000})) as url:

        async def work() -> None:
            assert b" 413 " in await raw(url, "Content-Length: 100000000")
            chunks = b"3E8\r\n" + b"x" * 1000 + b"\r\n" + b"10\r\n" + b"x" * 16 + b"\r\n"
            assert b" 413 " in await raw(url, "Transfer-Encoding: chunked", chunks)
            assert b" 408 " in await raw(url, "Content-Length: 500", b'{"prompt": ')
            with contextlib.suppress(TimeoutError):
                await raw(url, "Content-Length: 500", b'{"prompt": ', wait=0.05)
            async with httpx.AsyncClient(base_url=url) as client:
                form = {"image": ("i.png", b"x" * 5000)}
                sent = await client.post("/v1/images/edits", data={"prompt": "a"}, files=form)
                assert sent.status_code == 413
                assert (await ask(client)).status_code == 200

        run(work())


def test_two_models_on_one_server() -> None:
    pipes = {"one": SlowPipeline(), "two": SlowPipeline()}
    app = make_app(settings_of("one", "two"), lambda *_: pipes)

    async def work() -> None:
        async with client_of(app) as client:
            before = len(pipes["two"].seen)
            assert (await ask(client, model="two")).status_code == 200
            assert len(pipes["two"].seen) == before + 1
            assert (await ask(client, model="three")).status_code == 404
            assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == ["one", "two"]

    run(work())


@pytest.mark.slow
def test_nothing_is_lost_under_more_than_it_can_do() -> None:
    pipe = SlowPipeline(0.001)
    app = slow_app(pipe, limits={"max_waiting": 40 * 256 * 2.0})
    chance = random.Random(0)

    async def one(client: httpx.AsyncClient, number: int) -> int | None:
        await asyncio.sleep(chance.random() * 0.5)
        asking = asyncio.create_task(ask(client, seed=number % 256))
        if number % 10 == 0:
            await asyncio.sleep(chance.random() * 0.05)
            asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            answer = await asking
            if answer.status_code == 200:
                assert [p["seed"] for p in answer.json()["data"]] == [number % 256]
            return answer.status_code
        return None

    with Server(app) as url:

        async def work() -> None:
            limits = httpx.Limits(max_connections=400)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
                statuses = Counter(await asyncio.gather(*(one(client, i) for i in range(120))))
            assert set(statuses) <= {200, 429, None}
            assert statuses[200] > 10

        run(work())
        engine = app.state.served.engine
        assert not engine.waiting
        assert not engine.running
