import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hrwkv.convert.importing import import_model
from hrwkv.convert.presets import ChatFormat, Preset
from hrwkv.convert.transfer import convert
from hrwkv.model.checkpoint import load_model
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import CheckpointError, verify_checksums
from hrwkv.settings import ConvertSettings, ImportSettings
from tests.builders import SIZES, hf_teacher, hybrid_model, logits_of, random_ids
from tests.convert.published import write_directory, write_pth, write_radlads, write_shards, write_training

REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "hxa079_tiny"
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-5}
FACTS = ImportSettings(rope_theta=500.0, rms_norm_eps=1e-5)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "biases": {"attention_bias": True},
    "qk-norm-biases-tied": {"qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "interleaved": {"attention_layers": (1, 3)},
    "pure-rwkv": {"attention_layers": ()},
    "head-64": {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head-96": {"head_dim": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head-128": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
}


def model_of(shape: str = "plain", **changes: Any) -> HybridModel:
    return hybrid_model(**{**PLAIN, **SHAPES[shape], **changes})


def assert_same_model(path: Path, model: HybridModel) -> None:
    """Every weight and the logits are the same bits."""
    loaded = load_model(path, dtype=next(model.parameters()).dtype)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = random_ids(23)
    assert torch.equal(logits_of(loaded, ids, [9, 14]), logits_of(model, ids, [9, 14]))


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference logits lie outside the repository")
def test_reference_checkpoint_gives_the_logits_of_rwkv_infer(tmp_path: Path) -> None:
    """Theirs were computed in bf16 on a GPU: their rounding is the 1.3 % that are left."""
    settings = ImportSettings(rope_theta=8e6, rms_norm_eps=1e-5)
    import_model(REFERENCE / "model.pth", tmp_path / "out", settings)
    expected = torch.load(REFERENCE / "expected.pt", weights_only=True)
    ids, theirs = expected["ids"][0].long(), expected["logits"][0].float()
    ours = logits_of(load_model(tmp_path / "out"), ids, [len(ids)])
    assert (ours - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_pth_is_the_same_model(shape: str, tmp_path: Path) -> None:
    model = model_of(shape)
    write_pth(model, tmp_path / "model.pth", constants=shape != "plain")
    made = import_model(tmp_path / "model.pth", tmp_path / "out", FACTS)
    assert made.form == "rwkv-infer-pth"
    assert made.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["hxa079", "hxa07a", "hxa07c"])
def test_directory_is_the_same_model(variant: str, shape: str, tmp_path: Path) -> None:
    model = model_of(shape, variant=variant)
    write_directory(model, tmp_path / "source")
    made = import_model(tmp_path / "source", tmp_path / "out", ImportSettings())
    assert made.config.variant == variant
    assert made.config.decay_rank == model.config.decay_rank  # from the shape; the config says 1
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape.startswith("head")])
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
def test_radlads_is_the_same_model(rope: bool, shape: str, tmp_path: Path) -> None:
    model = model_of(shape, variant="radlads", linear_rope=rope, attention_rope=rope)
    write_radlads(model, tmp_path / "source", use_rope=rope)
    made = import_model(tmp_path / "source", tmp_path / "out", ImportSettings())
    assert len(made.left) == 3 * len(model.config.linear_layers)
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("name", ["weights.pth", "folder"])
@pytest.mark.parametrize("variant", ["hxa079", "hxa07a", "hxa07c"])
def test_whole_training_checkpoint_is_the_same_model(variant: str, name: str, tmp_path: Path) -> None:
    model = model_of("qk-norm", variant=variant)
    write_training(model, tmp_path / name)
    stated = None if variant == "hxa079" else variant
    made = import_model(
        tmp_path / name,
        tmp_path / "out",
        ImportSettings(rope_theta=500.0, rms_norm_eps=1e-5, variant=stated),  # type: ignore[arg-type]
    )
    assert made.form == "rwkv-inside"
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_checkpoint_takes_the_rest_from_its_teacher(tied: bool, tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher", "qwen3", changes={"tie_word_embeddings": tied})
    convert(tmp_path / "teacher", tmp_path / "student", ConvertSettings(attention_layers=(2,)))
    student = load_model(tmp_path / "student")
    mixers = tuple(f"model.layers.{layer}.self_attn." for layer in (0, 1, 3))
    write_training(student, tmp_path / "trained.pth", keep=lambda name: name.startswith(mixers))
    source, out = tmp_path / "trained.pth", tmp_path / "out"
    made = import_model(source, out, ImportSettings(), teacher=tmp_path / "teacher")
    assert made.said_by["rope_parameters"] == "the teacher"
    assert made.from_teacher == made.tensors - sum(name.startswith(mixers) for name in student.state_dict())
    assert_same_model(out, student)


def test_adapter_parts_of_a_training_checkpoint_are_merged(tmp_path: Path) -> None:
    model = model_of()
    write_training(model, tmp_path / "trained.pth")
    weights = torch.load(tmp_path / "trained.pth", weights_only=True)
    module = "model.model.layers.1.self_attn.student_attn.receptance"
    a, b = torch.randn(3, SIZES["hidden_size"]), torch.randn(32, 3)
    torch.save(weights | {f"{module}.lora_A": a, f"{module}.lora_B": b}, tmp_path / "lora.pth")
    settings = replace(FACTS, lora_scaling=0.5)
    made = import_model(tmp_path / "lora.pth", tmp_path / "out", settings)
    assert made.merged == 1
    merged = load_model(tmp_path / "out").state_dict()["model.layers.1.self_attn.receptance.weight"]
    torch.testing.assert_close(merged, weights[f"{module}.weight"] + 0.5 * b @ a)
    with pytest.raises(CheckpointError, match=r"give --lora-scaling"):
        import_model(tmp_path / "lora.pth", tmp_path / "other", FACTS)
    assert not (tmp_path / "other").exists()


def test_unread_parameters_stay_behind(tmp_path: Path) -> None:
    """Some hxa07c checkpoints declare the key's low-rank product of hxa079 and never read it."""
    model = model_of(variant="hxa07c")
    weights = write_directory(model, tmp_path / "source")
    for name in ("k0", "k1", "k2"):
        weights[f"model.layers.1.self_attn.{name}"] = torch.randn(3, 3)
    write_shards(tmp_path / "source", weights)
    import_model(tmp_path / "source", tmp_path / "out", ImportSettings())
    assert_same_model(tmp_path / "out", model)


@pytest.mark.parametrize("variant", ["hxa079", "radlads"])
def test_what_layer_0_never_reads_may_be_missing(variant: str, tmp_path: Path) -> None:
    model = model_of(variant=variant, attention_rope=variant == "radlads")
    unread = model.config.unread_parameters
    with torch.no_grad():
        for name in unread:
            model.get_parameter(name).zero_()
    write = write_radlads if variant == "radlads" else write_directory
    weights = write(model, tmp_path / "source")
    write_shards(tmp_path / "source", {name: t for name, t in weights.items() if name not in unread})
    import_model(tmp_path / "source", tmp_path / "out", ImportSettings())
    assert_same_model(tmp_path / "out", model)


TEACHER = {"model_type": "llama", **{k: v for k, v in SIZES.items() if not k.endswith("_id")}, **PLAIN}


def preset(name: str = "tiny", **changes: Any) -> Preset:
    chat = ChatFormat("{{ messages[0].content }}", "quiet", ("<sep>",), (7, 9))
    return Preset(name, {**TEACHER, **changes}, chat)


def test_preset_says_what_the_weights_do_not(tmp_path: Path) -> None:
    model = model_of()
    write_pth(model, tmp_path / "model.pth")
    made = import_model(tmp_path / "model.pth", tmp_path / "out", ImportSettings(), like=preset())
    assert made.said_by["rms_norm_eps"] == "preset tiny"
    assert made.config.max_position_embeddings == SIZES["max_position_embeddings"]
    assert_same_model(tmp_path / "out", model)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    quiet = tmp_path / "out" / "additional_chat_templates" / "no_reasoning.jinja"
    assert quiet.read_text() == "quiet"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, 9], "stop_strings": ["<sep>"]}


