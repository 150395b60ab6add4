"""The queue and the batches: pictures that agree in their `Key` are drawn together, one batch at a time a lane."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ldmq_kernels.serving.errors import ApiError
from ldmq_kernels.serving.metrics import Metrics
from ldmq_kernels.serving.settings import Limits
from ldmq_kernels.serving.tasks import Task

logger = logging.getLogger(__name__)


class LeftError(Exception):
    """Nobody waits for a batch any more."""


class Drawer(Protocol):
    """What draws a batch on one device."""

    def draw(self, tasks: Sequence[Task], on_step: Callable[[], None], tell: Callable[..., Any]) -> list[Any]:
        """PIL pictures of tasks that agree in their key.

        Args:
            on_step: called after each step; what it raises ends the drawing.
            tell: calls its arguments in the thread of the loop.
        """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Engine:
    """Draws what is submitted, each lane in a thread of its own.

    Args:
        lanes: one for each device.
        metrics: where everything is counted.
        limits: the server's.
    """

    def __init__(self, lanes: Sequence[Drawer], metrics: Metrics, limits: Limits) -> None:
        self.lanes, self.metrics, self.limits = lanes, metrics, limits
        self.max_batch = limits.max_batch
        self.waiting: list[Task] = []
        self.running: set[Task] = set()
        self._came = asyncio.Condition()
        self._speed = 0.0  # pixels x steps a second of a lane, of late
        self._loops: list[asyncio.Task[None]] = []
        self._threads: list[ThreadPoolExecutor] = []

    def start(self) -> None:
        """Begin to draw, in the running loop."""
        self._loops = [asyncio.create_task(self._run(lane)) for lane in self.lanes]

    async def stop(self) -> None:
        """Stop within a step; what waits is refused."""
        for task in (*self.waiting, *self.running):
            self.leave(task)
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        while self.running:
            await asyncio.sleep(0.01)
        for thread in self._threads:
            thread.shutdown(wait=False)

    def is_alive(self) -> bool:
        """Whether every lane draws."""
        return bool(self._loops) and not any(loop.done() for loop in self._loops)

    async def submit(self, tasks: Sequence[Task]) -> None:
        """Let pictures wait for their turn.

        Raises:
            ApiError: 429, there is too much waiting.
        """
        work, ahead = sum(task.work for task in tasks), sum(task.work for task in self.waiting)
        if self.waiting and work + ahead > self.limits.max_waiting:
            seconds = ahead / self._speed / len(self.lanes) if self._speed else 1.0
            raise ApiError(
                429,
                f"{ahead:.3g} pixels x steps wait, {self.limits.max_waiting:.3g} may: try again later",
                code="queue_full",
                retry_after=max(1, min(math.ceil(seconds), 3600)),
            )
        now = asyncio.get_running_loop().time()
        for task in tasks:
            task.arrived = now
        async with self._came:
            self.waiting += tasks
            self._gauge()
            self._came.notify_all()

    def leave(self, task: Task) -> None:
        """Nobody waits for this picture any more."""
        task.gone = True
        if task in self.waiting:
            self.waiting.remove(task)
        if not task.done.done():
            task.done.cancel()
        self._gauge()

    def _gauge(self) -> None:
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.running.set(len(self.running))

    async def _batch(self) -> list[Task]:
        """The next pictures that agree, the one that waited longest among them."""
        loop = asyncio.get_running_loop()
        while True:
            async with self._came:
                await self._came.wait_for(lambda: self.waiting)
                batch = self._like(self.waiting[0])
                rest = batch[-1].arrived + self.limits.batch_wait_s - loop.time()
                if rest > 0 and len(batch) < self.max_batch:
                    # until one has come, or none has for long enough: requests sent at once do not arrive at once
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(rest):
                            await self._came.wait()
                    continue
                for task in batch:
                    self.waiting.remove(task)
                self.running.update(batch)
                self._gauge()
                return batch

    def _like(self, first: Task) -> list[Task]:
        return [task for task in self.waiting if task.key == first.key][: self.max_batch]

    async def _run(self, lane: Drawer) -> None:
        loop = asyncio.get_running_loop()
        # always the same: what libraries keep for a thread is made once
        thread = ThreadPoolExecutor(1, "ldmq-lane")
        self._threads.append(thread)
        while True:
            batch = await self._batch()
            for task in batch:
                self.metrics.queued.observe(loop.time() - task.arrived)
            drawing = loop.run_in_executor(thread, self._draw, lane, batch, loop)
            drawing.add_done_callback(functools.partial(self._end, batch))
            await asyncio.shield(drawing)

    def _end(self, batch: Sequence[Task], _: object) -> None:
        self.running.difference_update(batch)
        self._gauge()

    # -- in the lane's thread ---------------------------------------------------------------------------

    def _draw(self, lane: Drawer, batch: Sequence[Task], loop: asyncio.AbstractEventLoop) -> None:
        """Draw a batch and answer for each picture; never raises."""
        self.metrics.batch.observe(len(batch))
        start = last = time.perf_counter()

        def on_step() -> None:
            nonlocal last
            now = time.perf_counter()
            self.metrics.step.observe(now - last)
            self.metrics.steps.inc()
            last = now
            if all(task.gone for task in batch):
                raise LeftError

        try:
            if all(task.gone for task in batch):
                raise LeftError
            pictures = lane.draw(batch, on_step, loop.call_soon_threadsafe)
        except LeftError:
            self.metrics.stopped.inc()
            return
        except Exception as error:
            if is_out_of_memory(error) and len(batch) > 1:
                halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
                self.metrics.halved.inc()
                logger.warning("no memory for a batch of %d pictures: drawn in halves", len(batch))
            else:
                logger.exception("a batch of %d pictures failed", len(batch))
                self._answer(loop, batch, [_failure(error)] * len(batch))
                return
        else:
            speed = sum(task.work for task in batch) / (time.perf_counter() - start)
            self._speed = speed if not self._speed else 0.7 * self._speed + 0.3 * speed
            self.metrics.images.inc(len(batch))
            self.metrics.pixels.inc(sum(task.key.width * task.key.height for task in batch))
            self._answer(loop, batch, pictures)
            return
        for half in halves:
            self._draw(lane, half, loop)

    @staticmethod
    def _answer(loop: asyncio.AbstractEventLoop, batch: Sequence[Task], answers: Sequence[Any]) -> None:
        def give() -> None:
            for task, answer in zip(batch, answers, strict=True):
                if task.done.done():
                    continue
                if isinstance(answer, Exception):
                    task.done.set_exception(answer)
                else:
                    task.done.set_result(answer)

        loop.call_soon_threadsafe(give)


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if is_out_of_memory(error):
        return ApiError(503, "there is no memory for one picture of this size: ask for fewer pixels", code="no_memory")
    return ApiError(500, "the picture could not be drawn, the server's log says why", code="failed")
