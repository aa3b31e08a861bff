import math
import tomllib
from pathlib import Path

import pytest

from hrwkv.convert.presets import Preset, matching, presets_of, read_preset
from hrwkv.convert.transfer import choose_layers
from hrwkv.model.checkpoint import expected_shapes
from hrwkv.model.config import FULL
from hrwkv.model.families import config_from_teacher
from hrwkv.settings import ConvertSettings

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = {preset.name: preset for preset in presets_of(RECIPES)}

# Published parameters in billions, head size, query heads per key/value head, RoPE's base, epsilon.
FACTS: dict[str, tuple[float, int, int, float, float]] = {
    "reka-flash-3": (20.91, 96, 8, 8e6, 1e-5),
    "reka-flash-3.1": (20.91, 96, 8, 8e6, 1e-5),
    "qwen3-0.6b": (0.60, 128, 2, 1e6, 1e-6),
    "qwen3-1.7b": (1.72, 128, 2, 1e6, 1e-6),
    "qwen3-4b": (4.02, 128, 4, 1e6, 1e-6),
    "qwen3-8b": (8.19, 128, 4, 1e6, 1e-6),
    "qwen3-14b": (14.77, 128, 5, 1e6, 1e-6),
    "qwen3-32b": (32.76, 128, 8, 1e6, 1e-6),
    "qwen2.5-7b": (7.62, 128, 7, 1e6, 1e-6),
    "qwen2.5-32b": (32.76, 128, 5, 1e6, 1e-6),
    "qwen2.5-72b": (72.71, 128, 8, 1e6, 1e-6),
    "llama-3.1-8b": (8.03, 128, 4, 5e5, 1e-5),
    "llama-3.1-70b": (70.55, 128, 8, 5e5, 1e-5),
    "llama-3.2-1b": (1.24, 64, 4, 5e5, 1e-5),
    "llama-3.2-3b": (3.21, 128, 3, 5e5, 1e-5),
    "llama-3.3-70b": (70.55, 128, 8, 5e5, 1e-5),
    "mistral-small-3": (23.57, 128, 4, 1e8, 1e-5),
}
PUBLISHED_LAYERS = {
    "reka-flash-3": [8, 15, 22, 29, 36, 43],
    "reka-flash-3.1": [8, 15, 22, 29, 36, 43],
    "qwen3-0.6b": [12, 16, 21, 24, 25],
    "qwen3-1.7b": [17, 19, 21, 23, 25, 27],
    "qwen3-4b": [15, 20, 24, 29, 33, 34],
    "qwen3-8b": [15, 20, 26, 29, 33, 34],
    "qwen3-14b": [7, 14, 21, 28, 35, 39],
    "qwen3-32b": [5, 11, 17, 23, 28, 33, 38, 43, 48, 53, 58, 63],
    "qwen2.5-7b": [5, 14, 16, 17, 22, 23, 26],
    "llama-3.2-3b": [2, 5, 8, 12, 13, 14, 15],
}
PLAIN = "[teacher]\nmodel_type = 'llama'\n"


def chat_preset(folder: Path, chat: str, template: str = "{{ messages[0].content }}") -> Path:
    """A preset file whose chat template lies beside it."""
    (folder / "chat").mkdir()
    (folder / "chat" / "t.jinja").write_text(template)
    path = folder / "mine.toml"
    path.write_text(f"{PLAIN}[chat]\n{chat}\n")
    return path


