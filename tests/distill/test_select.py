"""Selections against the formula and against brute force, and what they leave behind."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hrwkv.data.documents import read_documents
from hrwkv.data.packing import PackedStream
from hrwkv.data.tokens import tokenize_documents
from hrwkv.distill.select import (
    TEXT,
    SelectProgress,
    counted_tasks,
    ledger_path,
    read_probes,
    recall_scores,
    select,
)
from hrwkv.distill.selection import Selection
from hrwkv.distill.sweep import MixedModel, Score, Sweep
from hrwkv.model.checkpoint import load_config, load_model, save_model
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import SelectSettings

LAYERS = 4
SMALL = {
    "tokens": 400,
    "context_length": 100,
    "batch_tokens": 200,
    "recall_lengths": (150, 170),
    "recall_samples": 1,
    "min_recall": 0.0,
}


@pytest.fixture
def settings(directories: tuple[Path, Path, Path]) -> SelectSettings:
    return SelectSettings(keep=2, sources=(str(directories[2]),), **SMALL)


def quiet(progress: SelectProgress) -> None:
    """No one looks."""


def choose(pair: tuple[Path, Path], out: Path, settings: SelectSettings, observer=quiet) -> Selection:
    return select(*pair, out, settings, device="cpu", observer=observer)


def scores(nll: float, *recalls: float) -> dict[str, Score]:
    """Scores with this nll of text, and tasks a, b, ... with these recalls."""
    tasks = {task: Score(-math.log(value), 0.0, 0.0) for task, value in zip("abc", recalls, strict=False)}
    return {TEXT: Score(nll, 0.0, 0.0), **tasks}


def test_score_is_recalls_drop_over_abilitys_drop() -> None:
    found = {
        None: scores(1.0, 1.0, 0.5, 0.1),
        1: scores(1.5, 0.25, 0.5, 0.9),
        2: scores(1.0, 1.0, 0.5, 0.1),
        3: scores(1.25, 0.75, 0.25, 0.1),
    }
    expected = {1: 0.375 / 0.75, 2: 0.0, 3: 0.25 / 0.5}
    assert recall_scores(found, tasks=("a", "b"), epsilon=0.25) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 0.5)), min_size=1, max_size=6))
def test_scores_do_not_depend_on_the_level_of_either(drops: list[tuple[float, float]]) -> None:
    """A teacher that is worse at everything by the same leaves the order and the scores alone."""
    near = {None: scores(0.0, 1.0), **{i + 1: scores(x, 1.0 - y) for i, (x, y) in enumerate(drops)}}
    far = {None: scores(2.0, 0.75), **{i + 1: scores(2 + x, 0.75 - y) for i, (x, y) in enumerate(drops)}}
    found = recall_scores(near, tasks="a", epsilon=0.01)
    assert recall_scores(far, tasks="a", epsilon=0.01) == pytest.approx(found, rel=1e-6, abs=1e-9)
    assert min(found.values()) >= 0


def test_tasks_that_the_teacher_fails_do_not_count() -> None:
    """On a small teacher, two tasks that it guesses at once outweighed the one that it solves."""
    teacher = scores(1.0, 0.99, 0.1, 0.5)
    assert counted_tasks(teacher, min_recall=0.5) == ("a", "c")
    with pytest.raises(ValueError, match=r"best: 0\.99 in a, expected 1\): use --method greedy"):
        counted_tasks(teacher, min_recall=1.0)


def test_recall_takes_the_layers_of_the_largest_scores(aligned, settings, tmp_path) -> None:
    found = choose(aligned, tmp_path / "out", settings)
    sweep = Sweep(
        MixedModel(*aligned, dtype=torch.float32, device="cpu"),
        read_probes(aligned[1], settings),
        device="cpu",
    )
    walked = dict(sweep.walk([False] * LAYERS, [1, 2, 3]))
    measured = recall_scores(walked, tasks=found.tasks, epsilon=settings.epsilon)
    assert {row.layer: row.score for row in found.rows} == pytest.approx(measured)
    assert found.layers == tuple(sorted(sorted(measured, key=lambda layer: -measured[layer])[:2]))
    assert found.tasks == ("passkey", "lookup", "associative")
    assert set(found.base) == {TEXT, *found.tasks}
    assert found.base[TEXT].kl == pytest.approx(0.0, abs=1e-6)


def test_greedy_adds_the_layer_of_least_kl_each_time(aligned, settings, tmp_path) -> None:
    found = choose(aligned, tmp_path / "out", replace(settings, method="greedy"))
    sweep = Sweep(
        MixedModel(*aligned, dtype=torch.float32, device="cpu"),
        read_probes(aligned[1], settings),
        device="cpu",
    )

    def kl(attention: list[int]) -> float:
        ((_, own),) = sweep.walk([layer not in attention for layer in range(LAYERS)], [])
        return own[TEXT].kl

    first = min([1, 2, 3], key=lambda layer: kl([layer]))
    second = min({1, 2, 3} - {first}, key=lambda layer: kl([first, layer]))
    assert found.layers == tuple(sorted([first, second]))
    gains = {row.layer: row.score for row in found.rows}
    assert gains[first] == pytest.approx(kl([]) - kl([first]), rel=1e-4)
    assert gains[second] == pytest.approx(kl([first]) - kl([first, second]), rel=1e-4)
    assert found.base[TEXT].kl == pytest.approx(kl([]), rel=1e-5)


def test_weighted_text_and_chats_are_read_as_training_reads_them(aligned, settings, tmp_path) -> None:
    """A selection's ``source=weight`` named no file, and chat messages were no text."""
    sources = []
    for name, word in (("a", "alpha "), ("b", "beta ")):
        chats = [{"messages": [{"role": "user", "content": f"{number} {word * 9}"}]} for number in range(900)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        sources.append(str(path))
    _, teacher = aligned
    chatty = tmp_path / "teacher"
    shutil.copytree(teacher, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(chatty)
    weighted = (f"{sources[0]}=3", f"{sources[1]}=1")
    probes = read_probes(chatty, replace(settings, sources=weighted, batch_tokens=400, tokens=800))
    rows = torch.cat([probe.token_ids for probe in probes if probe.task == TEXT]).reshape(-1, 100)
    assert sorted("beta" in tokenizer.decode(row) for row in rows) == [False] * 6 + [True] * 2
    assert all("alpha" in tokenizer.decode(row) or "beta" in tokenizer.decode(row) for row in rows)


def test_text_without_weights_is_one_stream(aligned, settings) -> None:
    """Rows, documents and their number as ever, so that earlier scores stay comparable."""
    _, teacher = aligned
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    store = tokenize_documents(read_documents(settings.sources, split="dev"), tokenizer)
    stream = PackedStream(store, context_length=100, batch_tokens=200, seed=settings.seed)
    found = [probe for probe in read_probes(teacher, settings) if probe.task == TEXT]
    assert len(found) == max(min(400, len(store.tokens)) // 200, 1)
    for index, probe in enumerate(found):
        token_ids, batch = stream.batch(index)
        assert torch.equal(probe.token_ids, token_ids)
        assert probe.batch.lengths == batch.lengths


@pytest.mark.parametrize(
    ("changes", "layers"),
    [({"method": "even"}, (2, 3)), ({"keep": None, "layers": (3, 1)}, (1, 3))],
    ids=["even", "given"],
)
def test_the_rest_needs_no_model(changes, layers, aligned, settings, tmp_path) -> None:
    found = choose(aligned, tmp_path / "out", replace(settings, sources=("no such file",), **changes))
    assert (found.layers, found.rows, found.base) == (layers, (), None)
    assert load_config(tmp_path / "out").full_layers == list(layers)
    assert not (tmp_path / "out" / "selection.png").exists()


def test_output_has_attention_of_the_teacher_and_mixers_of_stage_1(aligned, settings, tmp_path) -> None:
    found = choose(aligned, tmp_path / "out", settings)
    made, config = load_model(tmp_path / "out").state_dict(), load_config(tmp_path / "out")
    assert config.full_layers == list(found.layers)
    assert not config.attention_rope
    student, teacher = (load_model(path).state_dict() for path in aligned)
    for name, tensor in made.items():
        layer = int(name.split(".")[2]) if ".self_attn." in name else None
        source = teacher if layer in found.layers else student
        assert torch.equal(tensor, source[name]), name
    record = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert record["layers"] == list(found.layers)
    assert [row["layer"] for row in record["rows"]] == [1, 2, 3]
    assert (record["student"], record["teacher"]) == ("student", "teacher")
    assert (tmp_path / "out" / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not ledger_path(tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["recall", "greedy"])
def test_interrupted_selection_goes_on_where_it_was(method, aligned, settings, tmp_path) -> None:
    settings = replace(settings, method=method)
    ticks: list[SelectProgress] = []

    def stop_at_the_second(progress: SelectProgress) -> None:
        ticks.append(progress)
        if len(ticks) == 2:
            raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        choose(aligned, tmp_path / "out", settings, stop_at_the_second)
    assert not (tmp_path / "out").exists()
    rest: list[SelectProgress] = []
    # Where the models run and how much is kept changes no score.
    resumed = choose(aligned, tmp_path / "out", replace(settings, device="cpu"), rest.append)
    whole: list[SelectProgress] = []
    assert resumed == choose(aligned, tmp_path / "again", settings, whole.append)
    assert [progress.layer for progress in ticks + rest] == [progress.layer for progress in whole]
    assert [progress.done for progress in ticks + rest] == [progress.done for progress in whole]
    assert whole[-1].done <= whole[-1].total
    assert method == "greedy" or whole[-1].done == whole[-1].total


def test_scores_of_another_selection_are_not_taken(aligned, settings, tmp_path) -> None:
    def stop(progress: SelectProgress) -> None:
        raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        choose(aligned, tmp_path / "out", settings, stop)
    with pytest.raises(ValueError, match=r"\.out\.select\.json holds scores of another selection"):
        choose(aligned, tmp_path / "out", replace(settings, seed=1))
    assert ledger_path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 4}, "keep is 4, expected 1 to 3 of the 4 layers"),
        ({"keep": None, "layers": (4,)}, "layers names 4, expected 1 to 3"),
        ({"recall_lengths": (9,)}, "too short"),
        ({"min_recall": 0.9}, "the teacher recalls too little to choose layers by it"),
    ],
    ids=["too-many", "outside", "short", "unable"],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(
    changes, message, aligned, settings, tmp_path
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(aligned, tmp_path / "out", replace(settings, **changes))
    assert list(tmp_path.iterdir()) == []


def test_existing_output_and_hybrids_are_refused(aligned, directories, settings, tmp_path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        choose(aligned, tmp_path, settings)
    with pytest.raises(ValueError, match=r"attention in layer 2, expected RWKV everywhere: convert with"):
        choose(directories[:2], tmp_path / "out", settings)


def test_stage_1_in_fp32_fits_a_teacher_in_bf16(aligned, settings, tmp_path) -> None:
    """The kept attention is written in the student's dtype, exactly."""
    teacher: HybridModel = load_model(aligned[1], dtype=torch.bfloat16)
    save_model(teacher, tmp_path / "teacher", companions=aligned[1])
    found = replace(settings, keep=None, layers=(2,))
    choose((aligned[0], tmp_path / "teacher"), tmp_path / "out", found)
    made = load_model(tmp_path / "out").get_parameter("model.layers.2.self_attn.q_proj.weight")
    assert torch.equal(made, teacher.get_parameter("model.layers.2.self_attn.q_proj.weight").float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": None}, "neither of keep and layers given"),
        ({"layers": (1,)}, "both of keep and layers given"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": None, "layers": (0, 2)}, "layer 0 stays RWKV"),
        ({"keep": None, "layers": (2, 2)}, "different layers"),
        ({"keep": None, "layers": ()}, "different layers"),
        ({"method": "best"}, "recall, greedy or even"),
        ({"sources": ()}, "at least one text source"),
        ({"batch_tokens": 150}, "multiple of context_length"),
        ({"tokens": 1}, "tokens is 1"),
        ({"recall_lengths": ()}, "recall_lengths"),
        ({"recall_samples": 0}, "recall_samples"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"min_recall": 1.5}, "min_recall is 1.5"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_settings_are_checked_whole(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        SelectSettings(**{"keep": 2, **SMALL, **changes})
