"""The model card says what the run's own files say."""

import json
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from jinja2 import UndefinedError

from hrwkv.distill.report import licence_of, render_card, stage_facts, write_card
from hrwkv.distill.trainer import distill
from tests.distill.test_trainer import Directories, ignore, recipe


@pytest.fixture(scope="module")
def finished(directories: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    student, teacher, text = directories
    out = tmp_path_factory.mktemp("report") / "my-run"
    distill(student, teacher, out, recipe(text), stages=(1, 2), resume=False, observer=ignore)
    write_card(out, out / "stage2", teacher=teacher, base_model="org/teacher: 1")
    return out


def cells(card: str, stage: int) -> list[str]:
    line = next(line for line in card.splitlines() if line.startswith(f"| {stage} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_is_the_log(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    for stage in (1, 2):
        last = [row for row in log if row["stage"] == stage][-1]
        found = last["validation"]
        got = cells(card, stage)
        assert got[1] == f"{last['tokens']:,}"
        assert got[4:8] == [
            f"{found['kl']:.4f}",
            f"{found['agreement']:.1%}",
            f"{found['student_perplexity']:.3f}",
            f"{found['teacher_perplexity']:.3f}",
        ]
        assert got[8:] == ["-", "-"]  # 16 tokens of context hold no passkey
    recipe_text = card.split("```json\n")[1].split("```")[0]
    assert json.loads(recipe_text) == json.loads((finished / "recipe.json").read_text())


def test_front_matter_and_figures_stand_beside_the_weights(finished: Path) -> None:
    for folder in (finished, finished / "stage2"):
        facts = metadata_load(folder / "README.md")
        assert facts["base_model"] == "org/teacher: 1"
        assert facts["pipeline_tag"] == "text-generation"
        assert facts["library_name"] == "hrwkv"
        assert "hxa079" in facts["tags"]
        assert "license" not in facts
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "# my-run\n" in (finished / "README.md").read_text()
    assert "stays in: 2 (method: given)" in (finished / "README.md").read_text()


def test_the_licence_is_the_teachers(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("# No front matter\n")
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Teacher\n")
    assert licence_of(tmp_path) == "apache-2.0"


def test_hours_are_tokens_over_their_rates() -> None:
    rows = [
        {"stage": 2, "step": 1, "tokens": 100, "tokens_per_second": 10.0},
        {"stage": 2, "step": 2, "tokens": 200, "tokens_per_second": 50.0, "validation": {"kl": 0.5}},
    ]
    facts = stage_facts(rows)
    assert facts == {
        "stage": 2,
        "tokens": 200,
        "hours": pytest.approx(12 / 3600),
        "rate": pytest.approx(200 / 12),
        "kl": 0.5,
    }


def test_a_missing_fact_is_an_error_and_no_empty_place() -> None:
    with pytest.raises(UndefinedError, match="undefined"):
        render_card({"base_model": "x", "licence": None})


def test_a_folder_without_a_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no log\.jsonl"):
        write_card(tmp_path, tmp_path, teacher=tmp_path, base_model="x")


@pytest.mark.parametrize("front", ["license: [", "only words"])
def test_a_teachers_damaged_card_costs_the_licence_alone(front: str, tmp_path: Path) -> None:
    """It ended a finished run with a traceback, and every resume of it."""
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Teacher\n")
    assert licence_of(tmp_path) is None


def test_the_card_names_the_text(finished: Path) -> None:
    (source,) = json.loads((finished / "recipe.json").read_text())["2"]["data.sources"]
    assert f"tokens of text ({source}) in" in (finished / "README.md").read_text()


def test_rows_that_are_missing_are_told(finished: Path) -> None:
    """A log without its last rows ended a finished run in a StopIteration."""
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    cut = [row for row in log if row["stage"] == 1 and "validation" not in row]
    with pytest.raises(ValueError, match=r"log.jsonl has no validation of stage 1"):
        stage_facts(cut)
