"""Every refusal in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``.

422 is a body that is not what the OpenAPI document says: no JSON, a missing field, a wrong type. 400 is a
body that reads well and cannot be served: a value out of range, an unknown field, too many tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hrwkv.engine.request import CapacityError, EngineError, GrammarError, QueueFullError

logger = logging.getLogger(__name__)
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
OTHER_TYPE = "invalid_request_error"
RETRY_SECONDS = "1"
# A client's own text comes back in some messages; no more of it than a line holds.
MAX_MESSAGE = 500
# Of pydantic's error as of the answer.
UNSUPPORTED = "unsupported_field"


class ApiError(HTTPException):
    """A request that is refused, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        headers = {"Retry-After": RETRY_SECONDS} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        short = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
        super().__init__(status, short, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status_code, OTHER_TYPE)
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. ASCII: what a client sent may come back in it, half a surrogate pair too."""
        return Response(
            json.dumps(self.body()), self.status_code, dict(self.headers or {}), "application/json"
        )


class ErrorDetail(BaseModel):
    """For the OpenAPI document."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """For the OpenAPI document."""

    error: ErrorDetail


# What any route may answer with, for the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 405, 408, 413, 422, 429, 500, 503)
}


def api_error(error: Exception) -> ApiError:
    """The refusal that an exception of the engine stands for; anything else is a fault of ours, 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_unavailable")
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), code="grammar_failed")
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply: make it flatter")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error")


@contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """Turn a ValueError about what the client sent into a 400 about ``param``."""
    try:
        yield
    except GrammarError as error:  # not about the prompt, and of fields that ask for a form there are several
        raise api_error(error) from error
    except CapacityError as error:
        found = api_error(error)
        found.param = param
        raise found from error
    except ValueError as error:
        raise ApiError(400, " ".join(str(error).split()), param=param) from error


def refusal(path: str, error: ApiError) -> Response:
    """The answer, and its line in the log.

    Without its message, where a client's own text may stand; path and field are theirs too, so quoted.
    """
    reason = error.code or TYPES.get(error.status_code, OTHER_TYPE)
    about = f" {error.param!r}" if error.param else ""
    logger.info("refused %r: %d %s%s", path, error.status_code, reason, about)
    return error.response()


def install(app: FastAPI) -> None:
    """Make every error of the app an ApiError's answer."""

    async def refuse(request: Request, error: Exception) -> Response:
        return refusal(request.url.path, api_error(error))

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        own = error if isinstance(error, ApiError) else _framework_error(request, error)
        return refusal(request.url.path, own)

    async def refuse_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refusal(request.url.path, _body_error(error.errors()))

    app.add_exception_handler(EngineError, refuse)
    app.add_exception_handler(CapacityError, refuse)
    app.add_exception_handler(GrammarError, refuse)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(Exception, refuse)


def _framework_error(request: Request, error: HTTPException) -> ApiError:
    """What Starlette and FastAPI refuse by themselves: routes, methods, bodies that Python cannot read."""
    where = f"{request.method} {request.url.path}"
    status, message = {
        400: (422, "the body is not JSON that can be read: too deeply nested, or a number too long"),
        404: (404, f"there is no {where}: see /openapi.json"),
        405: (405, f"{where} is not allowed here: see /openapi.json"),
    }.get(error.status_code, (error.status_code, str(error.detail)))
    found = ApiError(status, message)
    found.headers = {**(found.headers or {}), **(error.headers or {})}
    return found


def _body_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One line about the first field that is wrong; one that takes several forms has a complaint of each."""
    if unsupported := [error for error in errors if error["type"] == UNSUPPORTED]:
        return _unsupported(unsupported[0])
    places = [_place(error) for error in errors]
    if errors[0]["type"] == "json_invalid":
        reason = errors[0].get("ctx", {}).get("error", "it cannot be read")
        return ApiError(422, f"the body is not JSON: {reason}")
    if not places[0]:
        return ApiError(422, "the body is no JSON object with Content-Type: application/json")
    param = places[0][0]
    same = [error for error, place in zip(errors, places, strict=True) if place[:1] == [param]]
    where = ".".join(places[0]) if len(same) == 1 else param
    return ApiError(422, f"{where}: {' or '.join(dict.fromkeys(map(_complaint, same)))}", param=param)


def _complaint(error: Mapping[str, Any]) -> str:
    message = str(error["msg"])
    return message[0].lower() + message[1:]


def _unsupported(error: Mapping[str, Any]) -> ApiError:
    """A field that would change the answer's meaning and is not supported; see ``schemas.Body``."""
    name, where = error["ctx"]["name"], _place(error)
    message = f"{'.'.join(where)}: {error['msg']}" if where else str(error["msg"])
    return ApiError(400, message, param=where[0] if where else name, code=UNSUPPORTED)


def _place(error: Mapping[str, Any]) -> list[str]:
    """Where in the body, without pydantic's names for the forms that a field may have."""
    parts = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    return [str(part) for part in parts if isinstance(part, int) or part.isidentifier() and part.islower()]
