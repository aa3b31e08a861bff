import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hrwkv.model import shards
from hrwkv.model.checkpoint import (
    load_config,
    load_model,
    save_model,
)
from hrwkv.model.shards import COMPANIONS, INDEX, CheckpointError, ShardReader, ShardWriter
from tests.builders import hf_teacher, hybrid_model, logits_of, random_ids

MODELS = {
    "hybrid": {"attention_layers": (2,)},
    "hybrid-tied": {"attention_layers": (1, 3), "tie_word_embeddings": True, "qk_norm": True},
    "pure-rwkv": {"attention_layers": (), "attention_bias": True},
    "teacher": {"attention_layers": (0, 1, 2, 3)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", MODELS)
def test_save_then_load_gives_the_same_bits(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = hybrid_model(**MODELS[case]).to(dtype)
    save_model(model, tmp_path / "saved", companions=tmp_path)
    again = load_model(tmp_path / "saved", dtype=dtype)
    assert again.config.to_dict()["layer_types"] == model.config.to_dict()["layer_types"]
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = random_ids(17)
    assert torch.equal(logits_of(model, ids, [6, 11]), logits_of(again, ids, [6, 11]))
    assert not again.training


def test_a_cast_on_saving_changes_the_files_only(tmp_path: Path) -> None:
    model = hybrid_model()
    save_model(model, tmp_path / "saved", companions=tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    save_model(hybrid_model(tie_word_embeddings=True), tmp_path / "saved", companions=tmp_path)
    assert "lm_head.weight" not in ShardReader(tmp_path / "saved").names()
    again = load_model(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_shards_hold_no_more_than_their_limit(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10 + i,), float(i)) for i in range(9)}
    tensors["big"] = torch.ones(1000)
    with ShardWriter(tmp_path / "out", max_shard_bytes=120) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 120
    assert [file.name for file in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    reader = ShardReader(tmp_path / "out")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_what_belongs_to_a_model_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*COMPANIONS, "training_args.bin", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    save_model(hybrid_model(), tmp_path / "saved", companions=source)
    saved = tmp_path / "saved"
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert names == {*COMPANIONS, "config.json", "model.safetensors", "SHA256SUMS"}


def saved_model(path: Path) -> Path:
    save_model(hybrid_model(), path, companions=path.parent)
    return path


def change_weights(path: Path, change: str) -> None:
    """Rewrite the only shard of a directory with one tensor missing, added, renamed, or of another shape."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("model.layers.1.self_attn.key.weight")
    if change == "extra":
        tensors["model.layers.1.self_attn.key.weight"] = weight
        tensors["model.layers.1.self_attn.rotary.weight"] = weight.clone()
    elif change == "shape":
        tensors["model.layers.1.self_attn.key.weight"] = weight.T.contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"lacks model\.layers\.1\.self_attn\.key\.weight: "),
        ("extra", r"holds model\.layers\.1\.self_attn\.rotary\.weight, which"),
        ("shape", r"key\.weight has shape \[24, 16\], expected \[16, 24\]"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_tensor_that_does_not_fit_is_named(change: str, message: str, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "saved")
    change_weights(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "in-length", "in-header", "last-byte"])
def test_a_truncated_shard_is_named(kept: int, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "saved")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        load_model(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher")
    lost = sorted((tmp_path / "teacher").glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {lost.name}, named in"):
        load_model(tmp_path / "teacher")


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path) -> None:
    hf_teacher(tmp_path / "teacher")
    index = tmp_path / "teacher" / INDEX
    value = json.loads(index.read_text())
    value["weight_map"]["model.layers.9.mlp.up_proj.weight"] = value["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(value))
    with pytest.raises(
        CheckpointError, match=r"names model\.layers\.9\.mlp\.up_proj\.weight, which no shard"
    ):
        load_model(tmp_path / "teacher")


def test_safetensors_beside_the_model_are_not_read(tmp_path: Path) -> None:
    """Mistral ships the same weights twice under other names; adapters lie in the same folder."""
    hf_teacher(tmp_path / "teacher")
    save_file(
        {"layers.0.attention.wq.weight": torch.ones(3)}, tmp_path / "teacher" / "consolidated.safetensors"
    )
    assert "layers.0.attention.wq.weight" not in ShardReader(tmp_path / "teacher").names()
    load_model(tmp_path / "teacher")


def test_shards_without_an_index(tmp_path: Path) -> None:
    theirs = hf_teacher(tmp_path / "teacher")
    (tmp_path / "teacher" / INDEX).unlink()
    assert set(ShardReader(tmp_path / "teacher").names()) == theirs.state_dict().keys()
    first, second = sorted((tmp_path / "teacher").glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"is in {first.name} and in {second.name}: remove one"):
        ShardReader(tmp_path / "teacher")


def test_a_tied_teacher_with_another_head_is_refused(tmp_path: Path) -> None:
    """Transformers opens such a directory untied; read as tied it would give other logits, silently."""
    hf_teacher(tmp_path / "teacher", changes={"tie_word_embeddings": True}, shard="1GB")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    load_model(tmp_path / "teacher")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs.*set it to false"):
        load_model(tmp_path / "teacher")


@pytest.mark.parametrize("text", ["", "{", "[1]"], ids=["empty", "cut-off", "no-object"])
def test_a_config_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load_model(tmp_path)
    hybrid_model().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        load_model(tmp_path)


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "saved")
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="saved exists already"):
        save_model(hybrid_model(seed=1), path, companions=tmp_path)
    assert (path / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def write_four(path: Path, stop_after: int = 4) -> None:
    """Four shards of one tensor; the user interrupts after some."""
    with ShardWriter(path, max_shard_bytes=8) as writer:
        for number in range(4):
            if number == stop_after:
                raise KeyboardInterrupt("by the user")
            writer.add(f"t{number}", torch.ones(2))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left on device")],
    ids=["from-python", "from-safetensors"],
)
@pytest.mark.parametrize("name", ["out", "new/deep/out"])
def test_a_full_disk_leaves_nothing(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_on_the_second(tensors: object, file: Path, metadata: object = None) -> None:
        calls.append(file)
        file.write_bytes(b"half")
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(shards, "save_file", fail_on_the_second)
    with pytest.raises(CheckpointError, match=r"cannot write .*out \(.*No space left on device.*\): free"):
        write_four(tmp_path / name)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="by the user"):
        write_four(tmp_path / "new" / "out", stop_after=2)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/out"):
        save_model(hybrid_model(), tmp_path / "file" / "out", companions=tmp_path)
    assert (tmp_path / "file").read_text() == "x"


def test_no_right_to_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(locked, os.W_OK):  # root writes everywhere, so the refusal is played
        make = Path.mkdir

        def refuse(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            if locked in self.parents:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            make(self, mode, parents, exist_ok)

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*out \(.*Permission denied"):
        save_model(hybrid_model(), locked / "out", companions=tmp_path)
    assert list(locked.iterdir()) == []


def test_the_working_directory_may_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(hybrid_model(), ".", companions=tmp_path)
    save_model(hybrid_model(), "./a/../b", companions=tmp_path)
    load_model("b")
