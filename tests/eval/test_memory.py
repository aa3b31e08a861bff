import pytest
import torch

from hrwkv.eval.memory import break_even_context, memory_of
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel

RANKS = {"decay_rank": 192, "iclr_rank": 160, "value_rank": 128, "key_rank": 128, "gate_rank": 384}


def reka(layer_types: list[str]) -> HybridConfig:
    return HybridConfig(
        vocab_size=100352,
        hidden_size=6144,
        intermediate_size=19648,
        num_hidden_layers=44,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=96,
        layer_types=layer_types,
        **RANKS,
    )


KEPT = (7, 15, 23, 31, 39, 43)
TEACHER = memory_of(reka([FULL] * 44))
STUDENT = memory_of(reka([FULL if layer in KEPT else LINEAR for layer in range(44)]))


def test_cache_of_reka_flash_3() -> None:
    assert (TEACHER.kv_bytes_per_token, STUDENT.kv_bytes_per_token) == (135_168, 18_432)
    assert (TEACHER.state_bytes, STUDENT.state_bytes) == (0, 38 * 64 * 96 * 96 * 4)
    assert (STUDENT.rwkv_layers, STUDENT.attention_layers) == (38, 6)


def test_parameters_of_reka_flash_3() -> None:
    attention = 2 * 6144 * 64 * 96 + 2 * 6144 * 8 * 96
    assert TEACHER.by_kind == {
        "embedding": 100352 * 6144,
        "head": 100352 * 6144,
        "rwkv": 0,
        "attention": 44 * attention,
        "mlp": 44 * 3 * 6144 * 19648,
        "norm": 89 * 6144,
    }
    assert TEACHER.parameters == pytest.approx(20.9e9, rel=0.01)
    assert STUDENT.by_kind["attention"] == 6 * attention
    assert STUDENT.by_kind["rwkv"] > 38 * attention


def test_break_even_is_the_first_shorter_context() -> None:
    context = break_even_context(STUDENT, TEACHER)
    assert context == 769
    assert STUDENT.bytes_at(context) < TEACHER.bytes_at(context)
    assert STUDENT.bytes_at(context - 1) >= TEACHER.bytes_at(context - 1)


def test_same_or_larger_cache_never_breaks_even() -> None:
    assert break_even_context(TEACHER, TEACHER) is None
    assert break_even_context(TEACHER, STUDENT) is None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_those_of_the_module(tied: bool) -> None:
    config = HybridConfig(
        vocab_size=51,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        layer_types=[LINEAR, FULL, LINEAR],
        tie_word_embeddings=tied,
        attention_bias=True,
        qk_norm=True,
        **dict.fromkeys(RANKS, 3),
    )
    model = HybridModel(config)
    memory = memory_of(config, kv_bytes=4)
    assert memory.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert memory.by_kind["head"] == (0 if tied else 51 * 24)
    assert memory.by_kind["rwkv"] == sum(
        p.numel() for layer in (0, 2) for p in model.model.layers[layer].self_attn.parameters()
    )
    assert memory.kv_bytes_per_token == 2 * 2 * 6 * torch.float32.itemsize
