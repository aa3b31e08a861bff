"""The ASGI application: routes over one engine, behind the gate."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from transformers import GenerationConfig

from hrwkv.server import chat, completions, errors, operations
from hrwkv.server.access import Gate
from hrwkv.server.logprobs import Logprobs
from hrwkv.server.metrics import Metrics
from hrwkv.server.params import Defaults
from hrwkv.server.service import Service
from hrwkv.server.template import ChatFormat
from hrwkv.settings import ServeSettings

if TYPE_CHECKING:
    from hrwkv.engine.engine import Engine


def make_service(
    engine: Engine, settings: ServeSettings, *, name: str, defaults: GenerationConfig
) -> Service:
    """What the routes share. name: of the model, unless the settings give one. defaults: the model's own."""
    return Service(
        engine,
        settings,
        settings.model_name or name,
        Defaults.from_config(defaults, sampling=settings.generation_defaults),
        ChatFormat.of(engine.tokenizer),
    )


def create_app(service: Service, *, api_keys: Sequence[str] = ()) -> FastAPI:
    """The application. api_keys: one of them is asked for; without any, nobody is asked."""
    # No pages: they would load scripts from elsewhere. /openapi.json tells everything.
    app = FastAPI(title="hrwkv", version=version("hrwkv"), docs_url=None, redoc_url=None)
    metrics, logprobs = Metrics(service.engine), Logprobs(service.tokenizer)
    app.include_router(completions.routes(service, logprobs))
    app.include_router(chat.routes(service, logprobs))
    app.include_router(operations.model_routes(service))
    app.include_router(operations.tokenizer_routes(service))
    app.include_router(operations.health_routes(service, metrics))
    errors.install(app)
    app.add_middleware(Gate, service=service, metrics=metrics, api_keys=api_keys)
    if service.settings.cors_origins:
        # Added last, so outermost: a browser's preflight has no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app
