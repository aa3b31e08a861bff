"""OpenAI's client against uvicorn, the real engine and the tiny teacher; and faults in the model."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import GenerationConfig

from hrwkv.engine.engine import Engine
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import load_model
from hrwkv.model.generate import Sampling, open_directory, stream_text
from hrwkv.model.modeling import HybridModel
from hrwkv.server.app import make_service
from hrwkv.server.run import Server, listen
from hrwkv.settings import EngineSettings, ServeSettings
from tests.server.test_reasoning import THINKS

MODEL = Path(__file__).parents[2] / "examples" / "tiny_teacher" / "model"
NAME = "tiny"
PROMPT = "def add(a, b):\n    return"
ASKED: list[Any] = [{"role": "user", "content": "import os"}]
TOKENS = 12


@dataclass
class Running:
    """A server in a thread, its engine and model, and a client of it."""

    engine: Engine
    model: HybridModel
    client: openai.OpenAI

    def complete(self, prompt: str = PROMPT, **fields: Any) -> str:
        given = {"max_tokens": TOKENS, "temperature": 0, **fields}
        return self.client.completions.create(model=NAME, prompt=prompt, **given).choices[0].text


def start(template: str | None = None) -> Iterator[Running]:
    model, tokenizer = load_model(MODEL), open_directory(MODEL)[1]
    tokenizer.chat_template = template or tokenizer.chat_template
    settings = EngineSettings(device="cpu", max_sequences=8, step_tokens=64, cache_bytes=2**25)
    values = ServeSettings(port=0)
    with listen(values) as listener, Engine(model, tokenizer, settings) as engine:
        server = Server(make_service(engine, values, name=NAME, defaults=GenerationConfig()))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield Running(engine, model, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60))
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    yield from start()


@pytest.fixture
def fragile() -> Iterator[Running]:
    """One that a test may break."""
    yield from start()


@pytest.fixture
def thinking() -> Iterator[Running]:
    """One whose template knows reasoning."""
    yield from start(THINKS)


@pytest.fixture(scope="module")
def reference() -> Any:
    """Greedy text by the loop of ``hrwkv generate``, which shares no code with the engine's."""
    model, tokenizer = open_directory(MODEL)

    def text(prompt: str, *, chat: bool = False, special: bool = True, count: int = TOKENS) -> str:
        if chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=special and not chat)["input_ids"]
        return "".join(stream_text(model, tokenizer, ids, sampling=Sampling(max_new_tokens=count)))

    return text


def test_completions_are_the_models(running: Running, reference: Any) -> None:
    answer = running.client.completions.create(model=NAME, prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    assert answer.choices[0].text == reference(PROMPT)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == TOKENS
    pieces = running.client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text


def test_chats_are_the_models(running: Running, reference: Any) -> None:
    given: dict[str, Any] = {
        "model": NAME,
        "messages": ASKED,
        "max_completion_tokens": TOKENS,
        "temperature": 0,
    }
    answer = running.client.chat.completions.create(**given)
    assert answer.choices[0].message.content == reference("import os", chat=True)
    chunks = list(
        running.client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    found, expected = chunks[-1].usage, answer.usage
    assert found is not None
    assert expected is not None
    assert (found.prompt_tokens, found.completion_tokens) == (expected.prompt_tokens, TOKENS)


def test_a_conversation_is_continued_and_not_read_again(running: Running, reference: Any) -> None:
    """Two turns as a client sends them; the second answer is that of the whole text."""
    template = running.engine.tokenizer.apply_chat_template
    messages: list[Any] = [{"role": "user", "content": "def find(items, key):\n    for item in items:\n"}]
    cached = []
    for _ in range(2):
        answer = running.client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=TOKENS, temperature=0
        )
        text = template(messages, add_generation_prompt=True, tokenize=False)
        assert answer.choices[0].message.content == reference(text, special=False)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "and again"}]
    assert cached[0][0] == 0
    assert cached[0][1] - 1 <= cached[1][0] < cached[1][1]
    counted = running.engine.stats()
    assert counted.prompt_tokens_reused >= cached[1][0]
    assert counted.prefix_bytes > 0


def test_requests_side_by_side_are_as_alone(running: Running) -> None:
    prompts = [f"{start}{number}" for number, start in enumerate(["def ", "class A", "import ", "x = "] * 2)]
    alone = [running.complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(running.complete, prompts)) == alone


def test_scores_of_a_prompt_are_the_models(running: Running) -> None:
    """What lm-eval asks for, against a plain forward."""
    ids = running.engine.tokenizer(PROMPT)["input_ids"]
    answer = running.client.completions.create(
        model=NAME, prompt=[ids, ids[:3]], max_tokens=1, temperature=0, logprobs=2, echo=True
    )
    with torch.no_grad():
        logits = running.model.compute_logits(
            running.model(torch.tensor(ids), TokenBatch.from_lengths([len(ids)]))
        )
    scores = logits.float().log_softmax(-1)
    for choice, length in zip(answer.choices, (len(ids), 3), strict=True):
        assert choice.logprobs is not None
        found, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert found is not None
        assert tops is not None
        assert (len(found), found[0]) == (length + 1, None)
        # fp32 in another order of sums.
        expected = [float(scores[at - 1, ids[at]]) for at in range(1, length)]
        assert found[1:-1] == pytest.approx(expected, abs=1e-4)
        for at in range(1, length):
            assert max(tops[at].values()) == pytest.approx(float(scores[at - 1].max()), abs=1e-4)


