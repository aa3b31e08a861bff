"""The routes beside generation: models, the tokenizer, health, metrics, version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from hrwkv.server.errors import RESPONSES, ApiError
from hrwkv.server.metrics import Metrics
from hrwkv.server.schemas import DetokenizeRequest, TokenizeRequest
from hrwkv.server.service import Service
from hrwkv.server.stream import to_json


def model_routes(service: Service) -> APIRouter:
    """What is served."""
    router = APIRouter(tags=["openai"], responses=RESPONSES)
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "hrwkv",
        "max_model_len": service.engine.max_context,
    }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        """The same by its name."""
        service.check_model(model)
        return card

    return router


def tokenizer_routes(service: Service) -> APIRouter:
    """The tokenizer for clients that have none, as lm-eval and vLLM's clients ask for it."""
    router = APIRouter(tags=["tokenizer"], responses=RESPONSES)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            came = "neither" if body.prompt is None else "both"
            raise ApiError(400, f"{came} of prompt and messages given, expected one", param="prompt")
        if body.messages is None:
            tokens = await service.encode(body.prompt or "", special=body.add_special_tokens)
        else:
            messages, variables = body.messages, body.chat_template_kwargs
            text = await service.in_thread(lambda: service.chat.render(messages, variables=variables).text)
            tokens = await service.encode(text, special=False, param="messages")
        found = {"tokens": tokens, "count": len(tokens), "max_model_len": service.engine.max_context}
        if body.return_token_strs:
            found["token_strs"] = service.tokenizer.convert_ids_to_tokens(tokens)
        return Response(to_json(found), media_type="application/json")

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        for token in body.tokens:
            if not 0 <= token < service.vocab_size:
                expected = f"0 to {service.vocab_size - 1}"
                raise ApiError(400, f"tokens has the id {token}, expected {expected}", param="tokens")
        text = await service.decode(body.tokens)
        return Response(to_json({"prompt": text}), media_type="application/json")

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What a client must know of it."""
        tokenizer, special = service.tokenizer, service.tokenizer.special_tokens_map
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "model_max_length": service.engine.max_context,
            "chat_template": service.chat.template,
            **{name: special.get(name) for name in ("bos_token", "eos_token", "pad_token")},
        }

    return router


def health_routes(service: Service, metrics: Metrics) -> APIRouter:
    """What those who run the server ask."""
    router = APIRouter(tags=["operation"], responses=RESPONSES)

    # Some probes ask for the head only.
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process is worth keeping; 503: the engine is dead, start the server again."""
        if not service.engine.is_alive:
            raise ApiError(503, "the engine has stopped: start the server again", code="engine_unavailable")
        return {"status": "alive"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """200 while requests are taken."""
        if not service.is_ready:
            reason = "is shutting down" if service.draining.is_set() else "has no engine any more"
            raise ApiError(503, f"the server {reason}: ask another one", code="not_ready")
        return {"status": "ready"}

    @router.get("/metrics")
    async def read_metrics() -> Response:
        """Prometheus' text format."""
        text = await service.in_thread(metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/version")
    async def read_version() -> dict[str, str]:
        """The package's."""
        return {"version": version("hrwkv")}

    return router
