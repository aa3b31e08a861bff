"""uvicorn around the application: the socket, TLS, and an end that lets running requests finish."""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import uvicorn
from transformers import GenerationConfig

from hrwkv.engine.engine import Engine
from hrwkv.server.app import create_app, make_service
from hrwkv.server.service import Service
from hrwkv.settings import EngineSettings, ServeSettings

logger = logging.getLogger(__name__)
BACKLOG = 2048
# Longer than clients keep an unused connection (5 s): none is closed just as a request is sent on it.
KEEP_ALIVE_SECONDS = 65


class Server(uvicorn.Server):
    """uvicorn's server, which says that it stops before it stops.

    The first SIGTERM or Ctrl-C turns /ready red and closes the socket; what runs has ``shutdown_seconds``.
    """

    def __init__(self, service: Service, *, api_keys: Sequence[str] = ()) -> None:
        settings = service.settings
        config = uvicorn.Config(
            create_app(service, api_keys=api_keys),
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=round(settings.shutdown_seconds),
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            # The application's own log, with the level that the command line chose.
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            # httptools, which "auto" prefers, takes headers without end.
            http="h11",
            lifespan="off",
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that asks for the end; a second Ctrl-C waits for nothing.

        uvicorn's own also raises the signal once more when all is done, and nothing is left to do then.
        """
        self._service.draining.set()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that listens.

    Raises ValueError if the address is taken, unknown or not allowed, and for TLS files that do not open.
    """
    _check_tls(settings)
    place = f"{settings.host} port {settings.port}"
    try:
        return socket.create_server(
            (settings.host, settings.port),
            family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
            backlog=BACKLOG,
        )
    except OSError as error:
        # An address that cannot be looked up has a negative number; the text of the others repeats the place.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise ValueError(f"cannot listen on {place}: {reason}; choose another --port or --host") from error


def _check_tls(settings: ServeSettings) -> None:
    """Raise ValueError now rather than after the model is loaded."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.tls_certificate, settings.tls_key
        )
    except OSError as error:
        files = f"{settings.tls_certificate} and {settings.tls_key}"
        reason = error.strerror or str(error)
        raise ValueError(
            f"TLS files {files} do not open: {reason}; give PEM files that belong together"
        ) from error


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one a line. Raises ValueError if there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"API key file {path} is not UTF-8 text") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"API key file {path} holds no key: write one a line")
    return keys


def serve(
    path: Path,
    listener: socket.socket,
    *,
    settings: ServeSettings,
    engine_settings: EngineSettings,
    api_keys: Sequence[str] = (),
) -> None:
    """Open a model and serve it until a signal comes. Raises ValueError for a model that does not open."""
    if not api_keys and not ip_address(listener.getsockname()[0]).is_loopback:
        logger.warning("%s is open to the network and asks for no API key", settings.host)
    with listener, Engine.open(path, engine_settings) as engine:
        service = make_service(engine, settings, name=path.resolve().name, defaults=_defaults(path))
        server = Server(service, api_keys=api_keys)
        scheme = "https" if settings.tls_key else "http"
        host, port = listener.getsockname()[:2]
        logger.info("serving %s at %s://%s:%d/v1", service.name, scheme, host, port)
        server.run(sockets=[listener])
        service.close()
        engine.close(0)


def _defaults(path: Path) -> GenerationConfig:
    """How the model's maker wants it to be used; Transformers' defaults where the directory says nothing."""
    if (path / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig()
