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
        variant="radlads",
        linear_rope=False,
        qk_norm=True,
        eos_token_id=[2, 5],
        rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
    )
    config.save_pretrained(tmp_path)
    again = load_config(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.variant, again.linear_rope, again.key_rank) == ("radlads", False, None)


RANK_NAMES = {
    "hxa079": ("decay_rank", "iclr_rank", "value_rank", "key_rank", "gate_rank"),
    "hxa07a": ("decay_rank", "iclr_rank", "gate_rank"),
    "hxa07c": ("decay_rank", "iclr_rank", "value_rank", "gate_rank"),
    "radlads": ("decay_rank", "iclr_rank", "value_rank", "gate_rank"),
}


@pytest.mark.parametrize("variant", RANK_NAMES)
def test_every_rank_that_a_variant_has_is_needed_and_no_other(variant: str) -> None:
    needed = RANK_NAMES[variant]
    assert hybrid_config(variant=variant).rank_names == needed
    for name in RANK_NAMES["hxa079"]:
        if name in needed:
            with pytest.raises(ValueError, match=f"a hybrid of variant {variant} needs {name}: give"):
                hybrid_config(variant=variant, **{name: None})
        else:
            with pytest.raises(ValueError, match=f"variant {variant} has no place for {name}: leave it out"):
                hybrid_config(variant=variant, **{name: 3})


@pytest.mark.parametrize("variant", ["hxa07a", "hxa07c"])
def test_layer_0_is_any_layer_without_a_residual_to_it(variant: str) -> None:
    assert hybrid_config(attention_layers=(0,), variant=variant).linear_layers == [1, 2, 3]


@pytest.mark.parametrize("variant", ["hxa079", "radlads"])
def test_layer_0_is_linear_where_residuals_lead_to_it(variant: str) -> None:
    with pytest.raises(ValueError, match=f"layer 0 is full attention.*{variant}'s residuals"):
        hybrid_config(attention_layers=(0,), variant=variant)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_defaults_of_our_own_class_do_not_hide_a_teachers(family: str) -> None:
    """Fields that both know have the same meaning, so a missing one may not take another default."""
    theirs = AutoConfig.for_model(family).to_dict()
    shared = ("hidden_act", "tie_word_embeddings", "initializer_range", "rms_norm_eps")
    ours = HybridConfig(num_hidden_layers=1).to_dict()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too-few-kinds": ({"layer_types": [LINEAR] * 3}, "layer_types has 3 entries"),
    "unknown-kind": ({"layer_types": [LINEAR, "sliding_attention", LINEAR, LINEAR]}, "sliding_attention"),
    "no-rank": ({"gate_rank": None, "key_rank": None}, "variant hxa079 needs key_rank, gate_rank: give"),
    "ranks-of-another-variant": (
        {"variant": "hxa07a", "value_rank": 3, "key_rank": 3},
        "variant hxa07a has no place for value_rank, key_rank: leave",
    ),
    "negative-rank": ({"value_rank": -3}, "value_rank is -3"),
    "no-heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "no-kv-heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    "uneven-heads": ({"num_key_value_heads": 3}, "not a multiple"),
    "odd-head": ({"head_dim": 7}, "head_dim is 7"),
    "no-head": ({"head_dim": 0}, "head_dim is 0"),
    "word": ({"vocab_size": "many"}, "vocab_size is 'many'"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "variant": ({"variant": "hxa07b"}, "is 'hxa07b', expected one of hxa079, hxa07a, hxa07c, radlads"),
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
