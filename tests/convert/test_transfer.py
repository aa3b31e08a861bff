import errno
import gc
import hashlib
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrwkv.convert.transfer import choose_layers, convert
from hrwkv.model import shards
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.model.config import RANKS
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter
from hrwkv.settings import ConvertSettings
from tests.builders import (
    FAMILY_CASES,
    ROPE_CASES,
    hf_logits,
    hf_teacher,
    hybrid_model,
    logits_of,
    random_ids,
)

SMALL = {"decay_rank": 5, "iclr_rank": 4, "value_rank": 3, "key_rank": 3, "gate_rank": 6}
LENGTHS = [7, 21, 40]
FRESH = [f"{letter}{number}" for letter in "wavkg" for number in "012" if letter + number != "g0"] + ["r_k"]


def settings_for(**changes: Any) -> ConvertSettings:
    keep = {} if "attention_layers" in changes else {"keep_attention": 1}
    return ConvertSettings(**{**SMALL, **keep, **changes})


def weights_of(path: Path) -> dict[str, Tensor]:
    reader = ShardReader(path)
    return {name: reader.read(name) for name in reader.names()}


def files_of(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


@pytest.mark.parametrize("case", FAMILY_CASES)
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_keeping_every_layer_keeps_the_teachers_logits(case: str, rope: str, tmp_path: Path) -> None:
    model_type, changes = FAMILY_CASES[case]
    theirs = hf_teacher(tmp_path / "teacher", model_type, changes={**changes, **ROPE_CASES[rope]})
    result = convert(tmp_path / "teacher", tmp_path / "out", ConvertSettings(keep_attention=4))
    assert result.config.attention_rope
    assert result.fresh == 0
    ids = random_ids(sum(LENGTHS))
    ours = logits_of(load_model(tmp_path / "out"), ids, LENGTHS)
    torch.testing.assert_close(ours, hf_logits(theirs, ids, LENGTHS), atol=2e-5, rtol=1e-5)
    assert torch.equal(ours, logits_of(load_model(tmp_path / "teacher"), ids, LENGTHS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_teacher_tensor_arrives(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model_type, changes = FAMILY_CASES[case]
    hf_teacher(tmp_path / "teacher", model_type, changes=changes, dtype=dtype)
    result = convert(tmp_path / "teacher", tmp_path / "out", settings_for(attention_layers=(2,)))
    teacher, student = weights_of(tmp_path / "teacher"), weights_of(tmp_path / "out")
    assert {tensor.dtype for tensor in student.values()} == {dtype}
    moved = {
        "q_proj": "receptance",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "q_norm": "r_norm",
    }
    factors = {"q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.3, "o_proj": 0.5}
    for name, tensor in teacher.items():
        module = name.split(".")[-2]
        if ".self_attn." in name and ".layers.2." not in name:
            name = name.replace(module, moved.get(module, module))
            tensor = tensor * factors.get(module, 1.0)
        assert torch.equal(student.pop(name), tensor), name
    assert {name.split(".")[-1] for name in student} == set(FRESH)
    assert (result.copied, result.fresh, result.dropped) == (len(teacher), len(student), ())
    model = load_model(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters
    assert logits_of(model, random_ids(20), [20]).isfinite().all()


def test_the_config_says_what_was_made(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher", "qwen3", changes=ROPE_CASES["llama3"], dtype=torch.bfloat16)
    config = convert(tmp_path / "teacher", tmp_path / "out", settings_for(attention_layers=(3, 1))).config
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_types"] == ["linear_attention", "full_attention"] * 2
    assert written["attention_rope"] is False
    assert written["rope_parameters"]["rope_type"] == "llama3"
    assert written["qk_norm"] is True
    assert written["dtype"] == "bfloat16"
    assert written["architectures"] == ["HybridForCausalLM"]
    assert {name: written[name] for name in RANKS} == SMALL
    assert load_model(tmp_path / "out").config.to_dict() == {
        **config.to_dict(),
        **{name: written[name] for name in ("architectures", "dtype")},
    }


@pytest.mark.parametrize(
    ("keep", "given", "expected"),
    [((2,), True, True), ((2,), False, False), ((), False, False), ((0, 1, 2, 3), False, True)],
    ids=["hybrid-rope", "hybrid-nope", "pure", "teacher"],
)
def test_position_encoding_of_the_kept_layers(
    keep: tuple[int, ...], given: bool, expected: bool, tmp_path: Path
) -> None:
    hf_teacher(tmp_path / "teacher")
    settings = settings_for(attention_layers=keep, attention_rope=given)
    assert convert(tmp_path / "teacher", tmp_path / "out", settings).config.attention_rope is expected


SPREAD = {
    "reka-flash-3": (44, 6, (8, 15, 22, 29, 36, 43)),
    "none": (8, 0, ()),
    "one": (8, 1, (7,)),
    "all-but-one": (5, 4, (1, 2, 3, 4)),
    "most": (8, 5, (2, 3, 5, 6, 7)),
    "all": (3, 3, (0, 1, 2)),
}


@pytest.mark.parametrize("case", SPREAD)
def test_kept_layers_are_spread(case: str) -> None:
    num_layers, count, expected = SPREAD[case]
    assert choose_layers(ConvertSettings(keep_attention=count), num_layers) == expected


def test_kept_layers_are_even_for_every_depth() -> None:
    for num_layers in range(2, 70):
        for count in range(1, num_layers):
            layers = choose_layers(ConvertSettings(keep_attention=count), num_layers)
            gaps = {after - before for before, after in zip((0, *layers), layers, strict=False)}
            assert len(layers) == count
            assert layers[-1] == num_layers - 1
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


BAD_CHOICES = {
    "neither": ({}, "neither of attention_layers and keep_attention given"),
    "both": ({"attention_layers": (1,), "keep_attention": 1}, "both of attention_layers and keep_attention"),
    "negative-count": ({"keep_attention": -1}, "keep_attention is -1"),
    "too-many": ({"keep_attention": 5}, "keep_attention is 5, but the teacher has 4 layers"),
    "outside": ({"attention_layers": (1, 99)}, "names layer 99, but the teacher has layers 0 to 3"),
    "negative-layer": ({"attention_layers": (-1,)}, "names layer -1"),
    "twice": ({"attention_layers": (2, 1, 2)}, "names 2 more than once"),
    "layer-0": ({"attention_layers": (0, 2)}, "names layer 0, .* value and key residuals"),
    "initialisation": ({"keep_attention": 1, "initialisation": "xavier"}, "'xavier', expected one of hxa079"),
    "rank": ({"keep_attention": 1, "key_rank": 0}, "key_rank is 0, expected at least 1"),
    "factor": ({"keep_attention": 1, "value_factor": float("nan")}, "value_factor is nan"),
    "shard": ({"keep_attention": 1, "max_shard_gib": 0.0}, "max_shard_gib is 0.0"),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_a_bad_setting_is_named_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    values, message = BAD_CHOICES[case]
    hf_teacher(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "teacher", tmp_path / "out", ConvertSettings(**values))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_layer_starts_the_same_whatever_others_are_kept(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher")
    students = []
    for layers in ((), (1,), (2, 3)):
        name = f"student-{len(layers)}"
        convert(tmp_path / "teacher", tmp_path / name, settings_for(attention_layers=layers))
        students.append(weights_of(tmp_path / name))
    for other in students[1:]:
        shared = students[0].keys() & other.keys()
        assert {name for name in shared if name.endswith("layers.0.self_attn.w2")}
        assert all(torch.equal(students[0][name], other[name]) for name in shared)


def test_a_conversion_can_be_repeated_and_moved(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / "teacher" / name).write_text(name)
    for name in ("one", "two"):
        convert(tmp_path / "teacher", tmp_path / name, settings_for(seed=3))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "chat_template.jinja"
    text = (tmp_path / "one" / "conversion.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text
    assert record["teacher"] == "teacher"
    config = (tmp_path / "teacher" / "config.json").read_bytes()
    assert record["teacher_config_sha256"] == hashlib.sha256(config).hexdigest()
    assert record["settings"]["seed"] == 3
    assert record["factors"] == {"receptance": 0.5, "key": 0.5, "value": 0.3, "output": 0.5}
    assert record["ranks"] == SMALL
    assert record["versions"]["torch"] == torch.__version__
    convert(tmp_path / "teacher", tmp_path / "three", settings_for(seed=4))
    assert (
        files_of(tmp_path / "three")["model.safetensors"] != files_of(tmp_path / "one")["model.safetensors"]
    )


def test_progress_names_every_tensor(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher")
    seen: list[tuple[str, int, int]] = []
    convert(tmp_path / "teacher", tmp_path / "out", settings_for(), report=lambda *step: seen.append(step))
    names = ShardReader(tmp_path / "out").names()
    assert sorted(name for name, _, _ in seen) == sorted(names)
    assert [(done, total) for _, done, total in seen] == [(i, len(names)) for i in range(1, len(names) + 1)]


def rewrite(teacher: Path, changes: dict[str, Tensor | None]) -> None:
    """Change or remove tensors of a teacher of one file."""
    tensors = load_file(teacher / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, teacher / "model.safetensors")


def test_what_carries_nothing_is_dropped_by_name(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher", changes={"tie_word_embeddings": True}, shard="1GB")
    embedding = load_file(tmp_path / "teacher" / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "teacher", {frequencies: torch.ones(4), "lm_head.weight": embedding})
    result = convert(tmp_path / "teacher", tmp_path / "out", settings_for())
    assert set(result.dropped) == {frequencies, "lm_head.weight"}
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["dropped"] == list(result.dropped)
    load_model(tmp_path / "out")


UP = "model.layers.3.mlp.up_proj.weight"
BAD_TENSORS = {
    "missing": ({UP: None}, f"lacks {UP}"),
    "extra": ({"model.layers.3.mlp.gate_up.weight": torch.ones(2)}, r"holds model\.layers\.3\.mlp\.gate_up"),
    "shape": ({UP: torch.ones(24, 40)}, r"up_proj\.weight has shape \[24, 40\], expected \[40, 24\]"),
    "integers": ({UP: torch.ones(40, 24, dtype=torch.int8)}, r"up_proj\.weight has dtype torch\.int8"),
    "bias": ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, r"holds .*q_proj\.bias"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_teacher_tensor_that_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    changes, message = BAD_TENSORS[case]
    hf_teacher(tmp_path / "teacher", shard="1GB")
    rewrite(tmp_path / "teacher", changes)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "teacher", tmp_path / "out", settings_for())
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_bad_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "out", settings_for())
    hf_teacher(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="teacher exists already"):
        convert(tmp_path / "teacher", tmp_path / "teacher", settings_for())
    shard = sorted((tmp_path / "teacher").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a complete safetensors file"):
        convert(tmp_path / "teacher", tmp_path / "out", settings_for())
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2', expected one of: llama"):
        convert(tmp_path / "teacher", tmp_path / "out", settings_for())
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_hybrid_is_no_teacher(tmp_path: Path) -> None:
    save_model(hybrid_model(), tmp_path / "hybrid", companions=tmp_path)
    with pytest.raises(ValueError, match="hybrid already"):
        convert(tmp_path / "hybrid", tmp_path / "out", settings_for())


@pytest.mark.parametrize("shards_before", [0, 2])
def test_a_full_disk_leaves_nothing(
    shards_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_teacher(tmp_path / "teacher")
    written = []

    def fill(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if len(written) == shards_before:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata=metadata)
        written.append(file)

    monkeypatch.setattr(shards, "save_file", fill)
    with pytest.raises(CheckpointError, match="cannot write .*No space left on device"):
        convert(tmp_path / "teacher", tmp_path / "deep" / "out", settings_for(max_shard_gib=1e-5))
    assert len(written) == shards_before
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


class TestAlignedMixers:
    """A hybrid whose RWKV layers come from a trained student with more of them."""

    @pytest.fixture
    def places(self, tmp_path: Path) -> tuple[Path, Path]:
        hf_teacher(tmp_path / "teacher", "qwen3")
        convert(tmp_path / "teacher", tmp_path / "fresh", settings_for(attention_layers=()))
        trained = load_model(tmp_path / "fresh")
        for parameter in trained.parameters():
            parameter.data.add_(1)
        save_model(trained, tmp_path / "trained", companions=tmp_path)
        return tmp_path / "teacher", tmp_path / "trained"

    def test_mixers_from_there_all_else_from_the_teacher(
        self, places: tuple[Path, Path], tmp_path: Path
    ) -> None:
        settings = ConvertSettings(attention_layers=(1, 3))  # without sizes: the mixers' hold
        result = convert(places[0], tmp_path / "out", settings, mixers_from=places[1])
        teacher, trained, student = (weights_of(path) for path in (*places, tmp_path / "out"))
        for name, tensor in student.items():
            mixer = ".self_attn." in name and name.split(".")[2] in "02"
            assert torch.equal(tensor, (trained if mixer else teacher)[name]), name
        assert (result.fresh, result.aligned) == (0, sum(".self_attn." in name for name in trained) // 2)
        assert {name.split(".")[2] for name in result.dropped} == {"0", "2"}
        assert result.copied + len(result.dropped) == len(teacher)
        assert json.loads((tmp_path / "out" / "conversion.json").read_text())["mixers_from"] == "trained"
        load_model(tmp_path / "out")

    def test_misfits_are_named(self, places: tuple[Path, Path], tmp_path: Path) -> None:
        teacher, trained = places
        with pytest.raises(ValueError, match="key_rank is 9, but the copied mixers have 3"):
            convert(teacher, tmp_path / "out", settings_for(key_rank=9), mixers_from=trained)
        convert(teacher, tmp_path / "hybrid", settings_for(attention_layers=(1,)))
        with pytest.raises(ValueError, match="layer 1 becomes RWKV, but the student"):
            convert(
                teacher,
                tmp_path / "out",
                settings_for(attention_layers=(3,)),
                mixers_from=tmp_path / "hybrid",
            )
        hf_teacher(tmp_path / "other", "qwen3", changes={"num_key_value_heads": 1})
        with pytest.raises(ValueError, match="has num_key_value_heads 2, but the teacher has 1"):
            convert(tmp_path / "other", tmp_path / "out", settings_for(), mixers_from=trained)
        (trained / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            convert(teacher, tmp_path / "out", settings_for(), mixers_from=trained)
        assert not (tmp_path / "out").exists()


def test_one_shard_and_one_tensor_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/convert_memory.py measures the process; here the tensors alive at any time are counted."""
    hf_teacher(tmp_path / "teacher", changes={"num_hidden_layers": 16}, shard="1GB")
    alive: dict[int, int] = {}
    peaks = [0]
    read, add = ShardReader.read, ShardWriter.add

    def count(tensor: Tensor) -> Tensor:
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        return tensor

    def counted_add(writer: ShardWriter, name: str, tensor: Tensor) -> None:
        peaks.append(sum(alive.values()) + writer._pending_bytes)
        add(writer, name, tensor)
        peaks.append(writer._pending_bytes)

    monkeypatch.setattr(ShardReader, "read", lambda reader, name: count(read(reader, name)))
    monkeypatch.setattr(ShardWriter, "add", counted_add)
    gc.disable()  # what only a collection of cycles frees would count as kept
    try:
        result = convert(tmp_path / "teacher", tmp_path / "out", settings_for(max_shard_gib=2**-17))
    finally:
        gc.enable()
    shard, largest = 2**13, max(tensor.nbytes for tensor in weights_of(tmp_path / "out").values())
    assert result.parameters * 4 > 20 * (shard + largest), "the model is too small to tell"
    assert largest <= max(peaks) <= max(shard, largest) + largest
