import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrwkv.convert.inspection import Fact, Inspection, Memory, inspect_path, inspect_weights
from hrwkv.convert.presets import Preset, presets_of
from hrwkv.convert.sources import TorchReader
from hrwkv.model.checkpoint import expected_shapes, save_model
from hrwkv.model.config import FULL, LINEAR, RANKS, HybridConfig
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import CheckpointError, ShardReader
from tests.builders import FAMILY_CASES, SIZES, hf_teacher, hybrid_config, hybrid_model
from tests.convert.published import (
    RWKV_NAMES,
    renamed,
    write_config,
    write_directory,
    write_pth,
    write_radlads,
    write_shards,
    write_training,
)

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms-biases-tied": {"qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
    "two-attention": {"attention_layers": (1, 3)},
    "pure-rwkv": {"attention_layers": ()},
    "head-96": {"head_dim": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
}
UNSAID = {
    name: Fact(None, None) for name in ("rope_theta", "rope_type", "rms_norm_eps", "max_position_embeddings")
}


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file may read a tensor, the recorded size of a head excepted."""
    for reader in (ShardReader, TorchReader):
        monkeypatch.setattr(reader, "read", guarded(reader.read))


def guarded(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def only_constants(self: object, name: str) -> Tensor:
        assert name.endswith("head_size_record"), f"{name} was read"
        return read(self, name)

    return only_constants


def model_of(shape: str = "plain", **changes: Any) -> HybridModel:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    return hybrid_model(**{"rope_parameters": rope, "rms_norm_eps": 1e-5, **SHAPES[shape], **changes})


def preset_of(name: str, config: HybridConfig, **changes: Any) -> Preset:
    """The teacher of a tiny hybrid, as a preset."""
    teacher = {name: getattr(config, name) for name in SIZES if getattr(config, name) is not None}
    teacher |= {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": config.rope_parameters}
    return Preset(name, {**teacher, **changes}, None)


def said(config: HybridConfig, speaker: str) -> dict[str, Fact]:
    values = {
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_type": "default",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
    }
    return {name: Fact(value, speaker) for name, value in values.items()}


def assert_is(found: Inspection, model: HybridModel, **expected: Any) -> None:
    """Every field is the model's; ``expected`` is what its form makes of the others."""
    config = model.config
    weights = model.state_dict()  # a .pth has a tied head twice
    if config.tie_word_embeddings and found.form != "rwkv-infer-pth":
        del weights["lm_head.weight"]
    linear, heads = len(config.linear_layers), config.num_key_value_heads * config.head_dim
    own, full = 4 * heads * len(config.full_layers), 4 * heads * config.num_hidden_layers
    state = linear * config.num_attention_heads * config.head_dim**2 * 4
    features = (
        "attention_bias",
        "attention_output_bias",
        "mlp_bias",
        "qk_norm",
        "linear_rope",
        "attention_rope",
    )
    truth = {
        "model_type": None,
        "variant": config.variant if linear else None,
        "linear_layers": tuple(config.linear_layers),
        "attention_layers": tuple(config.full_layers),
        "sizes": {name: getattr(config, name) for name in found.sizes},
        "ranks": {name: getattr(config, name) for name in RANKS if getattr(config, name) is not None},
        "features": {name: getattr(config, name) for name in ("tie_word_embeddings", *features)},
        "facts": said(config, "config.json"),
        "dtypes": {"float32": len(weights)},
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "weight_bytes": sum(tensor.nbytes for tensor in weights.values()),
        "memory": Memory(state, own, full, full / own if own else None),
        "adapters": {},
        "adapter_ranks": (),
        "files": 1,
        "checksums": False,
        "verified_files": None,
        "left": (),
        **expected,
    }
    assert {name: getattr(found, name) for name in truth} == truth
    assert truth.keys() | {"path", "form", "missing"} == {field.name for field in dataclasses.fields(found)}


