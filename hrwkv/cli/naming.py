"""Messages of settings name their fields; on the command line those are flags, in a recipe they are keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

# A name of several words, unless it is a part of a path, of a quotation or of a flag.
NAME = re.compile(r"(?<![\w./'\"=-])[a-z][a-z0-9]*(?:[._][a-z0-9]+)+(?![\w/'\"=]|[.-]\w)")
# A name of one word is like any word, so it is one at the beginning only: "port is 70000".
FIRST = re.compile(r"^[a-z0-9]+(?= is )")


def as_flags(message: str, *, flags: Collection[str], words: Sequence[str]) -> str:
    """The message with names of settings as ``flags`` of the command: max_sequences -> --max-sequences.

    words: as after ``hrwkv``. Where a recipe is used, only what was typed: the rest may be the recipe's.
    """
    typed = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = typed if "--recipe" in typed or words[:1] == ["demo"] else flags
    known = [flag for flag in known if not flag.startswith("--no-")]  # no field's name

    def spell(name: re.Match[str]) -> str:
        if name[0] in words:  # a file of that name
            return name[0]
        fitting = [flag for flag in known if _is_of(flag, name[0])]
        # Of the three stages' flags, the one that was typed.
        found = fitting if len(fitting) == 1 else [flag for flag in dict.fromkeys(typed) if flag in fitting]
        return found[0] if len(found) == 1 else name[0]

    return NAME.sub(spell, FIRST.sub(spell, message))


def _is_of(flag: str, name: str) -> bool:
    """True if the flag sets the field; ``stage.tokens`` stands for those of any stage."""
    *tables, field = flag.removeprefix("--").split(".")
    *places, own = name.replace("_", "-").split(".")
    return field == own and (not places or [table.rstrip("123") for table in tables[-1:]] == places)
