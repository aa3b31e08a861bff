"""The bodies of the requests, typed and nothing more; ranges are SamplingParams' affair.

A null is the same as leaving the field out, for clients send both. A field that is not here would change what
the answer means, so it is refused by name; those under ``Ignored`` change nothing that this server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hrwkv.server.errors import UNSUPPORTED

# Signed 64 bits: no number that JSON can spell may overflow in the engine.
Int: TypeAlias = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Json: TypeAlias = dict[str, Any]
# One complaint about a list is enough; a million of them would take all memory, as would a million messages.
MAX_ENTRIES = 4096
Ints: TypeAlias = Annotated[list[Int], Field(fail_fast=True)]
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
# The same for a map, which pydantic reads to its end.
MAX_BIASES = 1024
# Characters of a client's own name for a field that come back to it.
MAX_NAME = 60


def _few(given: Any) -> Any:
    """Before a map is read."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise PydanticCustomError("too_long", f"{len(given)} entries, expected at most {MAX_BIASES}")
    return given


def _unsupported(name: str, known: Sequence[str]) -> PydanticCustomError:
    name = name[:MAX_NAME]
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    # The text is no template: a name may have braces.
    given = {"name": name, "text": f"field {name!r} is not supported: {hint}"}
    return PydanticCustomError(UNSUPPORTED, "{text}", given)


class Body(BaseModel):
    """Strict JSON: no number in a string, no infinity, no field that is not declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Leave nulls out; raise for the first field that is not supported, which becomes a 400."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in given:
            if name not in known:
                raise _unsupported(name, known)
        return given


class Ignored(Body):
    """What OpenAI's clients send for OpenAI's own book-keeping."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class StreamOptions(Body):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    include_obfuscation: Any = None


class JsonSchema(Body):
    """The schema of ``response_format``."""

    name: str = ""
    description: str = ""
    # "schema" would hide a method of BaseModel.
    json_schema: Json | bool = Field(default_factory=dict, alias="schema")
    strict: Any = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way to ask for a form; one of them."""

    json_: Json | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Texts | None = None


class Sampling(Ignored):
    """What completions and chat share."""

    model: str = ""
    max_tokens: Int | None = None
    min_tokens: Int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float = 0.0
    n: Int = 1
    seed: Int | None = None
    stop: str | Texts = Field(default_factory=list)
    stop_token_ids: Ints = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Texts | None = None
    priority: Int | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Texts | Ints | Annotated[list[Ints], Field(fail_fast=True, max_length=MAX_ENTRIES)]
    max_tokens: Int | None = 16
    echo: bool = False
    logprobs: Int | None = None
    add_special_tokens: bool = True


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """What the model called earlier; ``arguments`` is JSON in a string, as OpenAI's clients have it."""

    name: str
    arguments: str | Json = ""
    # Beside them in what OpenAI's parse() gives.
    parsed_arguments: Any = None


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str = ""
    index: Any = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_ENTRIES)] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_ENTRIES)] = Field(
        default_factory=list
    )
    tool_call_id: str | None = None
    # A client that sends an answer back as it came sends these too.
    annotations: Any = None
    refusal: Any = None
    parsed: Any = None


class Function(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: Any = None


class Tool(Body):
    """An entry of ``tools``."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The function of a ``tool_choice``."""

    name: str


class ToolChoice(Body):
    """A ``tool_choice`` that names the function."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_ENTRIES)]
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_ENTRIES)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning_budget: Annotated[int, Field(ge=0, le=2**31)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Json = Field(default_factory=dict)


class TokenizeRequest(Ignored):
    """POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_ENTRIES)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: Json = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeRequest(Ignored):
    """POST /detokenize."""

    model: str = ""
    tokens: Ints