def test_a_preset_adds_to_what_came_along_and_replaces_nothing(tmp_path: Path) -> None:
    """Reka's own generation config names no stop text: a chat would run on behind <sep>."""
    write_pth(model_of(), tmp_path / "model.pth")
    own = tmp_path / "tokenizer"
    own.mkdir()
    (own / "generation_config.json").write_text('{"eos_token_id": 5, "temperature": 0.6}')
    (own / "tokenizer_config.json").write_text('{"chat_template": "its own"}')
    out = tmp_path / "out"
    import_model(tmp_path / "model.pth", out, ImportSettings(), like=preset(), tokenizer=own)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 5, "temperature": 0.6, "stop_strings": ["<sep>"]}
    assert (out / "chat_template.jinja").read_text() == "its own"
    assert (out / "additional_chat_templates" / "no_reasoning.jinja").read_text() == "quiet"


def test_a_preset_of_these_sizes_is_found(tmp_path: Path) -> None:
    write_pth(model_of(), tmp_path / "model.pth")
    others = [preset("other", hidden_size=32), preset("tiny")]
    made = import_model(tmp_path / "model.pth", tmp_path / "out", ImportSettings(), presets=others)
    assert made.said_by["rope_parameters"] == "preset tiny"
    assert made.config.rope_parameters["rope_theta"] == 500.0


