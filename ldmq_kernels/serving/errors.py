"""Answers that say what is wrong, in the form that clients of OpenAI's API read."""

from __future__ import annotations

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A request that is not answered with a picture.

    Args:
        status: of HTTP.
        message: what was found, what is accepted.
        param: the argument that is meant.
        code: a word for programs.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)
