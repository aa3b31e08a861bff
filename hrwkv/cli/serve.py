"""``hrwkv serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Annotated

from cyclopts import Parameter

from hrwkv.settings import EngineSettings, ServeSettings

EXAMPLES = """
hrwkv serve run/stage3
hrwkv serve run/stage3 --port 8080 --api-key-file keys.txt --host 0.0.0.0
hrwkv serve run/stage3 --api-key-env HRWKV_KEY --tls-certificate cert.pem --tls-key key.pem
hrwkv serve run/stage3 --model-name tiny --request-seconds 60 --log-prompts
"""
EXTRA = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")


def serve(
    model: Annotated[Path, Parameter(help="Directory of a student, or of any model that convert takes.")],
    /,
    *,
    settings: Annotated[ServeSettings, Parameter(name="*", group="Server")] = ServeSettings(),  # noqa: B008 (frozen)
    engine: Annotated[EngineSettings, Parameter(name="*", group="Engine")] = EngineSettings(),  # noqa: B008 (frozen)
) -> None:
    """Answer OpenAI's HTTP interface: /v1/chat/completions, /v1/completions, /v1/models and more.

    Ctrl-C or SIGTERM takes no new request and lets running ones finish. docs/serving.md tells every route.
    """
    if model.is_dir() and not (model / "config.json").exists():
        raise ValueError(f"{model} has no config.json: give the directory of a model")
    run = _import_run()
    keys = _api_keys(settings, run)
    # Before the weights, which may take minutes.
    listener = run.listen(settings)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run.serve(model, listener, settings=settings, engine_settings=engine, api_keys=keys)


def _import_run() -> ModuleType:
    """The module that runs the server. Raises ValueError if the extra is not installed."""
    try:
        from hrwkv.server import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        raise ValueError(f"hrwkv serve needs {error.name}: pip install 'hrwkv[serve]'") from error
    return run


def _api_keys(settings: ServeSettings, run: ModuleType) -> list[str]:
    """From the named file and variable. Raises ValueError where there is no usable key."""
    keys: list[str] = []
    if settings.api_key_file is not None:
        keys += run.read_keys(settings.api_key_file)
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key:
            name = settings.api_key_env
            raise ValueError(f"environment variable {name} is empty or not set: put the key there")
        keys.append(key)
    if not all(key.isascii() for key in keys):
        raise ValueError("an API key has letters outside ASCII, which no HTTP header carries: choose another")
    return keys
