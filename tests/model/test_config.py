from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from hrwkv.model.checkpoint import load_config
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from tests.builders import hybrid_config


def test_layers_by_kind() -> None:
    config = hybrid_config(attention_layers=(1, 3))
    assert config.layer_types == [LINEAR, FULL, LINEAR, FULL]
    assert config.linear_layers == [0, 2]
    assert config.full_layers == [1, 3]


def test_what_follows_from_other_fields() -> None:
    config = HybridConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)
    assert config.head_dim == 12
    assert config.num_key_value_heads == 4
    assert config.layer_types == [FULL] * 3
    assert config.attention_rope


def test_a_file_gives_the_same_config(tmp_path: Path) -> None:
    config = hybrid_config(
        attention_layers=(2,),
        qk_norm=True,
        eos_token_id=[2, 5],
        rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
    )
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_defaults_of_our_own_class_do_not_hide_a_teachers(family: str) -> None:
    """Fields that both know have the same meaning, so a missing one may not take another default."""
    theirs = AutoConfig.for_model(family).to_dict()
    shared = ("hidden_act", "tie_word_embeddings", "initializer_range", "rms_norm_eps")
    ours = HybridConfig(num_hidden_layers=1).to_dict()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layer-0-attention": ({"layer_types": [FULL, LINEAR, LINEAR, LINEAR]}, "layer 0 is full attention"),
    "too-few-kinds": ({"layer_types": [LINEAR] * 3}, "layer_types has 3 entries"),
    "unknown-kind": ({"layer_types": [LINEAR, "sliding_attention", LINEAR, LINEAR]}, "sliding_attention"),
    "no-rank": ({"gate_rank": None, "key_rank": None}, "needs key_rank, gate_rank"),
    "negative-rank": ({"value_rank": -3}, "value_rank is -3"),
    "no-heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "no-kv-heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    "uneven-heads": ({"num_key_value_heads": 3}, "not a multiple"),
    "odd-head": ({"head_dim": 7}, "head_dim is 7"),
    "no-head": ({"head_dim": 0}, "head_dim is 0"),
    "word": ({"vocab_size": "many"}, "vocab_size is 'many'"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "variant": ({"variant": "hxa07c"}, "variant is 'hxa07c', expected one of hxa079"),
    "rope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_no_model_can_have(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        hybrid_config(**{"attention_layers": (2,), **changes})


def test_a_foreign_config_is_read_by_its_family(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert isinstance(config, HybridConfig)
    assert config.full_layers == [0, 1, 2]
