"""Names of settings in messages: flags where they were or could be typed, keys of a recipe elsewhere."""

import pytest

from hrwkv.cli.naming import as_flags

SERVE = ["MODEL", "*", "--port", "--max-sequences", "--step-tokens", "--tokens", "--no-thought"]
DISTILL = [
    "--data.context-length",
    *(f"--stage{n}.{f}" for n in (1, 2) for f in ("tokens", "context-length")),
]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_sequences is 0, expected at least 1", "--max-sequences is 0, expected at least 1"),
        (
            "step_tokens is 8, expected at least max_sequences 64, a token for each",
            "--step-tokens is 8, expected at least --max-sequences 64, a token for each",
        ),
        ("port is 7, expected one of: port, tokens", "--port is 7, expected one of: port, tokens"),
        ("the cache is too small: lower step_tokens", "the cache is too small: lower --step-tokens"),
        ("kl_weight is 0", "kl_weight is 0"),
        ("there is no template named no_thought", "there is no template named no_thought"),
        ("a/max_sequences has no 'step_tokens' in step_tokens.txt", None),
        ("use --step_tokens or step_tokens=8 or max_sequences/x", None),
    ],
)
def test_a_command_without_a_recipe_has_flags_only(message: str, expected: str | None) -> None:
    assert as_flags(message, flags=SERVE, words=["serve", "m"]) == (expected or message)


def test_a_file_that_is_named_like_a_setting_keeps_its_name() -> None:
    message = "max_sequences is no directory"
    assert as_flags(message, flags=SERVE, words=["serve", "max_sequences"]) == message


@pytest.mark.parametrize(
    ("typed", "message", "expected"),
    [
        (["--stage2.tokens=-5"], "stage.tokens is -5", "--stage2.tokens is -5"),
        (["--stage2.tokens", "-5"], "tokens is -5", "--stage2.tokens is -5"),
        (["--stage2.tokens", "-5"], "data.tokens is -5", "data.tokens is -5"),
        (["--stage1.tokens", "5", "--stage2.tokens", "-5"], "stage.tokens is -5", "stage.tokens is -5"),
        ([], "data.context_length is 0", "--data.context-length is 0"),
        (["--recipe", "r"], "data.context_length is 0", "data.context_length is 0"),
        (
            ["--recipe=r", "--stage1.tokens", "5"],
            "stage.tokens is 5, lower data.context_length",
            "--stage1.tokens is 5, lower data.context_length",
        ),
    ],
)
def test_beside_a_recipe_only_what_was_typed_is_a_flag(typed: list[str], message: str, expected: str) -> None:
    assert as_flags(message, flags=DISTILL, words=["distill", *typed]) == expected


def test_the_demo_has_always_a_recipe() -> None:
    assert as_flags("max_sequences is 0", flags=SERVE, words=["demo"]) == "max_sequences is 0"
