"""Passkeys in a validation: found exactly when greedy generation would find them, shared by processes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hrwkv.data.recall import RecallSample
from hrwkv.distill.corpus import read_corpus
from hrwkv.distill.parallel import Ranks
from hrwkv.distill.stages import StepOptions
from hrwkv.distill.validation import Validator, passkey_samples
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import DistillSettings
from tests.distill.conftest import Pair
from tests.distill.test_stages import ALONE, step_input

PROMPT = [5, 9, 77, 31, 200, 18]


@torch.no_grad()
def greedily(model: HybridModel, count: int) -> RecallSample:
    """A sample whose answer is what the model says after the prompt."""
    ids = list(PROMPT)
    for _ in range(count):
        hidden = model(torch.tensor(ids), TokenBatch.from_lengths([len(ids)]))
        ids.append(int(model.compute_logits(hidden[-1]).argmax()))
    return RecallSample(ids, list(range(len(PROMPT), len(ids))))


def test_an_answer_counts_when_every_token_of_it_is_the_likeliest(make_pair: Pair) -> None:
    teacher, student = make_pair()
    ours, theirs = greedily(student, 4), greedily(teacher, 4)
    wrong = replace(ours, token_ids=[*ours.token_ids[:-1], (ours.token_ids[-1] + 1) % 256])
    assert ours != theirs
    found = Validator(teacher, StepOptions(ALONE), [[step_input()]], [ours, wrong, theirs, theirs]).measure(
        student
    )
    assert (found.passkey, found.teacher_passkey) == (0.25, 0.5)
    assert student.training
    without = Validator(teacher, StepOptions(ALONE), [[step_input()]], []).measure(student)
    assert without == replace(found, passkey=None, teacher_passkey=None)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_prompts(
    directories: tuple[Path, Path, Path], tokenizer: PreTrainedTokenizerFast, world: int
) -> None:
    _, teacher, text = directories
    settings = DistillSettings()
    settings = replace(settings, data=replace(settings.data, sources=(str(text),)), validation_passkeys=6)
    corpus = read_corpus(teacher, settings.data)
    cpu = torch.device("cpu")
    parts = [
        passkey_samples(tokenizer, corpus, settings, stage=1, ranks=Ranks(rank, world, cpu))
        for rank in range(world)
    ]
    alone = passkey_samples(tokenizer, corpus, settings, stage=1, ranks=Ranks(0, 1, cpu))
    assert sorted(s.token_ids for part in parts for s in part) == sorted(s.token_ids for s in alone)
    assert {len(sample.token_ids) for sample in alone} == {settings.data.context_length}
    short = replace(settings, data=replace(settings.data, context_length=64, batch_tokens=64))
    assert passkey_samples(tokenizer, corpus, short, stage=1, ranks=Ranks(0, 1, cpu)) == []
