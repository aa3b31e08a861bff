"""The routes beside generation."""

import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hrwkv.engine.request import SamplingParams
from tests.server.fakes import FakeEngine, ask, fake_app


def engine() -> FakeEngine:
    return FakeEngine(lambda prompt, params: [["a"]])


def test_models() -> None:
    app = fake_app(engine(), model_name="mine")
    body = ask(app, "/v1/models").json()
    (card,) = body["data"]
    assert (body["object"], card["id"], card["object"], card["max_model_len"]) == (
        "list",
        "mine",
        "model",
        200,
    )
    assert ask(app, "/v1/models/mine").json() == card


def test_the_tokenizer_of_a_client_that_has_none() -> None:
    app = fake_app(engine())
    assert ask(app, "/tokenizer_info").json()["eos_token"] == "<end>"
    tokens = ask(app, "/tokenize", {"prompt": "h\u00e9", "add_special_tokens": False}).json()["tokens"]
    assert ask(app, "/detokenize", {"tokens": tokens}).json() == {"prompt": "h\u00e9"}
    assert len(tokens) == 3


def test_a_conversation_in_tokens() -> None:
    app = fake_app(engine())
    given = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
    body = ask(app, "/tokenize", given).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) == len("user: a\nassistant: ")


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "neither of prompt and messages"),
        ("/tokenize", {"prompt": "a", "messages": []}, "both of prompt and messages"),
        ("/tokenize", {"prompt": "\udfff"}, "half of a surrogate pair"),
        ("/detokenize", {"tokens": [1, 257]}, "tokens has the id 257, expected 0 to 256"),
        ("/detokenize", {"tokens": [-1]}, "tokens has the id -1"),
    ],
)
def test_refusals(path: str, body: dict[str, Any], says: str) -> None:
    response = ask(fake_app(engine()), path, body)
    assert response.status_code == 400
    assert says in response.text


def test_metrics_are_prometheus_text() -> None:
    app = fake_app(engine())
    text = ask(app, "/metrics").text
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    gauges = "queued running kv_blocks_used state_slots_total state_bytes kv_bytes prefix_bytes"
    for name in gauges.split():
        assert samples[f"hrwkv_{name}"] == 3
    for name in ("prompt_tokens", "prompt_tokens_reused", "generated_tokens", "preempted"):
        assert samples[f"hrwkv_{name}_total"] == 3
    assert samples["hrwkv_healthy"] == 1
    assert samples["hrwkv_time_to_first_token_seconds_count"] == 1
    assert samples["hrwkv_inter_token_seconds_sum"] == pytest.approx(0.04)
    buckets = [line for line in text.splitlines() if line.startswith("hrwkv_inter_token_seconds_bucket")]
    assert [line.rsplit(" ", 1)[1] for line in buckets] == [*["0.0"] * 3, "1.0", "1.0", *["2.0"] * 12]
    assert 'le="0.01"' in buckets[3]
    assert 'le="+Inf"' in buckets[-1]
    assert ask(app, "/metrics").text.count("hrwkv_inter_token_seconds_count 2.0") == 1  # the same again


def test_version_is_the_packages() -> None:
    app = fake_app(engine())
    assert ask(app, "/version").json()["version"] == ask(app, "/openapi.json").json()["info"]["version"]


@pytest.mark.parametrize("shown", [False, True])
def test_prompts_are_logged_only_if_asked_for(shown: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = fake_app(engine(), log_prompts=shown)
    ask(app, "/v1/completions", {"prompt": "a secret"})
    ask(app, "/v1/completions", {"prompt": "a secret", "n": "x"})
    ask(app, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a secret"}]})
    assert caplog.text.count("a secret") == (2 if shown else 0)


def test_a_refusal_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hrwkv.server.errors")
    app = fake_app(engine())
    ask(fake_app(engine(), api_keys=["k"]), "/v1/a%0Ab", headers={"Authorization": "Bearer secret"})
    ask(app, "/v1/completions", {"prompt": "a", "top\nq": 1})
    ask(app, "/v1/completions", {"prompt": "a", "n": "x"})
    ask(app, "/v1/completions", {"prompt": "a", "top_p": -1})
    assert [record.getMessage() for record in caplog.records] == [
        "refused '/v1/a\\nb': 401 invalid_api_key",
        "refused '/v1/completions': 400 unsupported_field 'top\\nq'",
        "refused '/v1/completions': 422 invalid_request_error 'n'",
        "refused '/v1/completions': 400 invalid_request_error 'top_p'",
    ]


def test_the_document_describes_every_route_and_error() -> None:
    document = ask(fake_app(engine()), "/openapi.json").json()
    routes = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/ready"}
    assert routes <= set(document["paths"])
    described = document["paths"]["/v1/completions"]["post"]["responses"]
    assert {"400", "401", "404", "408", "413", "422", "429", "503"} <= set(described)
    assert "HTTPValidationError" not in json.dumps(document)


def test_priority_is_a_clients_only_where_it_is_open() -> None:
    open_engine = engine()
    assert ask(
        fake_app(open_engine, allow_priority=True), "/v1/completions", {"prompt": "a", "priority": -3}
    ).is_success
    assert open_engine.requests[0].options["priority"] == -3


def test_times_and_lengths_are_the_settings() -> None:
    limited = engine()
    app = fake_app(limited, request_seconds=7.0, max_prompt_tokens=3)
    assert ask(app, "/v1/completions", {"prompt": "abc"}).status_code == 200
    assert limited.requests[0].options["deadline"] == 7.0
    assert limited.requests[0].params == SamplingParams(max_tokens=16)
    response = ask(app, "/v1/completions", {"prompt": "abcd"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "the prompt has 4 tokens, expected at most 3" in response.text
    assert response.json()["error"]["param"] == "prompt"
