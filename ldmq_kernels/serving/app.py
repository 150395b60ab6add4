"""`make_app`: the application, one object for uvicorn and for any other server of ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import Metric
from starlette.exceptions import HTTPException

from ldmq_kernels.serving.answers import Answers
from ldmq_kernels.serving.arguments import IGNORED, Edit, Generation
from ldmq_kernels.serving.bodies import ClientDisconnect
from ldmq_kernels.serving.engine import Engine
from ldmq_kernels.serving.errors import ApiError
from ldmq_kernels.serving.images import Pictures
from ldmq_kernels.serving.loading import Served, load
from ldmq_kernels.serving.metrics import exposition
from ldmq_kernels.serving.settings import ServerSettings
from ldmq_kernels.serving.state import State

PAGE = Path(__file__).parent / "page.html"
CLIENT_LEFT = 499
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def make_app(
    settings: ServerSettings,
    loader: Callable[[ServerSettings, str], dict[str, Any]] = load,
    kept: Pictures | None = None,
    gather: Callable[[list[Metric]], list[Metric]] = list,
) -> FastAPI:
    """The application; its models are loaded, and a picture drawn with each, before it takes requests.

    Args:
        settings: models and limits.
        loader: (settings, device) -> pipelines by the models' names.
        kept: where pictures are kept for answers by URL; in this process if None.
        gather: this process' figures -> all that /metrics tells; called in a thread.
    """
    state = State(settings, kept)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            lanes = await asyncio.to_thread(state.load, loader)
        except Exception as error:
            app.state.failure = error
            raise
        state.engine = Engine(lanes, state.metrics, settings.limits)
        if not all(state.invariant.values()):
            state.engine.max_batch = 1
        state.engine.start()
        yield
        await state.engine.stop()

    app = FastAPI(title="ldmq serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served, app.state.failure = state, None
    _add_errors(app, state)
    _add_images(app, state)
    _add_facts(app, state)

    @app.get("/metrics")
    async def metrics() -> Response:
        families = await asyncio.to_thread(gather, state.metrics.families())
        return PlainTextResponse(exposition(families), media_type="text/plain; version=0.0.4")

    return app


def _add_errors(app: FastAPI, state: State) -> None:
    def counted(response: Response) -> Response:
        state.metrics.requests.labels(str(response.status_code)).inc()
        return response

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return counted(error.response())

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return counted(Response(status_code=CLIENT_LEFT))

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        words = "the request could not be answered, the server's log says why"
        return counted(ApiError(500, words, code="failed").response())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        words = f"{request.method} {request.url.path[:200]}: {error.detail}"
        response = ApiError(error.status_code, words, code="not_found").response()
        response.headers.update(error.headers or {})
        return response


def check_key(request: Request, keys: Sequence[str]) -> None:
    """Raise ApiError 401 for a request that bears none of the keys, where there are any."""
    if not keys:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if not [key for key in keys if hmac.compare_digest(given, key.encode())]:
        raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")


def _schema(kind: type[Generation], media: str, **extra: Any) -> dict[str, Any]:
    schema = kind.model_json_schema()
    schema["properties"] |= extra
    schema["required"] = [*schema["required"], *(name for name in extra if name == "image")]
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    words = {400: "an argument is wrong", 401: "no API key", 404: "no such model", 408: "the body was slow"}
    words |= {413: "the body is too large", 429: "too much waits", 500: "the picture could not be drawn"}
    words |= {503: "no memory", 504: "past its deadline"}
    return {status: {"description": words[status]} for status in statuses}


def _add_images(app: FastAPI, state: State) -> None:
    answers = Answers(state)
    statuses = _answers(400, 401, 404, 408, 413, 429, 500, 503, 504)
    file = {"type": "string", "format": "binary"}

    @app.post("/v1/images/generations", openapi_extra=_schema(Generation, "application/json"), responses=statuses)
    async def generations(request: Request) -> Response:
        check_key(request, state.settings.api_keys)
        return await answers.generation(request)

    form = _schema(Edit, "multipart/form-data", image=file, mask=file)

    @app.post("/v1/images/edits", openapi_extra=form, responses=statuses)
    async def edits(request: Request) -> Response:
        check_key(request, state.settings.api_keys)
        return await answers.edit(request)

    @app.get("/v1/images/files/{name}", responses=_answers(404))
    async def files(name: str) -> Response:
        found = await asyncio.to_thread(state.kept.get, name)
        if found is None:
            raise ApiError(404, "this picture is not kept any more", code="not_found")
        return Response(found[0], media_type=MEDIA[found[1]])


def _add_facts(app: FastAPI, state: State) -> None:
    def model(served: Served) -> dict[str, Any]:
        about = served.about | {
            "batch_invariant": state.invariant[served.name],
            "ignored": IGNORED,
            "loras": [*state.settings.loras] if served.name == state.settings.models[0].name else [],
        }
        return {"id": served.name, "object": "model", "created": 0, "owned_by": "ldmq", "ldmq": about}

    @app.get("/v1/models", responses=_answers(401))
    async def models(request: Request) -> Response:
        check_key(request, state.settings.api_keys)
        return JSONResponse({"object": "list", "data": [model(served) for served in state.models.values()]})

    @app.get("/v1/models/{name}", responses=_answers(401, 404))
    async def one_model(name: str, request: Request) -> Response:
        check_key(request, state.settings.api_keys)
        if name not in state.models:
            raise ApiError(404, f"there is no model {name[:80]!r}", "model", "model_not_found")
        return JSONResponse(model(state.models[name]))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses=_answers(503))
    async def ready() -> Response:
        body = {"ready": state.is_ready(), "batch_invariant": state.invariant}
        return JSONResponse(body, 200 if state.is_ready() else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))
