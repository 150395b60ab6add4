"""From a request to its pictures: generations and edits, at once or streamed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ldmq_kernels.serving.arguments import Asked, Edit, Generation, read_arguments, resolve
from ldmq_kernels.serving.bodies import ClientDisconnect, left, read_form, read_json_object
from ldmq_kernels.serving.errors import ApiError
from ldmq_kernels.serving.images import encoded, mask_of, read_picture
from ldmq_kernels.serving.loading import Served
from ldmq_kernels.serving.state import State
from ldmq_kernels.serving.tasks import Task

END = None


class Answers:
    """Answers to the two calls that draw."""

    def __init__(self, state: State) -> None:
        self.state, self.settings = state, state.settings

    async def generation(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        limits = self.settings.limits
        given = await read_json_object(request, limits.max_json, limits.body_s)
        wanted = read_arguments(Generation, given, self.settings)
        asked = resolve(wanted, self._model(wanted.model), self.settings)
        return await self._answer(request, asked, {}, "image_generation")

    async def edit(self, request: Request) -> Response:
        """POST /v1/images/edits."""
        limits = self.settings.limits
        fields, files = await read_form(request, limits.max_form, limits.body_s)
        if len(files.get("image", [])) != 1 or len(files.get("mask", [])) > 1 or files.keys() - {"image", "mask"}:
            raise ApiError(400, "give one file called image, and one called mask at most", "image")
        if isinstance(fields.get("lora"), str) and fields["lora"].startswith("{"):
            with contextlib.suppress(ValueError):
                fields["lora"] = json.loads(fields["lora"])
        wanted = read_arguments(Edit, fields, self.settings)
        served = self._model(wanted.model)
        image = read_picture(files["image"][0], "image", limits.max_pixels)
        mask = read_picture(files["mask"][0], "mask", limits.max_pixels) if "mask" in files else None
        if mask is not None and mask.size != image.size:
            raise ApiError(400, f"mask has {mask.size} pixels and image {image.size}: make them the same", "mask")
        kind = "image" if mask is None else "mask"
        asked = resolve(wanted, served, self.settings, kind, _fitting(image.size, served, limits.max_pixels))
        size = asked.key.width, asked.key.height
        start = {"image": image.convert("RGB").resize(size)}
        if mask is not None:
            start["mask"] = mask_of(mask).resize(size)
        return await self._answer(request, asked, start, "image_edit")

    def _model(self, name: str | None) -> Served:
        models = self.state.models
        if name is not None and name not in models:
            there = ", ".join(models)
            raise ApiError(404, f"there is no model {name[:80]!r}: there is {there}", "model", "model_not_found")
        return models[self.settings.models[0].name if name is None else name]

    def _tasks(self, asked: Asked, start: dict[str, Any]) -> list[Task]:
        loop = asyncio.get_running_loop()
        return [Task(asked.key, asked.prompt, asked.negative, s, loop.create_future(), **start) for s in asked.seeds]

    async def _answer(self, request: Request, asked: Asked, start: dict[str, Any], event: str) -> Response:
        tasks = self._tasks(asked, start)
        if asked.stream:
            events: asyncio.Queue[Any] = asyncio.Queue()
            task = tasks[0]
            if asked.partials:
                steps = asked.key.steps if asked.key.strength is None else int(asked.key.steps * asked.key.strength)
                task.previews = tuple({(i + 1) * steps // (asked.partials + 1): None for i in range(asked.partials)})
                task.preview = events.put_nowait
            await self.state.engine.submit(tasks)
            task.done.add_done_callback(lambda _: events.put_nowait(END))
            return StreamingResponse(self._stream(request, asked, task, events, event), media_type="text/event-stream")
        await self.state.engine.submit(tasks)
        began = asyncio.get_running_loop().time()
        pictures = await self._wait(request, tasks)
        body = await asyncio.to_thread(self._body, asked, pictures, str(request.base_url))
        self.state.metrics.seconds.observe(asyncio.get_running_loop().time() - began)
        self.state.metrics.requests.labels("200").inc()
        return JSONResponse(body)

    async def _wait(self, request: Request, tasks: list[Task]) -> list[Any]:
        """The pictures, unless the client leaves or the deadline passes first."""
        watch = asyncio.create_task(left(request))
        drawn = asyncio.gather(*(task.done for task in tasks))
        try:
            ends: set[asyncio.Future[Any]] = {watch, drawn}
            deadline = self.settings.limits.deadline_s
            await asyncio.wait(ends, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if drawn.done():
                return drawn.result()
            if watch.done():
                raise ClientDisconnect
            raise self._late()
        finally:
            watch.cancel()
            drawn.cancel()
            for task in tasks:
                self.state.engine.leave(task)
            await asyncio.gather(watch, drawn, return_exceptions=True)

    def _late(self) -> ApiError:
        seconds = self.settings.limits.deadline_s
        return ApiError(504, f"the picture was not drawn in {seconds:g} seconds (--deadline)", code="deadline")

    def _body(self, asked: Asked, pictures: list[Any], base: str) -> dict[str, Any]:
        data = []
        for picture, seed in zip(pictures, asked.seeds, strict=True):
            content = encoded(picture, asked.output_format, asked.compression)
            if asked.by_url:
                entry = {"url": f"{base}v1/images/files/{self.state.kept.add(content, asked.output_format)}"}
            else:
                entry = {"b64_json": base64.b64encode(content).decode()}
            data.append(entry | {"seed": seed})
        return _common(asked) | {"data": data, "ldmq": self._about(asked)}

    def _about(self, asked: Asked) -> dict[str, Any]:
        """What the caller would not guess: how the picture can be drawn again, and whether its prompt was cut."""
        about: dict[str, Any] = {"steps": asked.key.steps, "guidance_scale": asked.key.guidance}
        is_cut = self.state.models[asked.key.model].is_cut(asked.prompt)
        return about if is_cut is None else about | {"prompt_is_cut": is_cut}

    async def _stream(
        self, request: Request, asked: Asked, task: Task, events: asyncio.Queue[Any], event: str
    ) -> AsyncIterator[bytes]:
        began, count = asyncio.get_running_loop().time(), 0
        watch = asyncio.create_task(left(request))
        watch.add_done_callback(lambda _: events.put_nowait(END))
        status = "200"
        try:
            async with asyncio.timeout(self.settings.limits.deadline_s):
                while (picture := await events.get()) is not END:
                    data = await asyncio.to_thread(encoded, picture, asked.output_format, asked.compression)
                    yield _event(f"{event}.partial_image", asked, data, {"partial_image_index": count})
                    count += 1
                if not task.done.done() or task.done.cancelled():
                    status = "499"
                    return
                picture = task.done.result()
                data = await asyncio.to_thread(encoded, picture, asked.output_format, asked.compression)
                about = await asyncio.to_thread(self._about, asked)
                extra = {"seed": task.seed, "usage": None, "ldmq": about}
                yield _event(f"{event}.completed", asked, data, extra)
            self.state.metrics.seconds.observe(asyncio.get_running_loop().time() - began)
        except (TimeoutError, ApiError) as error:
            told = error if isinstance(error, ApiError) else self._late()
            status = str(told.status)
            yield b"event: error\ndata: " + json.dumps({"type": "error", **told.body()}).encode() + b"\n\n"
        except asyncio.CancelledError:
            status = "499"
            raise
        finally:
            watch.cancel()
            self.state.engine.leave(task)
            self.state.metrics.requests.labels(status).inc()


def _common(asked: Asked) -> dict[str, Any]:
    size = f"{asked.key.width}x{asked.key.height}"
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": asked.output_format,
        "quality": "auto",
        "size": size,
    }


def _event(kind: str, asked: Asked, data: bytes, extra: dict[str, Any]) -> bytes:
    common = _common(asked)
    common["created_at"] = common.pop("created")
    body = {"type": kind, "b64_json": base64.b64encode(data).decode(), **common, **extra}
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()


def _fitting(size: tuple[int, int], served: Served, max_pixels: int) -> tuple[int, int]:
    """A picture's size in the model's multiples, not above the most pixels."""
    width, height = size
    shrink = min(1.0, (max_pixels / (width * height)) ** 0.5)
    fit = [max(served.multiple, int(side * shrink) // served.multiple * served.multiple) for side in (width, height)]
    return fit[0], fit[1]