def test_scores_of_a_chat(running: Running) -> None:
    answer = running.client.chat.completions.create(
        model=NAME, messages=ASKED, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert "".join(entry.token for entry in scores.content) == answer.choices[0].message.content
    for entry in scores.content:
        # Greedy: each token is the first of its rivals, which are in order.
        assert entry.logprob == entry.top_logprobs[0].logprob
        values = [rival.logprob for rival in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert math.exp(sum(values[:1])) <= 1


def test_n_and_seed(running: Running) -> None:
    def draw(seed: int) -> list[str]:
        answer = running.client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=TOKENS, temperature=1.0, n=3, seed=seed
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = draw(1)
    assert draw(1) == first
    assert len({*first, *draw(2)}) > 3


def test_stop_texts_end_the_text_before_them(running: Running) -> None:
    whole = running.complete(max_tokens=30)
    stop = whole[6:9]
    answer = running.client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "never"]
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_answers_have_the_form_that_is_asked_for(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = running.client.chat.completions.create(
        model=NAME,
        messages=ASKED,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        extra_body={"seed": 5},
    )
    assert (answer.choices[0].message.content or "").replace(" ", "") in ('{"a":"x"}', '{"a":"y"}')
    assert answer.choices[0].finish_reason == "stop"
    chosen = running.complete(extra_body={"guided_choice": ["left", "right"]}, temperature=1.0)
    assert chosen in ("left", "right")


def test_an_answer_after_a_cut_reasoning_is_that_of_the_whole_text(thinking: Running) -> None:
    answer = thinking.client.chat.completions.create(
        model=NAME, messages=ASKED, max_tokens=TOKENS, temperature=0, extra_body={"reasoning_budget": 5}
    )
    opened = "user: import os\nassistant: <think>\n"
    thought = thinking.complete(opened, max_tokens=5, extra_body={"add_special_tokens": False})
    text = f"{opened}{thought.rstrip()}\n</think>\n\n"
    after = thinking.complete(text, max_tokens=TOKENS - 5, extra_body={"add_special_tokens": False})
    message: Any = answer.choices[0].message
    assert message.reasoning_content == thought.strip()
    assert message.content == after.lstrip()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == TOKENS
    before = thinking.engine.stats().prompt_tokens
    with pytest.raises(openai.BadRequestError, match="the regex is not one that can be matched"):
        thinking.client.chat.completions.create(model=NAME, messages=ASKED, extra_body={"guided_regex": "("})
    assert thinking.engine.stats().prompt_tokens == before


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "there is no model"),
        ({"temperature": 200}, openai.BadRequestError, "temperature is 200"),
        ({"max_tokens": 5000}, openai.BadRequestError, "1024"),
        ({"prompt": "x " * 3000}, openai.BadRequestError, "1024"),
        ({"n": "many"}, openai.UnprocessableEntityError, "n: input should be a valid integer"),
        ({"extra_body": {"guided_regex": "("}}, openai.BadRequestError, "regex"),
    ],
)
def test_errors_are_the_clients_classes(
    running: Running, fields: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        running.client.completions.create(**{"model": NAME, "prompt": PROMPT, "max_tokens": 4, **fields})


@pytest.mark.parametrize("failure", [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_failing_step_costs_no_other_request(fragile: Running, failure: Exception) -> None:
    """The model fails whenever one prompt is in the batch: that request fails, its neighbours go on."""
    alone = [fragile.complete(f"x{number} = ") for number in range(4)]
    poison = fragile.engine.tokenizer("@@@")["input_ids"][0]

    def fail(module: Any, given: Any) -> None:
        if (given[0] == poison).any():
            raise failure

    fragile.model.register_forward_pre_hook(fail)
    with ThreadPoolExecutor(5) as pool:
        good = [pool.submit(fragile.complete, f"x{number} = ") for number in range(4)]
        with pytest.raises(openai.InternalServerError, match="5"):
            fragile.complete("@@@")
        assert [each.result() for each in good] == alone
    assert fragile.complete("x0 = ") == alone[0]
    assert fragile.engine.is_alive


def test_a_dead_engine_fails_everybody_at_once(fragile: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise SystemError("broken")

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(fragile.complete, f"{number}", max_tokens=900) for number in range(3)]
        while fragile.engine.stats().running < 3:
            pass
        monkeypatch.setattr(fragile.engine._core, "step", die)
        for each in waiting:
            with pytest.raises(openai.InternalServerError, match="the engine has failed"):
                each.result(timeout=20)
    with pytest.raises(openai.InternalServerError, match="5"):
        fragile.complete()
