"""Running the application under uvicorn: a port that is taken first, and an end that lets what runs finish."""

from __future__ import annotations

import socket

import uvicorn

from ldmq_kernels.serving.app import make_app
from ldmq_kernels.serving.loading import ServingError
from ldmq_kernels.serving.settings import ServerSettings


def bound(host: str, port: int) -> socket.socket:
    """A listening place.

    Raises:
        ServingError: another server has it, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
        place.listen(2048)
    except (OSError, OverflowError) as error:
        place.close()
        raise ServingError(f"{host}:{port} cannot be served: {error}; choose another --port") from None
    return place


def serve(settings: ServerSettings, host: str, port: int, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new and finish what runs, for so many seconds at most.

    Raises:
        ServingError: the port is taken, or a model cannot be served.
    """
    with bound(host, port) as place:
        app = make_app(settings)
        config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=drain_seconds, server_header=False)
        server = uvicorn.Server(config)
        try:
            server.run([place])
        except SystemExit:  # uvicorn's own end of a start that failed; why it did is said below
            if app.state.failure is None:
                raise
        if app.state.failure is not None:
            raise app.state.failure
