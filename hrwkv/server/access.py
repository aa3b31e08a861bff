"""What stands before every route: API keys, the size of bodies, the end of service.

Plain ASGI, so that streams pass."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrwkv.server.errors import ApiError, refusal
from hrwkv.server.metrics import Metrics
from hrwkv.server.service import Service
from hrwkv.server.stream import DONE, EVENTS, event

logger = logging.getLogger(__name__)
# Probes have no key.
OPEN_PATHS = {"/health", "/ready"}
# For a whole body to come.
BODY_SECONDS = 60.0
# For what is left of a body that is refused.
DRAIN_SECONDS = 2.0


class Gate:
    """ASGI middleware; refuses in OpenAI's form and counts every answer."""

    def __init__(
        self, app: ASGIApp, *, service: Service, metrics: Metrics, api_keys: Sequence[str] = ()
    ) -> None:
        self._app, self._service, self._metrics = app, service, metrics
        # Of digests, so that the time of a comparison tells nothing, a key's length included.
        self._keys = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        def count(status: int) -> None:
            # Only known paths are labels: what clients make up must not fill the memory.
            self._metrics.count(getattr(scope.get("route"), "path", "other"), status)

        is_begun = is_stream = False

        async def counting_send(message: Message) -> None:
            nonlocal is_begun, is_stream
            if message["type"] == "http.response.start":
                is_begun = True
                is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith(EVENTS)
                count(message["status"])
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await _drain(scope, receive)
            await refusal(scope["path"], error)(scope, receive, counting_send)
            return
        try:
            await self._app(scope, self._limited(receive), counting_send)
        except asyncio.CancelledError:
            if not self._service.draining.is_set():
                raise
            # The process ends, and a traceback for each answer would hide why.
            logger.warning("cut off an answer of %s: the server stops", scope["path"])
            if not is_begun:
                await _stopping().response()(scope, receive, counting_send)
            elif is_stream:
                end = event(_stopping().body()) + DONE
                await counting_send({"type": "http.response.body", "body": end})
        except Exception:
            count(500)  # Starlette answers it outside of here
            raise

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._keys]
            if scheme.lower() != "bearer" or not any(known):
                message = "no valid API key: send Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
        if self._service.draining.is_set() and scope["method"] == "POST":
            raise _stopping()
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._service.settings.max_body_bytes:
            raise self._too_large(f"{length[:20]} bytes")

    def _limited(self, receive: Receive) -> Receive:
        """The same for a body that does not tell its size in advance, and a limit to the time that it takes.

        What has come of a body is kept in memory, which clients that never end theirs would fill.
        """
        limit, read, is_whole = self._service.settings.max_body_bytes, 0, False
        end = asyncio.get_running_loop().time() + BODY_SECONDS

        async def counting() -> Message:
            nonlocal read, is_whole
            try:
                # Behind a body only the client's leaving is waited for.
                async with asyncio.timeout_at(None if is_whole else end):
                    message = await receive()
            except TimeoutError as error:
                late = f"the body has not come in {BODY_SECONDS:.0f} s"
                raise ApiError(408, late, code="body_timeout") from error
            is_whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > limit:
                raise self._too_large(f"more than {limit} bytes")
            return message

        return counting

    def _too_large(self, came: str) -> ApiError:
        limit = self._service.settings.max_body_bytes
        return ApiError(413, f"the body has {came}, expected at most {limit}", code="body_too_large")


async def _drain(scope: Scope, receive: Receive) -> None:
    """Drop a body that still comes, for a while: many clients read no answer before they have sent it all.

    One that waits for leave to send is not given it.
    """
    if "expect" in Headers(scope=scope):
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def _stopping() -> ApiError:
    return ApiError(503, "the server is shutting down: ask another one", code="not_ready")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
