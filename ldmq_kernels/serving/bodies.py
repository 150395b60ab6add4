"""Reading a request's body within bounds of bytes and seconds, and seeing its client leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from ldmq_kernels.serving.errors import ApiError

FIELDS, FILES = 64, 20


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 or 408, it is too large or comes too slowly.
        ClientDisconnect: it was cut off.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise ApiError(413, f"the body has {announced[:20]} bytes, {most} at most", code="too_large")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise ApiError(413, f"the body has more than {most} bytes", code="too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not come in {seconds:g} seconds", code="too_slow") from None
    return bytes(body)


async def read_json_object(request: Request, most: int, seconds: float) -> dict[str, Any]:
    """The body's JSON object.

    Raises:
        ApiError: as `read_body`, or 400 for anything else than an object.
    """
    body = await read_body(request, most, seconds)
    try:
        given = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body is not a JSON object")
    return given


def _no_number(word: str) -> float:
    raise ValueError(word)


async def read_form(request: Request, most: int, seconds: float) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The fields and the files of a multipart form.

    Raises:
        ApiError: as `read_body`, or 400 for another kind of body.
    """
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise ApiError(400, "the body must be multipart/form-data, with a file called image")
    body = await read_body(request, most, seconds)
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Any:
        return next(parts)

    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        form = await Request(request.scope, replay).form(max_files=FILES, max_fields=FIELDS, max_part_size=most)
    except (MultiPartException, ValueError, KeyError, AttributeError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from None
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}") from None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            elif name.endswith("[]"):
                fields.setdefault(name.removesuffix("[]"), []).append(value)
            elif name in fields:
                raise ApiError(400, f"{name[:80]!r} is given twice", "form")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, files


async def left(request: Request) -> None:
    """Return when the client has left; to be called after its body was read."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


__all__ = ["ClientDisconnect", "left", "read_body", "read_form", "read_json_object"]
