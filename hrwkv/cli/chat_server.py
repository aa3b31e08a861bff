"""The other end of a chat with a server: OpenAI's interface, ours or another's, read as it streams."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from hrwkv.cli.generate import Piece, SamplingSettings

# A server that is silent for so long has gone.
SILENCE_SECONDS = 600.0
LONGER = "; here: a lower --max-tokens, or /reset"
KEY_ASKED = "give --api-key-file with a file that has one of its keys"


@dataclass(frozen=True)
class ServerModel:
    """The first model of a server. fields: of every request, besides the messages."""

    url: str
    headers: dict[str, str]
    fields: dict[str, Any]

    @classmethod
    def open(
        cls, url: str, *, settings: SamplingSettings, no_reasoning: bool, api_key_file: Path | None
    ) -> ServerModel:
        """Ask the server at ``url`` (with or without /v1 and the route) for its model.

        Raises ValueError if it cannot be reached, refuses, or has none.
        """
        local = SamplingSettings()
        if (settings.dtype, settings.device) != (local.dtype, local.device):
            raise ValueError("--dtype and --device are for a directory: a server has chosen them already")
        headers = {"Content-Type": "application/json"}
        if api_key_file is not None:
            headers["Authorization"] = f"Bearer {_first_line(api_key_file)}"
        base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        server = cls(base, headers, {})
        with server._request("/v1/models") as response:
            models = _json(response.read(), url).get("data")
        if not models:
            raise ValueError(f"{url} serves no model: start one with hrwkv serve")
        fields: dict[str, Any] = {
            "model": models[0]["id"],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "seed": settings.seed,
            "stop": list(settings.stop) or None,
            "reasoning_budget": 0 if no_reasoning else None,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return cls(server.url, headers, given)

    @property
    def max_tokens(self) -> int:
        """Of one answer."""
        return int(self.fields["max_tokens"])

    def answer(self, messages: list[dict[str, str]], *, attempt: int) -> Iterator[Piece]:
        """The answer as it comes; the last piece has the tokens. Raises ValueError for a refusal."""
        body = {
            **self.fields,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if "seed" in body:
            body["seed"] += attempt
        with self._request("/v1/chat/completions", body) as response:
            line = b""
            try:
                for line in filter(bytes.strip, response):
                    if line.startswith(b"data: {"):
                        yield from _pieces(_json(line[len(b"data: ") :], self.url))
            except (OSError, HTTPException) as error:
                raise ValueError(f"{self.url} broke off in the answer ({error})") from error
        # To http.client a body that is cut off between two chunks is whole.
        if line.strip() != b"data: [DONE]":
            raise ValueError(f"{self.url} broke off in the answer, which has no end")

    def _request(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=SILENCE_SECONDS)
        except urllib.error.HTTPError as error:
            reason = KEY_ASKED if error.code == 401 else _refusal(error)
            raise ValueError(f"{self.url} refuses with {error.code}: {reason}") from error
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise ValueError(f"{self.url} does not answer ({cause}): {_advice(cause)}") from error
        return response


def _advice(cause: object) -> str:
    """What to do about a server that does not answer."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "put the file of its certificate, or of who signed it, into the variable SSL_CERT_FILE"
    if isinstance(cause, ssl.SSLError):
        return "does it speak http:// only?"
    return "is it https:// that it speaks?" if isinstance(cause, HTTPException) else "is the server running?"


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    """What one event of the stream says. Raises ValueError for an error."""
    if "error" in event:
        raise ValueError(f"the answer broke off: {event['error'].get('message', event['error'])}")
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        for name in ("reasoning_content", "content"):
            if delta.get(name):
                yield Piece(delta[name], 0, is_reasoning=name == "reasoning_content")
    if usage := event.get("usage"):
        yield Piece("", usage["completion_tokens"])


def _refusal(error: urllib.error.HTTPError) -> str:
    """The message of a refusal in OpenAI's form, or its standard phrase."""
    try:
        found = json.loads(error.read())["error"]
        is_full = found.get("code") == "context_length_exceeded"
        return str(found["message"]) + (LONGER if is_full else "")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return str(error.reason)


def _json(text: bytes, url: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{url} answers with what is no JSON: is it a server of OpenAI's interface?"
        ) from error
    return value


def _first_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no key: write it in a line")
    return keys[0]