@pytest.mark.parametrize("shape", SHAPES)
def test_directory_of_ours(shape: str, tmp_path: Path) -> None:
    model = model_of(shape)
    save_model(model, tmp_path / "model", companions=tmp_path)
    found = inspect_path(tmp_path / "model", presets=[])
    assert (found.form, found.path) == ("hrwkv", str(tmp_path / "model"))
    assert_is(found, model, model_type="hrwkv_hybrid", checksums=True)
    assert [line.partition(":")[0] for line in found.missing] == ["tokenizer", "chat template"]


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_teacher(family: str, tmp_path: Path) -> None:
    model_type, changes = FAMILY_CASES[family]
    teacher = hf_teacher(tmp_path / "teacher", model_type, changes=changes)
    found = inspect_path(tmp_path / "teacher", presets=[])
    assert (found.form, found.model_type, found.variant) == ("teacher", model_type, None)
    assert (found.linear_layers, found.attention_layers) == ((), (0, 1, 2, 3))
    assert found.parameters == sum(parameter.numel() for parameter in teacher.parameters())
    assert found.sizes == {name: SIZES[name] for name in found.sizes}
    assert found.memory == Memory(0, 4 * 2 * 2 * 8 * 2, 4 * 2 * 2 * 8 * 2, 1.0)
    assert found.features["qk_norm"] == (model_type == "qwen3")
    assert found.features["tie_word_embeddings"] == ("tied" in family)
    assert found.files == len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    assert not any("lacks" in line or "holds" in line for line in found.missing)


