"""The chat templates against the formats as published, to the character."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from hrwkv.convert.presets import presets_of

RECIPES = Path(__file__).parents[2] / "recipes"
FORMATS = {preset.name: preset.chat for preset in presets_of(RECIPES)}
ONE_OF_EACH = ("reka-flash-3", "reka-flash-3.1", "qwen2.5-7b", "qwen3-8b", "llama-3.1-8b", "mistral-small-3")

SYS, U1, A1, U2 = (
    {"role": role, "content": text}
    for role, text in (("system", "SYS"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
)
R1 = {"role": "assistant", "content": "<reasoning>R</reasoning> A1"}
AROUND = {"role": "assistant", "content": "before <reasoning>R</reasoning> after"}
THOUGHT = {"role": "assistant", "content": "<think>\nT\n</think>\n\nA1"}
Messages = list[dict[str, Any]]


def render(
    name: str, messages: Messages, *, no_reasoning: bool = False, prompt: bool = True, **values: Any
) -> str:
    """What the model reads, as the tokenizer's ``apply_chat_template`` renders it."""
    chat = FORMATS[name]
    assert chat is not None
    template = chat.no_reasoning_template if no_reasoning else chat.template
    tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompt, **tokens, **values
    )
    return rendered[0]


REKA_3: dict[str, tuple[Messages, str]] = {
    "table": (
        [SYS, U1, A1, U2],
        "human: SYS U1 <sep> assistant: A1 <sep> human: U2 <sep> assistant: ",
    ),
    "no-system": ([U1], "human: U1 <sep> assistant: "),
    "reasoning-first": ([U1, R1, U2], "human: U1 <sep> assistant:  A1 <sep> human: U2 <sep> assistant: "),
    "reasoning-between": (
        [U1, AROUND, U2],
        "human: U1 <sep> assistant: before  after <sep> human: U2 <sep> assistant: ",
    ),
    "last-is-assistant": ([U1, A1], "human: U1 <sep> assistant: A1 <sep> <|endoftext|>"),
    "users-reasoning-stays": (
        [{"role": "user", "content": "<reasoning>R</reasoning>"}],
        "human: <reasoning>R</reasoning> <sep> assistant: ",
    ),
    "other-role": (
        [U1, {"role": "tool", "content": "4"}],
        "human: U1 <sep> tool: 4 <sep> assistant: ",
    ),
}


@pytest.mark.parametrize("case", REKA_3)
def test_reka_3(case: str) -> None:
    messages, expected = REKA_3[case]
    assert render("reka-flash-3", messages) == expected


def test_reka_3_without_reasoning() -> None:
    assert render("reka-flash-3", [SYS, U1, A1, U2], no_reasoning=True) == (
        "human: SYS U1 <sep> assistant: A1 <sep> human: U2 <sep> assistant: <reasoning>\n\n</reasoning>\n"
    )
    ended = "human: U1 <sep> assistant: A1 <sep> <|endoftext|>"
    assert render("reka-flash-3", [U1, A1], no_reasoning=True) == ended


def test_reka_3_1_keeps_reasoning_and_names_the_user() -> None:
    assert render("reka-flash-3.1", [SYS, U1, R1, U2]) == (
        "human: SYS user: U1 <sep> assistant: <reasoning>R</reasoning> A1 <sep> human: U2 <sep> assistant: "
    )
    assert render("reka-flash-3.1", [U1]) == "human: U1 <sep> assistant: "
    assert render("reka-flash-3.1", [U1, A1]) == "human: U1 <sep> assistant: A1 <sep> <|endoftext|>"


def test_reka_3_1_without_reasoning_opens_every_answer() -> None:
    empty = "<reasoning>\n\n\n</reasoning>\n"
    assert render("reka-flash-3.1", [SYS, U1, A1, U2], no_reasoning=True) == (
        f"human: SYS user: U1 <sep> assistant: {empty}A1 <sep> human: U2 <sep> assistant: {empty}"
    )


@pytest.mark.parametrize("name", ["reka-flash-3", "reka-flash-3.1"])
@pytest.mark.parametrize("messages", [[SYS], []], ids=["system-only", "empty"])
def test_reka_refuses_what_has_no_turn(name: str, messages: Messages) -> None:
    with pytest.raises(jinja2.TemplateError, match="no message to answer.*system text opens the first user"):
        render(name, messages)


@pytest.mark.parametrize("name", ["reka-flash-3", "reka-flash-3.1"])
def test_reka_without_a_prompt_ends_the_text(name: str) -> None:
    assert render(name, [U1], prompt=False) == "human: U1 <sep> <|endoftext|>"