def test_presets_that_disagree_are_not_guessed_between(tmp_path: Path) -> None:
    write_pth(model_of(), tmp_path / "model.pth")
    both = [preset("one"), preset("two", max_position_embeddings=128)]
    with pytest.raises(CheckpointError, match="fits one, two, which differ in max_position_embeddings"):
        import_model(tmp_path / "model.pth", tmp_path / "out", ImportSettings(), presets=both)


def test_a_longer_scaling_of_rope_is_kept(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = model_of(rope_parameters={**yarn, "rope_theta": 500.0})
    write_directory(model, tmp_path / "source", rope_scaling=yarn)
    import_model(tmp_path / "source", tmp_path / "out", ImportSettings())
    assert_same_model(tmp_path / "out", model)


def test_checksums_are_right_and_a_flipped_byte_is_found(tmp_path: Path) -> None:
    write_pth(model_of(), tmp_path / "model.pth")
    settings = replace(FACTS, max_shard_gib=2e-5)
    import_model(tmp_path / "model.pth", tmp_path / "out", settings)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert [name for name, _ in verify_checksums(tmp_path / "out")] == [shard.name for shard in shards]
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{shards[1].name} has sha256"):
        list(verify_checksums(tmp_path / "out"))


def test_dtype_is_converted_when_asked(tmp_path: Path) -> None:
    model = model_of()
    write_pth(model, tmp_path / "model.pth")
    import_model(tmp_path / "model.pth", tmp_path / "out", replace(FACTS, dtype="bfloat16"))
    assert_same_model(tmp_path / "out", model.to(torch.bfloat16))


class Wicked:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], Path]:
    """A .pth whose dictionary was changed."""

    def write(folder: Path) -> Path:
        weights: dict[str, Any] = dict(write_pth(model_of(), folder / "good.pth"))
        change(weights)
        torch.save(weights, folder / "bad.pth")
        return folder / "bad.pth"

    return write


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update({name: value})