@pytest.mark.parametrize("constants", [True, False], ids=["constants", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pth_says_what_it_does_not_say(shape: str, constants: bool, tmp_path: Path) -> None:
    model = model_of(shape)
    write_pth(model, tmp_path / "model.pth", constants=constants)
    found = inspect_path(tmp_path / "model.pth", presets=[])
    assert found.form == "rwkv-infer-pth"
    features = dict.fromkeys(("tie_word_embeddings", "linear_rope", "attention_rope"))
    layers = model.config.linear_layers if constants else []
    left = tuple(
        f"blocks.{n}.att.{last}" for n in layers for last in ("layer_architecture", "head_size_record")
    )
    assert_is(found, model, facts=UNSAID, features={**found.features, **features}, left=left)
    assert len(found.missing) == 2
    assert "give --rope-theta and --rms-norm-eps, or --like" in found.missing[0]
    assert found.missing[1] == "tokenizer: not in a file of weights; give --tokenizer"


def test_preset_of_the_same_sizes_says_the_rest(tmp_path: Path) -> None:
    model = model_of()
    write_pth(model, tmp_path / "model.pth")
    presets = [preset_of("tiny", model.config), preset_of("other", model.config, vocab_size=98)]
    found = inspect_path(tmp_path / "model.pth", presets=presets)
    assert found.facts == said(model.config, "preset tiny")
    assert found.missing == ("tokenizer: not in a file of weights; give --tokenizer",)


def test_presets_that_disagree_are_named(tmp_path: Path) -> None:
    """What they agree on is known all the same."""
    model = model_of()
    write_pth(model, tmp_path / "model.pth")
    presets = [preset_of("a", model.config), preset_of("b", model.config, max_position_embeddings=128)]
    found = inspect_path(tmp_path / "model.pth", presets=presets)
    assert found.facts["rope_theta"] == Fact(500.0, "preset a, b")
    assert found.facts["max_position_embeddings"] == Fact(None, None)
    assert "fits a, b, which differ in max_position_embeddings: choose one with --like" in found.missing[0]


@pytest.mark.parametrize("variant", ["hxa079", "hxa07a", "hxa07c"])
@pytest.mark.parametrize("shape", SHAPES)
def test_published_directory(shape: str, variant: str, tmp_path: Path) -> None:
    model = model_of(shape, variant=variant)
    write_directory(model, tmp_path / "model", constants=False, model_type="qwen3")
    found = inspect_path(tmp_path / "model", presets=[])
    assert found.form == "rwkv-infer-safetensors"
    assert_is(found, model, model_type="qwen3", files=2)
    assert [line.partition(":")[0] for line in found.missing] == ["tokenizer", "chat template"]


@pytest.mark.parametrize("shape", SHAPES)
def test_radlads(shape: str, tmp_path: Path) -> None:
    model = model_of(shape, variant="radlads", attention_rope=True)
    write_radlads(model, tmp_path / "model", tie_word_embeddings=model.config.tie_word_embeddings)
    found = inspect_path(tmp_path / "model", presets=[])
    assert found.form == "radlads"
    # Their writer puts a tied head beside the embedding, so it is one of those that carry nothing.
    head = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    unread = {
        f"model.layers.{n}.self_attn.{last}"
        for n in model.config.linear_layers
        for last in ("k_k", "k_a", "r_k")
    }
    assert set(found.left) == {*unread, *head}
    assert_is(found, model, model_type="rwkv7qwen2", files=2, left=found.left)


@pytest.mark.parametrize("name", ["trained.pth", "folder"])
def test_training_checkpoint(name: str, tmp_path: Path) -> None:
    model = model_of()
    write_training(model, tmp_path / name)
    found = inspect_path(tmp_path / name, presets=[preset_of("tiny", model.config)])
    assert found.form == "rwkv-inside"
    features = {**found.features, **dict.fromkeys(("tie_word_embeddings", "linear_rope", "attention_rope"))}
    facts, files = said(model.config, "preset tiny"), 1 if name.endswith("pth") else 2
    assert_is(found, model, facts=facts, features=features, files=files, left=found.left)
    assert all(name.endswith(("layer_architecture", "head_size_record")) for name in found.left)


def test_part_of_a_training_checkpoint_needs_its_teacher(tmp_path: Path) -> None:
    """Attention and the embedding were not trained: what is not here is named, what is here is told."""
    model = model_of(attention_layers=(2,))
    write_training(model, tmp_path / "no-attention.pth", lambda name: ".2.self_attn." not in name)
    found = inspect_path(tmp_path / "no-attention.pth", presets=[])
    assert (found.variant, found.linear_layers, found.attention_layers) == ("hxa079", (0, 1, 3), (2,))
    assert any(
        "lacks model.layers.2.self_attn.k_proj.weight" in line and "--teacher" in line
        for line in found.missing
    )
    write_training(model, tmp_path / "mixers.pth", lambda name: ".self_attn." in name and ".0." not in name)
    found = inspect_path(tmp_path / "mixers.pth", presets=[])
    assert (found.form, found.variant, found.memory) == ("rwkv-inside", "hxa079", None)
    assert set(found.sizes.values()) == {None}
    assert any("has no mixer in layer 0: give --teacher" in line for line in found.missing)
    assert any("give --rope-theta and --rms-norm-eps" in line for line in found.missing)


def with_lora(weights: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """LoRA parts for every MLP weight, in the file's own spelling."""
    parts = {}
    for name, weight in weights.items():
        if ".mlp." in name or ".ffn." in name:
            parts[name.replace(".weight", ".lora_A")] = torch.zeros(rank, weight.shape[1])
            parts[name.replace(".weight", ".lora_B")] = torch.zeros(weight.shape[0], rank)
    return parts


def test_training_checkpoint_with_adapters(tmp_path: Path) -> None:
    model = model_of()
    weights = write_training(model, tmp_path / "plain.pth")
    torch.save({**weights, **with_lora(weights, 3)}, tmp_path / "lora.pth")
    plain, found = (inspect_path(tmp_path / name, presets=[]) for name in ("plain.pth", "lora.pth"))
    assert (found.form, found.parameters) == ("rwkv-inside", plain.parameters)
    assert (found.adapters, found.adapter_ranks) == ({"lora": 12}, (3,))
    assert set(found.missing) - {line.replace("plain.pth", "lora.pth") for line in plain.missing} == {
        "scaling: in no file, 0.5 and 2.0 are both in use; give --lora-scaling"
    }


def test_adapters(tmp_path: Path) -> None:
    weights = write_pth(model_of(), tmp_path / "model.pth")
    norms = {
        "blocks.0.ln1.weight": weights["blocks.0.ln1.weight"],
        "blocks.0.att.w0": weights["blocks.0.att.w0"],
    }
    bone = {"blocks.1.ffn.up.bone": torch.zeros(6, 4, 4), "blocks.2.ffn.up.lora_A": torch.zeros(2, 24)}
    dora = {"blocks.3.ffn.up.lora_A": torch.zeros(2, 24), "blocks.3.ffn.up.lora_M": torch.zeros(1, 24)}
    torch.save({**norms, **bone, **dora}, tmp_path / "adapter.pth")
    found = inspect_path(tmp_path / "adapter.pth", presets=[])
    assert (found.form, found.variant, found.memory) == ("adapter", None, None)
    assert (found.adapters, found.adapter_ranks) == ({"bone": 1, "dora": 1, "lora": 1}, (2, 4))
    assert found.parameters == 24 + 32 + 6 * 4 * 4 + 2 * 24 + 3 * 24
    assert found.missing == (
        "scaling: in no file, 0.5 and 2.0 are both in use; give --scaling",
        "model: this is an adapter of a model that it does not name; hrwkv adapter merge puts both together",
    )


def test_peft_adapter(tmp_path: Path) -> None:
    names = ("lora_A.weight", "lora_B.weight")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file({prefix + name: torch.zeros(4, 4) for name in names}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "Qwen/Qwen3-8B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = inspect_path(tmp_path, presets=[])
    assert (found.form, found.adapters, found.adapter_ranks) == ("peft-adapter", {"lora": 1}, (4,))
    assert found.missing == (
        "model: this is an adapter of Qwen/Qwen3-8B, made by PEFT (LORA); "
        "hrwkv adapter merge puts both together",
    )


class NamesAndShapes:
    """A reader of a file that was never written: RWKV-Infer's names of a config's tensors, in bf16."""

    def __init__(self, config: HybridConfig, path: Path) -> None:
        self.path = path
        self._shapes = {renamed(name, RWKV_NAMES): shape for name, shape in expected_shapes(config).items()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


def test_reka_flash_3() -> None:
    """The published model by its shapes alone, with the shipped presets (docs/hxa079.md, section 3)."""
    kept = (8, 15, 22, 29, 36, 43)
    config = HybridConfig(
        vocab_size=100352,
        hidden_size=6144,
        intermediate_size=19648,
        num_hidden_layers=44,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=96,
        layer_types=[FULL if layer in kept else LINEAR for layer in range(44)],
        **dict(zip(RANKS, (320, 128, 96, 96, 384), strict=True)),
    )
    reader = NamesAndShapes(config, Path("HRWKV7-Reka-Flash3-Preview.pth"))
    found = inspect_weights(reader, presets=presets_of(RECIPES))
    assert (found.form, found.variant) == ("rwkv-infer-pth", "hxa079")
    assert (found.attention_layers, len(found.linear_layers)) == (kept, 38)
    assert found.memory == Memory(89_653_248, 18_432, 135_168, 135_168 / 18_432)
    assert round(found.memory.kv_ratio, 2) == 7.33
    assert found.parameters == sum(math.prod(shape) for shape in expected_shapes(config).values())
    assert found.parameters == pytest.approx(21.345e9, rel=1e-4)
    assert found.weight_bytes == 2 * found.parameters
    assert found.facts["rope_theta"].value == 8e6
    assert found.facts["rms_norm_eps"].value == 1e-5
    assert "reka-flash-3" in found.facts["rope_theta"].said_by


def broken(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Inspection:
    """One of our directories after a change of its only shard."""
    save_model(model_of(), folder / "model", companions=folder)
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return inspect_path(folder / "model", presets=[])


KEY = "model.layers.1.self_attn.key.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "norm-lost": (lambda w: w.pop("model.norm.weight"), "lacks model.norm.weight: copy or download it again"),
    "layer-with-none": (lambda w: w.pop(KEY), "layer 1 has neither a complete RWKV mixer nor"),
    "extra": (
        lambda w: w.update({"model.spare": torch.ones(1)}),
        "holds model.spare, which this model has no",
    ),
    "shape": (lambda w: w.update({KEY: torch.ones(3, 5)}), "key.weight has shape [3, 5], expected [16, 24]"),
    "two-shapes": (
        lambda w: w.update({KEY: torch.ones(3, 5), "model.norm.weight": torch.ones(7)}),
        "key.weight has shape [3, 5], expected [16, 24], and 1 more do not fit",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_do_not_fit_their_config_are_named(case: str, tmp_path: Path) -> None:
    change, says = BROKEN[case]
    found = broken(tmp_path, change)
    assert (found.form, found.variant, found.attention_layers) == ("hrwkv", "hxa079", (2,))
    assert sum(says in line for line in found.missing) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read"),
        ('{"model_type": "hrwkv_hybrid", "head_dim": 7}', "head_dim is 7, expected an even number"),
        ('{"model_type": "gpt2"}', "does not say what its RoPE or its norms are"),
    ],
    ids=["cut-off", "no-model", "other-family"],
)
def test_config_that_cannot_be_used_is_named(text: str, says: str, tmp_path: Path) -> None:
    save_model(model_of(), tmp_path / "model", companions=tmp_path)
    (tmp_path / "model" / "config.json").write_text(text)
    found = inspect_path(tmp_path / "model", presets=[])
    assert any(says in line for line in found.missing), found.missing
    assert found.linear_layers == (0, 1, 3)


def test_variant_that_the_tensors_do_not_tell(tmp_path: Path) -> None:
    """Sizes and memory are known all the same."""
    model = model_of(variant="hxa07c")
    write_pth(model, tmp_path / "model.pth")
    found = inspect_path(tmp_path / "model.pth", presets=[])
    assert found.variant is None
    assert found.sizes["head_dim"] == 8
    assert found.ranks["value_rank"] == model.config.value_rank
    assert found.memory.state_bytes == 3 * 4 * 8 * 8 * 4
    assert sum("give --variant" in line for line in found.missing) == 1


def test_head_size_that_nothing_tells(tmp_path: Path) -> None:
    write_pth(model_of(variant="hxa07a"), tmp_path / "model.pth", constants=False)
    found = inspect_path(tmp_path / "model.pth", presets=[])
    assert found.memory is None
    assert any("give --head-dim or --like" in line for line in found.missing)


def test_unsupported_variant_is_named(tmp_path: Path) -> None:
    write_directory(model_of(), tmp_path / "model", rwkv_architecture="hxa07b")
    found = inspect_path(tmp_path / "model", presets=[])
    assert any("rwkv_architecture 'hxa07b', expected one of hxa079" in line for line in found.missing)


def test_key_residual_that_hxa07c_never_reads_carries_nothing(tmp_path: Path) -> None:
    model = model_of(variant="hxa07c")
    weights = write_directory(model, tmp_path / "model", constants=False)
    unread = {f"model.layers.1.self_attn.{name}": torch.ones(3, 3) for name in ("k1", "k2")}
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    write_shards(tmp_path / "model", {**weights, **unread})
    write_config(model.config, tmp_path / "model", rwkv_architecture="hxa07c")
    found = inspect_path(tmp_path / "model", presets=[])
    assert found.left == tuple(unread)
    assert found.parameters == sum(tensor.numel() for tensor in weights.values())


def test_a_chat_template_and_a_tokenizer_are_found(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    save_model(model_of(), tmp_path / "model", companions=tmp_path)
    assert inspect_path(tmp_path / "model", presets=[]).missing == ()


def test_dtypes_are_counted_and_a_foreign_one_has_its_size(tmp_path: Path) -> None:
    config = hybrid_config()
    weights = {
        name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_shapes(config).items()
    }
    weights["model.norm.weight"] = torch.zeros(24, dtype=torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    found = inspect_path(tmp_path / "model.safetensors", presets=[])
    assert sorted(found.dtypes.values()) == [1, len(weights) - 1]
    assert found.weight_bytes == 2 * found.parameters - 24


def test_what_is_no_model_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        inspect_path(tmp_path / "nowhere", presets=[])
    with pytest.raises(CheckpointError, match="is not a model: expected"):
        inspect_path(tmp_path, presets=[])
    torch.save({"something": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds something, expected a model's"):
        inspect_path(tmp_path / "other.pth", presets=[])