CHATML = (
    "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n"
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n"
)


def test_qwen_is_chatml() -> None:
    assert render("qwen2.5-7b", [SYS, U1, A1, U2]) == CHATML
    assert render("qwen2.5-7b", [U1], prompt=False) == "<|im_start|>user\nU1<|im_end|>\n"


def test_qwen3_is_chatml_and_an_empty_thought_turns_thinking_off() -> None:
    off = CHATML + "<think>\n\n</think>\n\n"
    assert render("qwen3-8b", [SYS, U1, A1, U2]) == CHATML
    assert render("qwen3-8b", [SYS, U1, A1, U2], enable_thinking=True) == CHATML
    assert render("qwen3-8b", [SYS, U1, A1, U2], enable_thinking=False) == off
    assert render("qwen3-8b", [SYS, U1, A1, U2], no_reasoning=True) == off
    assert render("qwen3-8b", [SYS, U1, A1, U2], no_reasoning=True, enable_thinking=True) == off


@pytest.mark.parametrize(
    "answer",
    [THOUGHT, {**A1, "reasoning_content": "T"}, {**A1, "reasoning_content": "\nT\n"}],
    ids=["in-the-text", "beside-it", "with-line-ends"],
)
def test_qwen3_keeps_only_the_thought_after_the_last_question(answer: dict[str, str]) -> None:
    assert render("qwen3-8b", [SYS, U1, answer, U2]) == CHATML
    assert render("qwen3-8b", [U1, answer], prompt=False) == (
        "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n<think>\nT\n</think>\n\nA1<|im_end|>\n"
    )


def test_llama_3() -> None:
    turns = (("system", "SYS"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"))
    text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert render("llama-3.1-8b", [SYS, {**U1, "content": " U1\n"}, A1, U2]) == f"<s>{text}{opening}"
    assert render("llama-3.1-8b", [SYS, U1, A1, U2], prompt=False) == f"<s>{text}"


def test_mistral_small_3() -> None:
    text = "<s>[SYSTEM_PROMPT]SYS[/SYSTEM_PROMPT][INST]U1[/INST]A1<|endoftext|>[INST]U2[/INST]"
    assert render("mistral-small-3", [SYS, U1, A1, U2]) == text


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tools_are_refused_and_not_dropped(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="has no tools: leave them out"):
        render(name, [U1], tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_parts_are_refused_and_not_printed(name: str) -> None:
    parts = {"role": "user", "content": [{"type": "image"}]}
    for messages in ([parts], [U1, parts], [SYS, parts]):
        with pytest.raises(jinja2.TemplateError, match="text"):
            render(name, messages)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-8b", "llama-3.1-8b", "mistral-small-3"])
def test_nothing_and_other_roles_are_refused(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="no message to answer"):
        render(name, [])
    with pytest.raises(jinja2.TemplateError, match="no system, user or assistant text"):
        render(name, [U1, {"role": "tool", "content": "4"}])


def test_models_of_one_family_share_a_template() -> None:
    for shared in ("qwen3-", "qwen2.5-", "llama-3"):
        assert len({chat for name, chat in FORMATS.items() if name.startswith(shared)}) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_models_that_reason_have_a_second_template(name: str) -> None:
    chat = FORMATS[name]
    assert chat is not None
    reasons = name.startswith(("reka", "qwen3"))
    assert (chat.no_reasoning_template is not None) == reasons
    if reasons:
        with_reasoning, without = render(name, [U1]), render(name, [U1], no_reasoning=True)
        assert without.startswith(with_reasoning)
        assert without != with_reasoning


TEXT = st.text(st.sampled_from("ab <>/\n"), max_size=8)
TURNS = st.lists(st.tuples(TEXT, TEXT), max_size=4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@settings(max_examples=50, deadline=None)
@given(turns=TURNS, system=TEXT, question=TEXT)
def test_a_conversation_only_grows(
    name: str, turns: list[tuple[str, str]], system: str, question: str
) -> None:
    """Without reasoning a prompt continues the one before, so what was computed for that stays useful."""
    messages: Messages = [{"role": "system", "content": system}]
    before = ""
    for asked, answered in [*turns, (question, "")]:
        messages.append({"role": "user", "content": asked})
        now = render(name, messages)
        assert now.startswith(before)
        assert asked.strip() in now[len(before) :]
        before = now
        messages.append({"role": "assistant", "content": answered})