def nan_in(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights[name].view(-1)[3:4].fill_(float("nan"))


def give_attention(weights: dict[str, Any]) -> None:
    for part in "qkvo":
        weights[f"blocks.1.att.{part}_proj.weight"] = weights[f"blocks.2.att.{part}_proj.weight"]


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.pop(name)


def cut_off(folder: Path) -> Path:
    write_pth(model_of(), folder / "good.pth")
    data = (folder / "good.pth").read_bytes()
    (folder / "bad.pth").write_bytes(data[: len(data) // 2])
    return folder / "bad.pth"


def written(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "bad.pth").write_bytes(content)
        return folder / "bad.pth"

    return write


def directory(**config: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_directory(model_of(), folder / "bad", **config)
        return folder / "bad"

    return write


def radlads(**config: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_radlads(model_of(variant="radlads"), folder / "bad", **config)
        return folder / "bad"

    return write


def no_model(folder: Path) -> Path:
    (folder / "bad").mkdir()
    (folder / "bad" / "notes.txt").write_text("none")
    return folder / "bad"


def cut_shard(folder: Path) -> Path:
    write_directory(model_of(), folder / "bad")
    shard = next((folder / "bad").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    return folder / "bad"


def trained_only(folder: Path) -> Path:
    write_training(model_of(), folder / "bad.pth", keep=lambda name: ".self_attn." in name)
    return folder / "bad.pth"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut-off": (cut_off, "it is cut off or something else"),
    "cut-shard": (cut_shard, "is not a complete safetensors file"),
    "wrong-magic": (written(b"GGUF" + bytes(64)), "starts with b'GGUF'"),
    "empty": (written(b""), "has no end of a torch file"),
    "missing": (lambda folder: folder / "none.pth", "does not exist"),
    "no-model": (no_model, "is not a model: expected *.safetensors"),
    "nan": (changed(nan_in("blocks.1.ffn.up.weight")), "blocks.1.ffn.up.weight holds NaN or infinity"),
    "both-sets": (changed(give_attention), "layer 1 has both an RWKV mixer"),
    "no-set": (changed(drop("blocks.2.att.o_proj.weight")), "layer 2 has neither a complete RWKV mixer"),
    "no-layer": (changed(put("blocks.5.ln1.weight", torch.ones(24))), "layer 4 has neither"),
    "missing-tensor": (changed(drop("blocks.1.att.g2")), "lacks model.layers.1.self_attn.g2"),
    "left-over": (changed(put("blocks.1.att.x9", torch.ones(3))), "model.layers.1.self_attn.x9, which this"),
    "shape": (
        changed(put("blocks.1.att.g2", torch.ones(6, 9))),
        "blocks.1.att.g2 has shape [6, 9], expected",
    ),
    "rank": (changed(put("blocks.1.att.w1", torch.ones(24, 6))), "w1 has rank 5 in layer 0 and 6 in layer 1"),
    "mixed-dtypes": (
        changed(put("blocks.1.att.g2", torch.ones(6, 32).half())),
        "mixes dtypes: emb.weight is float32, blocks.1.att.g2 is float16; give",
    ),
    "integers": (changed(put("blocks.1.att.g2", torch.ones(6, 32).int())), "g2 has dtype int32, expected"),
    "wicked": (changed(put("blocks.9.att", Wicked())), f"its pickle calls {os.system.__module__}.system"),
    "wicked-old": (written(pickle.dumps(Wicked())), "has no end of a torch file"),
    "nested": (changed(put("optimiser", {"a": torch.ones(1)})), "'optimiser' is a dict, expected a flat"),
    "list": (lambda folder: torch.save([1], folder / "l.pth") or folder / "l.pth", "holds a list, expected"),
    "token-shift": (changed(put("blocks.1.att.x_r", torch.ones(24))), "token shift (x070"),
    "group-norm": (changed(put("blocks.1.att.ln_x.weight", torch.ones(32))), "a group norm"),
    "hxa078": (lambda f: without_key_residual(f), "that is hxa078"),
    "architecture": (
        directory(rwkv_architecture="hxa07b"),
        "rwkv_architecture 'hxa07b', expected",
    ),
    "other-variant": (
        directory(rwkv_architecture="hxa07a"),
        "said to be hxa07a, but its tensors",
    ),
    "ours": (directory(model_type="hrwkv_hybrid"), "is one of our directories already"),
    "experts": (directory(num_experts=8), "mixture of experts"),
    "no-theta": (directory(rope_theta=None), "give --rope-theta, or --like"),
    "unbalanced": (radlads(balance_state=False), "keys scaled as in RWKV-7 World"),
    "balance-unsaid": (radlads(balance_state=None), "does not say balance_state"),
    "rope-unsaid": (radlads(use_rope=None), "does not say use_rope"),
    "trained-only": (trained_only, "give --teacher"),
}


def without_key_residual(folder: Path) -> Path:
    weights = write_pth(model_of(), folder / "good.pth")
    kept = {n: t for n, t in weights.items() if n.rpartition(".")[2] not in ("k0", "k1", "k2")}
    torch.save(kept, folder / "bad.pth")
    return folder / "bad.pth"


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    make, says = BAD[case]
    source = make(tmp_path)
    facts = ImportSettings() if source.is_dir() else FACTS
    with pytest.raises(CheckpointError, match=re.escape(says)):
        import_model(source, tmp_path / "deep" / "out", facts)
    assert not (tmp_path / "deep").exists()


def test_facts_are_asked_for(tmp_path: Path) -> None:
    write_pth(model_of(), tmp_path / "model.pth")
    for settings, missing in (
        (ImportSettings(), "give --rope-theta and --rms-norm-eps"),
        (ImportSettings(rope_theta=500.0), "give --rms-norm-eps, or"),
        (ImportSettings(rms_norm_eps=1e-5), "give --rope-theta, or"),
    ):
        with pytest.raises(CheckpointError, match=missing):
            import_model(tmp_path / "model.pth", tmp_path / "out", settings)


def test_variant_and_head_size_are_asked_for(tmp_path: Path) -> None:
    model = model_of(variant="hxa07a")
    write_pth(model, tmp_path / "model.pth", constants=False)
    with pytest.raises(CheckpointError, match="give --variant"):
        import_model(tmp_path / "model.pth", tmp_path / "out", FACTS)
    with pytest.raises(CheckpointError, match="give --head-dim or --like"):
        import_model(tmp_path / "model.pth", tmp_path / "out", replace(FACTS, variant="hxa07a"))
    import_model(tmp_path / "model.pth", tmp_path / "out", replace(FACTS, variant="hxa07a", head_dim=8))
    assert_same_model(tmp_path / "out", model)


def test_contradictions_are_told(tmp_path: Path) -> None:
    write_directory(model_of(), tmp_path / "source")
    for settings, says in (
        (ImportSettings(rope_theta=1e6), "says rope_theta 1e+06, but source's config.json says 500"),
        (ImportSettings(rms_norm_eps=1e-6), "says rms_norm_eps 1e-06, but source's config.json says 1e-05"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(says)):
            import_model(tmp_path / "source", tmp_path / "out", settings)
    write_pth(model_of(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="has hidden_size 24, but big has 48"):
        import_model(tmp_path / "model.pth", tmp_path / "out", FACTS, like=preset("big", hidden_size=48))


def test_nan_is_taken_when_allowed(tmp_path: Path) -> None:
    source = changed(nan_in("blocks.1.ffn.up.weight"))(tmp_path)
    import_model(source, tmp_path / "out", replace(FACTS, allow_nan=True))
    assert load_model(tmp_path / "out").state_dict()["model.layers.1.mlp.up_proj.weight"].isnan().sum() == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_is_found(dtype: str, value: float, tmp_path: Path) -> None:
    """Vectorised reductions have lost NaN at other places than the first before."""
    model = model_of().to(getattr(torch, dtype))
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.view(-1)[-1] = value
    write_pth(model, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="blocks.3.ffn.down.weight holds NaN or infinity"):
        import_model(tmp_path / "model.pth", tmp_path / "out", FACTS)
