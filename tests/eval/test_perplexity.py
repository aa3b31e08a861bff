import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrwkv.eval.perplexity import compare, next_tokens
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel

LENGTHS = ((37, 1, 70), (5, 130))
RANKS = {"decay_rank": 4, "iclr_rank": 4, "value_rank": 4, "key_rank": 4, "gate_rank": 4}


def random_model(layer_types: list[str], *, seed: int, vocabulary: int = 53) -> HybridModel:
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(layer_types),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=layer_types,
        **RANKS,
    )
    model = HybridModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_batches(vocabulary: int = 53) -> list[tuple[Tensor, TokenBatch]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(vocabulary, (sum(lengths),), generator=generator), TokenBatch.from_lengths(lengths))
        for lengths in LENGTHS
    ]


@torch.no_grad()
def dense_scores(student: HybridModel, teacher: HybridModel) -> dict[str, Tensor]:
    """Every sequence alone, all its logits at once, KL by torch's own function."""
    rows: dict[str, list[Tensor]] = {"context": [], "student": [], "teacher": [], "kl": [], "agreement": []}
    for token_ids, batch in random_batches():
        for sequence in token_ids.split(list(batch.lengths)):
            alone = TokenBatch.from_lengths([len(sequence)])
            s, t = (
                m.compute_logits(m(sequence, alone))[:-1].double().log_softmax(-1) for m in (student, teacher)
            )
            rows["context"].append(torch.arange(1, len(sequence)))
            rows["student"].append(F.nll_loss(s, sequence[1:], reduction="none"))
            rows["teacher"].append(F.nll_loss(t, sequence[1:], reduction="none"))
            rows["kl"].append(F.kl_div(s, t, reduction="none", log_target=True).sum(-1))
            rows["agreement"].append((s.argmax(-1) == t.argmax(-1)).double())
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.fixture(scope="module")
def models() -> tuple[HybridModel, HybridModel]:
    return random_model([LINEAR, FULL], seed=1), random_model([FULL, FULL], seed=2)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 17])
def test_compare_equals_dense_computation(
    models: tuple[HybridModel, HybridModel], chunk_tokens: int | None
) -> None:
    student, teacher = models
    dense = dense_scores(student, teacher)
    found = compare(student, teacher, random_batches(), chunk_tokens=chunk_tokens)
    assert found.overall.tokens == len(dense["kl"]) == sum(map(sum, LENGTHS)) - 5
    assert found.overall.student_nll == pytest.approx(dense["student"].mean().item(), rel=1e-5)
    assert found.overall.teacher_nll == pytest.approx(dense["teacher"].mean().item(), rel=1e-5)
    assert found.overall.kl == pytest.approx(dense["kl"].mean().item(), rel=1e-5)
    assert found.overall.agreement == dense["agreement"].mean().item()
    assert found.overall.ratio == pytest.approx(
        math.exp((dense["student"] - dense["teacher"]).mean()), rel=1e-4
    )
    for scores in found.by_position:
        inside = (dense["context"] >= scores.first) & (dense["context"] <= scores.last)
        assert scores.tokens == inside.sum()
        assert scores.kl == pytest.approx(dense["kl"][inside].mean().item(), rel=1e-5)
    assert [(scores.first, scores.last) for scores in found.by_position] == [
        (1, 15),
        (16, 31),
        (32, 63),
        (64, 127),
        (128, 255),
    ]


def test_identical_models_have_no_divergence_and_full_agreement(
    models: tuple[HybridModel, HybridModel],
) -> None:
    found = compare(models[0], models[0], random_batches())
    assert (found.overall.kl, found.overall.agreement, found.overall.ratio) == (0.0, 1.0, 1.0)
    assert found.of_teacher() == found


def test_without_teacher_only_perplexity_is_there(models: tuple[HybridModel, HybridModel]) -> None:
    found = compare(models[0], None, random_batches())
    with_teacher = compare(*models, random_batches())
    assert found.overall.student_nll == with_teacher.overall.student_nll
    assert (found.overall.teacher_nll, found.overall.kl, found.overall.agreement) == (None, None, None)
    with pytest.raises(ValueError, match="had no teacher"):
        found.of_teacher()


def test_bits_per_byte_is_total_bits_over_bytes(models: tuple[HybridModel, HybridModel]) -> None:
    found = compare(*models, random_batches(), num_bytes=1000)
    bits = found.overall.student_nll * found.overall.tokens / math.log(2)
    assert found.student_bits_per_byte == pytest.approx(bits / 1000, rel=1e-12)
    assert (
        found.of_teacher().student_bits_per_byte == found.teacher_bits_per_byte != found.student_bits_per_byte
    )


def test_bf16_weights_are_scored_with_an_fp32_head(models: tuple[HybridModel, HybridModel]) -> None:
    """With bf16 logits the agreement of nearby tokens and the KL have a floor of their own."""
    model = random_model([FULL], seed=3).bfloat16()
    token_ids, batch = random_batches()[0]
    with torch.no_grad():
        hidden = model(token_ids, batch)[next_tokens(token_ids, batch)[0]]
        logits = hidden.float() @ model.lm_head.weight.float().T
    wanted = F.cross_entropy(logits, next_tokens(token_ids, batch)[1])
    assert compare(model, None, [(token_ids, batch)]).overall.student_nll == pytest.approx(
        wanted.item(), rel=1e-6
    )


def test_next_tokens_stay_inside_their_sequence() -> None:
    batch = TokenBatch.from_lengths([3, 0, 1, 2])
    predicting, targets = next_tokens(torch.tensor([10, 11, 12, 20, 30, 31]), batch)
    assert predicting.tolist() == [0, 1, 4]
    assert targets.tolist() == [11, 12, 31]


def test_text_of_single_tokens_is_refused(models: tuple[HybridModel, HybridModel]) -> None:
    with pytest.raises(ValueError, match="no token to predict"):
        compare(*models, [(torch.tensor([1, 2]), TokenBatch.from_lengths([1, 1]))])


def test_other_vocabulary_is_refused(models: tuple[HybridModel, HybridModel]) -> None:
    with pytest.raises(ValueError, match="the student has 53 tokens, the teacher 60"):
        compare(models[0], random_model([FULL], seed=0, vocabulary=60), random_batches())


def test_diverged_model_is_refused() -> None:
    model = random_model([FULL], seed=0)
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        compare(model, None, random_batches())
