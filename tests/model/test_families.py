from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hrwkv.model.checkpoint import load_model
from hrwkv.model.families import FAMILIES, config_from_teacher
from tests.builders import FAMILY_CASES, ROPE_CASES, SIZES, hf_logits, hf_teacher, logits_of, random_ids

# Shortest first: Transformers' dynamic RoPE does not shrink again after a longer sequence.
LENGTHS = [7, 21, 40]


def teacher_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return AutoConfig.for_model(model_type, **{**SIZES, "sliding_window": None, **changes}).to_dict()


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model_type, changes = FAMILY_CASES[case]
    theirs = hf_teacher(tmp_path / "teacher", model_type, changes=changes)
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 3
    ids = random_ids(sum(LENGTHS))
    ours = logits_of(load_model(tmp_path / "teacher"), ids, LENGTHS)
    torch.testing.assert_close(ours, hf_logits(theirs, ids, LENGTHS), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", ROPE_CASES)
def test_every_rope_type_beyond_its_original_length(rope: str, model_type: str, tmp_path: Path) -> None:
    theirs = hf_teacher(tmp_path / "teacher", model_type, changes=ROPE_CASES[rope])
    ids = random_ids(sum(LENGTHS))
    ours = logits_of(load_model(tmp_path / "teacher"), ids, LENGTHS)
    torch.testing.assert_close(ours, hf_logits(theirs, ids, LENGTHS), atol=2e-5, rtol=1e-5)


def test_rope_types_differ_from_one_another(tmp_path: Path) -> None:
    """The equality above would hold for a type that nobody applies; here each changes the logits."""
    ids = random_ids(40)
    logits = []
    for name, changes in ROPE_CASES.items():
        hf_teacher(tmp_path / name, changes=changes)
        logits.append(logits_of(load_model(tmp_path / name), ids, [40])[-1])
    gaps = [(one - other).abs().max() for i, one in enumerate(logits) for other in logits[:i]]
    assert min(gaps) > 1e-3


OLD_FORMS = {
    "theta": ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    "nothing": ({}, {"rope_type": "default", "rope_theta": 10000.0}),
    "linear-type": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "llama3": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 16},
    ),
}


@pytest.mark.parametrize("case", OLD_FORMS)
def test_rope_of_older_config_files(case: str) -> None:
    written, expected = OLD_FORMS[case]
    config = config_from_teacher({"model_type": "llama", **SIZES, **written})
    assert config.rope_parameters is not None
    assert expected.items() <= config.rope_parameters.items()


REFUSED = {
    "sliding-window-mistral": ("mistral", {"sliding_window": 32}, "sliding window"),
    "sliding-window-qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
        "sliding window",
    ),
    "experts": ("llama", {"num_local_experts": 8}, "mixture of experts"),
    "soft-capping": ("llama", {"final_logit_softcapping": 30.0}, "soft-capping"),
    "attention-soft-capping": ("qwen2", {"attn_logit_softcapping": 50.0}, "soft-capping"),
    "sinks": ("llama", {"attention_sinks": True}, "attention sinks"),
    "encoder": ("llama", {"is_encoder_decoder": True}, "an encoder"),
    "image-encoder": ("llama", {"vision_config": {"hidden_size": 8}}, "an image encoder"),
    "partial-rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    "rope-type": ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "wrong-type": ("llama", {"num_hidden_layers": "four"}, "not a valid llama config.*num_hidden_layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_feature_that_is_not_carried_is_refused_by_its_name(case: str) -> None:
    model_type, changes, message = REFUSED[case]
    config = {"model_type": model_type, **SIZES, "sliding_window": None, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        config_from_teacher(config)
    assert "\n" not in str(caught.value)


UNKNOWN = {
    "family": ({"model_type": "gpt2"}, "'gpt2', expected one of: llama, mistral, qwen2, qwen3"),
    "no-family": ({}, "family is None"),
    "experts-first": ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
    "capping-first": ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "logit soft-capping"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_family_is_refused(case: str) -> None:
    config, message = UNKNOWN[case]
    with pytest.raises(ValueError, match=message):
        config_from_teacher(config)


HARMLESS = {
    "mistral-null": ("mistral", {"sliding_window": None}),
    "qwen2-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 32}),
    "qwen2-above-all-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": SIZES["num_hidden_layers"]},
    ),
    "full-rotary": ("llama", {"partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_a_feature_that_is_off_is_not_refused(case: str) -> None:
    model_type, changes = HARMLESS[case]
    config = config_from_teacher({"model_type": model_type, **SIZES, **changes})
    assert config.full_layers == list(range(SIZES["num_hidden_layers"]))
    assert config.attention_rope


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_callers_dictionary_is_left_alone(model_type: str) -> None:
    """Transformers writes into nested dictionaries: a second call saw the first one's RoPE."""
    config = teacher_config(model_type)
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    before = deepcopy(config)
    config_from_teacher(config)
    assert config == before