def test_every_teacher_is_shipped_and_sorted() -> None:
    assert list(SHIPPED) == sorted(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_teacher_has_its_published_size_and_constants(name: str) -> None:
    billions, head_dim, group, theta, epsilon = FACTS[name]
    config = config_from_teacher(SHIPPED[name].teacher)
    count = sum(math.prod(shape) for shape in expected_shapes(config).values())
    assert round(count / 1e9, 2) == billions
    assert (config.head_dim, config.num_attention_heads // config.num_key_value_heads) == (head_dim, group)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (theta, epsilon)
    assert set(config.layer_types) == {FULL}


@pytest.mark.parametrize("name", FACTS)
def test_nothing_in_a_teacher_is_misspelt(name: str) -> None:
    """An unknown key would be ignored by Transformers, and its default taken."""
    teacher = SHIPPED[name].teacher
    known = config_from_teacher(teacher).to_dict()
    carried = {key: value for key, value in teacher.items() if key not in ("model_type", "sliding_window")}
    assert {key: known[key] for key in carried} == carried


@pytest.mark.parametrize("name", FACTS)
def test_attention_layers_are_the_published_ones_and_never_layer_0(name: str) -> None:
    table = tomllib.loads((RECIPES / f"{name}.toml").read_text())["convert"]
    assert table.get("attention_layers") == PUBLISHED_LAYERS.get(name)
    total = SHIPPED[name].teacher["num_hidden_layers"]
    layers = choose_layers(ConvertSettings(**table), total)
    assert 0 not in layers
    assert total // 8 <= len(layers) <= total // 4


@pytest.mark.parametrize("name", FACTS)
def test_chat_ends_where_the_teacher_ends(name: str) -> None:
    chat, teacher = SHIPPED[name].chat, SHIPPED[name].teacher
    assert chat is not None
    own = teacher["eos_token_id"]
    assert set(own if isinstance(own, list) else [own]) <= set(chat.eos_token_id)
    assert all(0 <= end < teacher["vocab_size"] for end in chat.eos_token_id)
    assert ("<sep>" in chat.stop) == name.startswith("reka")


def test_reka_stops_on_its_separator_and_on_100257() -> None:
    for name in ("reka-flash-3", "reka-flash-3.1"):
        chat = SHIPPED[name].chat
        assert chat is not None
        assert (chat.stop, chat.eos_token_id) == ((" <sep>", "<sep>"), (100257,))


def test_sizes_find_their_teachers() -> None:
    def names(**sizes: int) -> list[str]:
        return [preset.name for preset in matching(SHIPPED.values(), sizes)]

    reka = {"vocab_size": 100352, "hidden_size": 6144, "intermediate_size": 19648, "num_hidden_layers": 44}
    assert names(**reka) == ["reka-flash-3", "reka-flash-3.1"]
    assert names(**{**reka, "num_hidden_layers": 43}) == []
    assert names(hidden_size=4096, intermediate_size=12288) == ["qwen3-8b"]
    assert names() == list(SHIPPED)


def test_a_folder_gives_its_presets_and_passes_over_plain_recipes(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(PLAIN)
    (tmp_path / "a.toml").write_text("[convert]\nkeep_attention = 1\n")
    (tmp_path / "a-b.toml").write_text(PLAIN)
    (tmp_path / "note.txt").write_text("no preset")
    assert presets_of(tmp_path) == [Preset(name, {"model_type": "llama"}, None) for name in ("a-b", "b")]


def test_null_is_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[teacher]\nmodel_type = 'mistral'\nsliding_window = 'null'\n")
    assert read_preset(path).teacher == {"model_type": "mistral", "sliding_window": None}


def test_chat_format_is_read_with_its_template(tmp_path: Path) -> None:
    path = chat_preset(tmp_path, "template = 't.jinja'\nstop = ['<sep>', '##']\neos_token_id = [7, 5]")
    chat = read_preset(path).chat
    assert chat is not None
    assert (chat.template, chat.no_reasoning_template) == ("{{ messages[0].content }}", None)
    assert (chat.stop, chat.eos_token_id) == (("<sep>", "##"), (7, 5))


GOOD = "template = 't.jinja'\neos_token_id = 1"
BAD_CHAT: dict[str, tuple[str, str]] = {
    "unknown-key": (f"{GOOD}\nstops = ['x']", r"the key 'stops' as \[chat\], expected a table of template"),
    "no-template": ("eos_token_id = 1", r"template = None in \[chat\], expected the name of a file in chat/"),
    "template-elsewhere": ("template = '../t.jinja'", r"template = '../t.jinja' in \[chat\], expected"),
    "template-missing": ("template = 'u.jinja'\neos_token_id = 1", r"u.jinja in \[chat\]: No such file"),
    "reasoning": (f"{GOOD}\nreasoning = 1", r"reasoning = 1 in \[chat\], expected true or false"),
    "stop-no-list": (f"{GOOD}\nstop = 'x'", r"stop = 'x' in \[chat\], expected a list of texts"),
    "stop-empty": (f"{GOOD}\nstop = ['']", r"stop = \[''\] in \[chat\], expected a list of texts"),
    "no-end": ("template = 't.jinja'", r"eos_token_id = None in \[chat\], expected a token id or some"),
    "end-no-id": ("template = 't.jinja'\neos_token_id = [true]", r"eos_token_id = \[True\] in \[chat\]"),
    "no-ends": ("template = 't.jinja'\neos_token_id = []", r"eos_token_id = \[\] in \[chat\]"),
}


@pytest.mark.parametrize("case", BAD_CHAT)
def test_bad_chat_format_names_file_and_key(case: str, tmp_path: Path) -> None:
    chat, message = BAD_CHAT[case]
    with pytest.raises(ValueError, match=rf"mine\.toml.*{message}"):
        read_preset(chat_preset(tmp_path, chat))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[convert]\nkeep_attention = 1\n", r"has no \[teacher\], expected a table"),
        ("teacher = 'llama'\n", r"has no \[teacher\], expected a table"),
        (f"chat = 1\n{PLAIN}", r"has 1 as \[chat\], expected a table of template"),
        ("x = = 1\n", "is not TOML"),
    ],
    ids=["recipe", "no-table", "chat-no-table", "no-toml"],
)
def test_a_file_that_is_no_preset_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.toml {message}"):
        read_preset(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml cannot be read: No such file"):
        read_preset(tmp_path / "none.toml")


ESCAPES = {
    "class": "{{ ''.__class__.__name__ }}",
    "mro": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['jinja2'] }}",
    "filter": "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "huge": "{% for i in range(1000000000) %}{% endfor %}",
}


@pytest.mark.parametrize("case", ESCAPES)
def test_a_template_that_leaves_the_sandbox_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.toml has a broken template .*: .*(unsafe|[Ss]andbox)"):
        read_preset(chat_preset(tmp_path, GOOD, ESCAPES[case]))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ 'text' + 1 }}", "str"),
        ("{{ raise_exception('only\nsystem') }}", "only system$"),
    ],
    ids=["syntax", "type", "refusal"],
)
def test_a_broken_template_is_named_in_one_line(template: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"mine\.toml has a broken template .*t\.jinja in .*: .*{reason}"):
        read_preset(chat_preset(tmp_path, GOOD, template))
