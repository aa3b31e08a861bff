"""Presets: what is known of a published teacher beyond its weights, one TOML file each in ``recipes/``.

A ``.pth`` says neither ``rope_theta`` nor ``rms_norm_eps``, and a wrong value gives silent garbage, so such
facts are data that a person can read and check. ``[teacher]`` holds the fields of the teacher's
``config.json``, ``[chat]`` how it is talked to; ``[convert]`` stands in the same file and is the command
line's. Chat templates lie beside it in ``chat/`` and are only ever rendered in Jinja's sandbox.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

CHAT_FOLDER = "chat"
CHAT_KEYS = ("template", "reasoning", "stop", "eos_token_id")
# The switch has its name from Qwen3's template. Set in front, it makes two templates of one file.
THINKING_OFF = "{%- set enable_thinking = false -%}\n"


@dataclass(frozen=True)
class ChatFormat:
    """How a model is talked to.

    template, no_reasoning_template: Jinja texts, the second for answers without reasoning, None for a model
    that never reasons. stop: texts that end an answer. eos_token_id: ids that end an answer, at least one.
    """

    template: str
    no_reasoning_template: str | None
    stop: tuple[str, ...]
    eos_token_id: tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """One teacher: ``teacher`` is what ``config_from_teacher`` takes; ``chat`` is None for a base model."""

    name: str
    teacher: dict[str, Any]
    chat: ChatFormat | None


def read_preset(path: Path) -> Preset:
    """The preset of a TOML file, named like it, with the texts of its chat templates.

    Raises ValueError, naming file and key, for a file without ``[teacher]``, for a value of ``[chat]`` that
    has another type or is not known, and for a template that is missing, broken or leaves the sandbox.
    """
    return _preset(path, _tables(path))


def presets_of(folder: Path) -> list[Preset]:
    """The presets of a folder by name, without the recipes that have no ``[teacher]``.

    Raises like ``read_preset``.
    """
    tables = {path: _tables(path) for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}
    return [_preset(path, table) for path, table in tables.items() if "teacher" in table]


def matching(presets: Iterable[Preset], sizes: Mapping[str, int]) -> list[Preset]:
    """Those whose teacher has all these values, like ``vocab_size`` or ``num_hidden_layers``.

    Several may: sizes do not tell one release of a model from the next.
    """
    return [preset for preset in presets if sizes.items() <= preset.teacher.items()]


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"preset {path} is not TOML: {error}") from error
    except OSError as error:
        raise ValueError(f"preset {path} cannot be read: {error.strerror}") from error


def _preset(path: Path, tables: dict[str, Any]) -> Preset:
    teacher = tables.get("teacher")
    if not isinstance(teacher, dict):
        raise ValueError(f"preset {path} has no [teacher], expected a table of its config.json's fields")
    # TOML has no null, and what a config.json sets to null must not become Transformers' default.
    teacher = {key: None if value == "null" else value for key, value in teacher.items()}
    return Preset(path.stem, teacher, _chat_format(path, tables["chat"]) if "chat" in tables else None)


def _chat_format(path: Path, chat: Any) -> ChatFormat:
    if not isinstance(chat, dict) or not chat.keys() <= set(CHAT_KEYS):
        came = repr(chat) if not isinstance(chat, dict) else f"the key {min(chat.keys() - set(CHAT_KEYS))!r}"
        raise ValueError(f"preset {path} has {came} as [chat], expected a table of {', '.join(CHAT_KEYS)}")

    def checked(key: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"preset {path} has {key} = {chat.get(key)!r} in [chat], expected {expected}")

    name, reasoning, stop = chat.get("template"), chat.get("reasoning", False), chat.get("stop", [])
    ends = chat.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    # A path would lead out of the folder.
    plain = isinstance(name, str) and Path(name).name == name
    checked("template", plain, f"the name of a file in {CHAT_FOLDER}/")
    checked("reasoning", isinstance(reasoning, bool), "true or false")
    checked("stop", isinstance(stop, list) and all(isinstance(t, str) and t for t in stop), "a list of texts")
    checked("eos_token_id", bool(ends) and all(type(id_) is int for id_ in ends), "a token id or some")
    template = _template(path, path.parent / CHAT_FOLDER / str(name))
    return ChatFormat(template, THINKING_OFF + template if reasoning else None, tuple(stop), tuple(ends))


def _template(path: Path, file: Path) -> str:
    """The text of a preset's template, tried on one message."""
    try:
        text = file.read_text(encoding="utf-8")
        message = {"role": "user", "content": "text"}
        render_jinja_template([[message]], chat_template=text, add_generation_prompt=True)
    except OSError as error:
        raise ValueError(f"preset {path} has template {file} in [chat]: {error.strerror}") from error
    except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"preset {path} has a broken template {file} in [chat]: {reason}") from error
    return text
