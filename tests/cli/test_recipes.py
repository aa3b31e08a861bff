from pathlib import Path

import pytest

from hrwkv.cli import build_app
from hrwkv.cli.recipes import RECIPES, find_recipe, merged, read_recipe
from hrwkv.settings import ConvertSettings, DemoSettings, DistillSettings, EvalSettings, StageSettings

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.toml"))
# A teacher's preset is a recipe for convert; the others tell the whole way.
WHOLE = ["tiny-demo", "tiny-gpu"]
PRESETS = [name for name in SHIPPED if name not in WHOLE]


def parse(*words: str) -> dict[str, object]:
    """The values that a command would get."""
    _, bound, _ = build_app().parse_args(list(words), print_error=False, exit_on_error=False)
    bound.apply_defaults()
    return dict(bound.arguments)


def distill_settings(*words: str) -> DistillSettings:
    settings = parse("distill", "student", "--teacher", "teacher", *words)["settings"]
    assert isinstance(settings, DistillSettings)
    return settings


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[convert]\nattention_layers = [3, 5]\ndecay_rank = 8\n"
        "[distill]\nmode = 'frozen-mlp'\n[distill.data]\nsources = ['a', 'b']\n"
        "[distill.stage2]\ntokens = 1000\nbetas = [0.8, 0.9]\n"
        "[eval]\nsplit = 'dev'\n"
    )
    return str(path)


def test_without_recipe_each_stage_has_its_own_defaults() -> None:
    assert distill_settings() == DistillSettings()


def test_one_flag_leaves_the_rest_of_its_stage() -> None:
    """A nested class built from the flag alone would lose stage 2's learning rates."""
    found = distill_settings("--stage2.tokens", "1_000_001").stage2
    assert found == StageSettings(**{**vars(DistillSettings().stage2), "tokens": 1_000_001})


def test_flag_wins_over_recipe_and_recipe_over_default(recipe: str) -> None:
    found = distill_settings("--recipe", recipe, "--stage2.tokens", "2000", "--seed", "7")
    assert (found.mode, found.seed, found.data.sources) == ("frozen-mlp", 7, ("a", "b"))
    assert (found.stage2.tokens, found.stage2.betas) == (2000, (0.8, 0.9))
    assert found.stage2.learning_rate == DistillSettings().stage2.learning_rate
    assert found.stage1 == DistillSettings().stage1


def test_each_command_reads_its_own_table(recipe: str) -> None:
    settings = parse("convert", "teacher", "out", "--recipe", recipe)["settings"]
    assert settings == ConvertSettings(attention_layers=(3, 5), decay_rank=8)
    assert parse("eval", "model", "--recipe", recipe)["settings"] == EvalSettings(split="dev")


@pytest.mark.parametrize(
    ("flags", "layers", "keep"),
    [(("--attention-layers", "1,2"), (1, 2), None), (("--keep-attention", "4"), None, 4)],
    ids=["layers", "count"],
)
def test_flag_for_layers_replaces_the_recipes_choice(
    recipe: str, flags: tuple[str, ...], layers: tuple[int, ...] | None, keep: int | None
) -> None:
    settings = parse("convert", "teacher", "out", "--recipe", recipe, *flags)["settings"]
    assert settings == ConvertSettings(attention_layers=layers, keep_attention=keep, decay_rank=8)


def test_lists_may_be_written_with_commas_or_repeated() -> None:
    commas = parse("eval", "m", "--passkey-lengths", "1,2,3", "--passkey-depths", "0,.5")["settings"]
    repeated = parse(
        "eval", "m", *("--passkey-lengths", "1", "--passkey-lengths", "2", "--passkey-lengths", "3"),
        *("--passkey-depths", "0", "--passkey-depths", "0.5"),
    )["settings"]  # fmt: skip
    assert commas == repeated == EvalSettings(passkey_lengths=(1, 2, 3), passkey_depths=(0.0, 0.5))


@pytest.mark.parametrize("name", WHOLE)
def test_shipped_recipe_is_whole(name: str) -> None:
    found = parse("demo", "--recipe", name)
    assert isinstance(found["convert"], ConvertSettings)
    assert isinstance(found["distill"], DistillSettings)
    assert isinstance(found["demo"], DemoSettings)
    table = read_recipe(find_recipe(name))["distill"]
    assert found["distill"].stage1.tokens == table["stage1"]["tokens"]


@pytest.mark.parametrize("name", PRESETS)
def test_shipped_preset_is_a_recipe_for_convert(name: str) -> None:
    settings = parse("convert", "teacher", "out", "--recipe", name)["settings"]
    table = read_recipe(find_recipe(name))["convert"]
    layers = table.get("attention_layers")
    assert settings == ConvertSettings(
        attention_layers=layers and tuple(layers), keep_attention=table.get("keep_attention")
    )


def test_what_a_preset_says_of_its_teacher_reaches_no_command(tmp_path: Path) -> None:
    """``demo`` has a flag --teacher, and ``chat`` is a command: neither may take the table of its name."""
    path = tmp_path / "recipe.toml"
    plain = "[convert]\nkeep_attention = 1\n"
    path.write_text(f"{plain}[teacher]\nmodel_type = 'llama'\n[chat]\nsystem = 'no flag'\n")
    assert read_recipe(path) == {"convert": {"keep_attention": 1}}
    found = parse("demo", "--recipe", str(path))
    path.write_text(plain)
    assert found == parse("demo", "--recipe", str(path))
    assert parse("chat", "model")["system"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[teachers]\n", r"'teachers' at the top.*\[demo\], \[teacher\], \[chat\].*mean \[teacher\]\?"),
        ("chat = 'x'\n", r"'chat' at the top.*put the key into one of them"),
    ],
    ids=["nearly-a-name", "no-table"],
)
def test_preset_tables_are_known_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_demo_uses_its_recipe_without_being_told() -> None:
    assert "tiny-demo" in SHIPPED
    assert parse("demo") == {**parse("demo", "--recipe", "tiny-demo"), "recipe": None}


def test_merging_goes_table_by_table() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 2}
    assert merged(base, {"a": {"y": [3]}, "c": {"z": 4}}) == {"a": {"x": 1, "y": [3]}, "b": 2, "c": {"z": 4}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 2}
