"""Error responses in one form that OpenAI's clients also understand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sfumato.errors import SfumatoError, UsageError
from sfumato.jobs.queue import Full

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

__all__ = ["ApiError", "add_handlers", "answer", "described", "not_found"]

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error response. after: seconds until the client should retry; None if a retry cannot help."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, after: int | None = None
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code, self.after = status, message, param, code, after


def not_found(what: str, name: str) -> ApiError:
    """Return the error for a name that does not exist."""
    return ApiError(404, f"there is no {what} {name[:100]!r}", code=f"{what}_not_found")


def described(error: ApiError) -> dict[str, Any]:
    """Convert an error to the body of a response or event."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def answer(error: ApiError) -> JSONResponse:
    """Convert an error to a JSON response."""
    headers = {"x-should-retry": "false"} if error.after is None else {"Retry-After": str(error.after)}
    return JSONResponse(described(error), error.status, headers)


def add_handlers(app: FastAPI) -> None:
    """Make the application return every error in this form."""
    from fastapi.exceptions import RequestValidationError  # imports all of FastAPI, which the guard does not need

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(SfumatoError)
    async def _ours(_: Request, error: SfumatoError) -> JSONResponse:
        if isinstance(error, Full):
            return answer(ApiError(429, str(error), after=error.after, code="queue_full"))
        return answer(ApiError(400 if isinstance(error, UsageError) else 500, str(error)))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        return answer(
            ApiError(400, f"{where or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=where)
        )

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, f"unexpected error ({type(error).__name__}); see the server's log"))

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        found = answer(ApiError(error.status_code, str(error.detail).lower()))
        found.headers.update(error.headers or {})
        return found
