"""Recipes: TOML files with a table per command, under the flags of the command line.

A recipe holds ``[convert]``, ``[distill]``, ``[eval]`` and ``[demo]``, so one file tells the whole way from a
teacher to a student; a command reads its own table, ``demo`` reads all of them. A flag wins over the recipe,
the recipe over the built-in value, one by one: ``--stage2.tokens`` alone leaves the rest of stage 2 as it
was. A recipe for one published teacher is its preset too: what ``[teacher]`` and ``[chat]`` hold is read by
``hrwkv.convert.presets``, not here.
"""

from __future__ import annotations

import copy
import dataclasses
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict
from cyclopts.field_info import FieldInfo

from hrwkv.settings import DistillSettings

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TABLES = ("convert", "distill", "eval", "demo")
PRESET_TABLES = ("teacher", "chat")
DEMO_RECIPE = "tiny-demo"
# Flags that may be written as one comma-separated word: 8,15,22.
COMMA_LISTS = ("attention-layers", "passkey-lengths", "passkey-depths", "batch-sizes", "prompt-lengths")
# Either of these chooses the layers, so a flag for one takes the other out of the recipe.
LAYER_CHOICES = ("attention_layers", "keep_attention")


def apply_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill a command's arguments from its recipe, and split comma lists; called by cyclopts after parsing.

    Raises ValueError for a recipe that cannot be read, CycloptsError (with the nearest name) for an unknown
    key.
    """
    command = commands[0] if commands else ""
    _split_comma_lists(arguments)
    if command not in TABLES:
        return
    name = _given(arguments, "--recipe")
    values = recipe_values(command, name)
    _drop_other_layer_choice(arguments, values if command == "convert" else values.get("convert", {}))
    # Under the command's key: at the top, cyclopts would leave out tables that are named like commands.
    nested: dict[str, Any] = values
    for key in reversed(commands):
        nested = {key: nested}
    Dict(nested, source=f"recipe {name or DEMO_RECIPE}")(app, commands, arguments)


def recipe_values(command: str, name: str | None) -> dict[str, Any]:
    """What a command's recipe says, on top of the defaults of nested settings; ``demo`` always has one."""
    if name is None and command == "demo":
        name = DEMO_RECIPE
    values = {} if name is None else read_recipe(find_recipe(name))
    if command == "demo":
        return merged({"distill": nested_defaults(DistillSettings)}, values)
    own: dict[str, Any] = values.get(command, {})
    return merged(nested_defaults(DistillSettings), own) if command == "distill" else own


def find_recipe(name: str) -> Path:
    """A file, or the name of one of the recipes that the repository ships. Raises ValueError if neither."""
    path, shipped = Path(name), RECIPES / f"{name}.toml"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml"))) or "none here"
    raise ValueError(f"recipe {name!r} is no file: give a TOML file, or the name of a shipped one ({known})")


def read_recipe(path: Path) -> dict[str, Any]:
    """The commands' tables of a recipe. Raises ValueError if it is no TOML or has something else at the top.

    The tables of a preset are only known by name here.
    """
    known = (*TABLES, *PRESET_TABLES)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from error
    for key, value in values.items():
        if key not in known or not isinstance(value, dict):
            near = get_close_matches(key, known, n=1)
            hint = (
                f"did you mean [{near[0]}]?" if near and key not in known else "put the key into one of them"
            )
            expected = ", ".join(f"[{name}]" for name in known)
            raise ValueError(f"recipe {path} has {key!r} at the top, expected the tables {expected}: {hint}")
    return {key: value for key, value in values.items() if key in TABLES}


def nested_defaults(settings: type[Any]) -> dict[str, Any]:
    """Default values of the fields that are dataclasses themselves.

    A parser that builds such a field from one given key would take the class's defaults for the others.
    """
    found = {}
    for field in dataclasses.fields(settings):
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            found[field.name] = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    return found


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``, table by table."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def _given(arguments: ArgumentCollection, name: str) -> str | None:
    """The value that the command line gives for a flag, as it was typed."""
    for argument in arguments:
        if name in argument.names and argument.tokens:
            return argument.tokens[-1].value
    return None


def _split_comma_lists(arguments: ArgumentCollection) -> None:
    for argument in arguments:
        if argument.name.removeprefix("--").split(".")[-1] in COMMA_LISTS:
            tokens = [
                token.evolve(value=value, index=index)
                for token in argument.tokens
                for index, value in enumerate(token.value.split(","))
            ]
            argument.tokens[:] = [token.evolve(index=index) for index, token in enumerate(tokens)]


def _drop_other_layer_choice(arguments: ArgumentCollection, values: dict[str, Any]) -> None:
    for name in LAYER_CHOICES:
        flag = "--" + name.replace("_", "-")
        if _given(arguments, flag) is not None or _given(arguments, f"--convert.{flag[2:]}") is not None:
            for other in LAYER_CHOICES:
                values.pop(other, None)


class Command(App):
    """One command, whose help shows the defaults that it really has.

    cyclopts shows those of a nested class; here each stage has its own, and the demo's stand in its recipe.
    """

    def assemble_argument_collection(
        self, *, default_parameter: Parameter | None = None, parse_docstring: bool = False
    ) -> ArgumentCollection:
        """The arguments; for the help (``parse_docstring``) with those defaults."""
        arguments = super().assemble_argument_collection(
            default_parameter=default_parameter, parse_docstring=parse_docstring
        )
        if parse_docstring and self.name[0] in ("distill", "demo"):
            values = recipe_values(self.name[0], None)
            for argument in arguments:
                path = argument.name.removeprefix("--").replace("-", "_").split(".")
                if (value := _look_up(values, path)) is not None:
                    argument.field_info = _with_default(argument.field_info, value)
        return arguments


def _with_default(info: FieldInfo, default: Any) -> FieldInfo:
    """A copy with another default: the original is shared by the three stages."""
    changed = copy.copy(info)
    changed.default = default
    return changed


def _look_up(values: dict[str, Any], path: list[str]) -> Any:
    """The leaf at ``path``, or None."""
    found: Any = values
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return None if isinstance(found, dict) else found
