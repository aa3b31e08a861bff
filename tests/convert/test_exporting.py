import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hrwkv.convert.exporting import Format, export_model
from hrwkv.convert.importing import import_model
from hrwkv.model.checkpoint import save_model
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import CheckpointError, verify_checksums
from hrwkv.settings import ImportSettings
from tests.convert.published import write_directory, write_pth
from tests.convert.test_importing import FACTS, REFERENCE, SHAPES, assert_same_model, model_of

PTH: Format = "rwkv-infer-pth"
DIRECTORY: Format = "rwkv-infer-safetensors"


def bf16(shape: str = "plain", variant: str = "hxa079") -> HybridModel:
    return model_of(shape, variant=variant).to(torch.bfloat16)


def saved(model: HybridModel, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_model(model, path, companions=path.parent)
    return path


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference checkpoint lies outside the repository")
def test_reference_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    settings = ImportSettings(rope_theta=8e6, rms_norm_eps=1e-5)
    import_model(REFERENCE / "model.pth", tmp_path / "model", settings)
    export_model(tmp_path / "model", tmp_path / "out.pth", form=PTH)
    theirs = torch.load(REFERENCE / "model.pth", weights_only=True)
    assert_same_tensors(torch.load(tmp_path / "out.pth", weights_only=True), theirs)


@pytest.mark.parametrize("constants", [True, False], ids=["constants", "no-constants"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pth_comes_back_bit_for_bit(shape: str, constants: bool, tmp_path: Path) -> None:
    theirs = write_pth(bf16(shape), tmp_path / "in.pth", constants=constants)
    import_model(tmp_path / "in.pth", tmp_path / "model", FACTS)
    export_model(tmp_path / "model", tmp_path / "out.pth", form=PTH)
    assert_same_tensors(torch.load(tmp_path / "out.pth", weights_only=True), theirs)


@pytest.mark.parametrize("constants", [True, False], ids=["constants", "no-constants"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["hxa079", "hxa07a", "hxa07c"])
def test_directory_comes_back_bit_for_bit(variant: str, shape: str, constants: bool, tmp_path: Path) -> None:
    theirs = write_directory(bf16(shape, variant), tmp_path / "in", constants=constants)
    import_model(tmp_path / "in", tmp_path / "model", ImportSettings())
    export_model(tmp_path / "model", tmp_path / "out", form=DIRECTORY)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), theirs)


@pytest.mark.parametrize("form", [PTH, DIRECTORY])
@pytest.mark.parametrize("shape", SHAPES)
def test_import_of_an_export_is_the_same_model(shape: str, form: Format, tmp_path: Path) -> None:
    model = bf16(shape)
    export_model(saved(model, tmp_path / "model"), tmp_path / "out", form=form)
    import_model(tmp_path / "out", tmp_path / "back", FACTS if form == PTH else ImportSettings())
    assert_same_model(tmp_path / "back", model)


def test_pth_has_the_names_and_shapes_of_the_format(tmp_path: Path) -> None:
    """The table of the published files: blocks, att, ffn; rows of [1, 1, C]; 78 in every hxa079 file."""
    export_model(saved(bf16("qk-norm-biases-tied"), tmp_path / "model"), tmp_path / "out.pth", form=PTH)
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    linear = {name.removeprefix("blocks.1."): shape for name, shape in shapes.items() if "blocks.1." in name}
    assert linear == {
        "ln1.weight": [24],
        "ln2.weight": [24],
        "ffn.gate.weight": [40, 24],
        "ffn.up.weight": [40, 24],
        "ffn.down.weight": [24, 40],
        "att.receptance.weight": [32, 24],
        "att.receptance.bias": [32],
        "att.key.weight": [16, 24],
        "att.key.bias": [16],
        "att.value.weight": [16, 24],
        "att.value.bias": [16],
        "att.output.weight": [24, 32],
        "att.ln_r.weight": [8],
        "att.ln_k.weight": [8],
        "att.w0": [1, 1, 32],
        "att.w1": [24, 5],
        "att.w2": [5, 32],
        "att.a0": [1, 1, 32],
        "att.a1": [24, 4],
        "att.a2": [4, 32],
        "att.v0": [1, 1, 16],
        "att.v1": [24, 3],
        "att.v2": [3, 16],
        "att.k0": [1, 1, 16],
        "att.k1": [24, 3],
        "att.k2": [3, 16],
        "att.g1": [24, 6],
        "att.g2": [6, 32],
        "att.r_k": [4, 8],
        "att.layer_architecture": [],
        "att.head_size_record": [],
    }
    attention = {name.removeprefix("blocks.2.att.") for name in shapes if "blocks.2.att." in name}
    projections = {f"{part}_proj.weight" for part in "qkvo"} | {f"{part}_proj.bias" for part in "qkv"}
    assert attention == projections | {"ln_r.weight", "ln_k.weight"}
    assert {name for name in shapes if not name.startswith("blocks.")} == {
        "emb.weight",
        "head.weight",
        "ln_out.weight",
    }
    assert found["blocks.1.att.layer_architecture"].item() == 78.0
    assert found["blocks.1.att.head_size_record"].item() == 8.0
    assert torch.equal(found["head.weight"], found["emb.weight"])


def test_directory_says_what_rwkv_infer_reads(tmp_path: Path) -> None:
    model = bf16("qk-norm-biases-tied")
    export_model(saved(model, tmp_path / "model"), tmp_path / "out", form=DIRECTORY)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "num_hidden_layers": 4,
        "rwkv_architecture": "hxa079",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "transformer_layers": [2],
        "rwkv_layers": [0, 1, 3],
        "enable_qk_norm": True,
        "nope_in_transformer": True,
        "nope_in_rwkv": False,
        "lora_rank_decay": 5,
    }
    assert {name: config[name] for name in expected} == expected


def test_export_records_its_sha256(tmp_path: Path) -> None:
    model = saved(bf16(), tmp_path / "model")
    export_model(model, tmp_path / "out.pth", form=PTH)
    size = (tmp_path / "out.pth").stat().st_size
    assert list(verify_checksums(tmp_path / "out.pth")) == [("out.pth", size)]
    export_model(model, tmp_path / "out", form=DIRECTORY)
    assert [name for name, _ in verify_checksums(tmp_path / "out")] == ["model.safetensors"]


def test_another_dtype_is_converted_when_asked(tmp_path: Path) -> None:
    model = saved(model_of(), tmp_path / "model")
    with pytest.raises(CheckpointError, match="is float32, RWKV-Infer's files are bfloat16: give --dtype"):
        export_model(model, tmp_path / "out.pth", form=PTH)
    export_model(model, tmp_path / "out.pth", form=PTH, dtype="bfloat16")
    import_model(tmp_path / "out.pth", tmp_path / "back", FACTS)
    assert_same_model(tmp_path / "back", bf16())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
REFUSED = {
    "variant": (
        {"variant": "radlads"},
        DIRECTORY,
        "variant radlads (this form holds hxa079, hxa07a, hxa07c)",
    ),
    "variant-pth": ({"variant": "hxa07a"}, PTH, "variant hxa07a (this form holds hxa079)"),
    "rope-type": ({"rope_parameters": YARN}, PTH, "RoPE of type yarn"),
    "attention-rope": ({"attention_rope": True}, PTH, "RoPE in its attention layers"),
    "no-linear-rope": ({"linear_rope": False}, DIRECTORY, "no RoPE in its RWKV layers"),
    "output-bias": ({"attention_output_bias": True}, PTH, "a bias behind the mixer"),
    "mlp-bias": ({"mlp_bias": True}, PTH, "biases in its MLPs"),
    "teacher": ({"attention_layers": (0, 1, 2, 3)}, PTH, "no RWKV layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_rwkv_infer_computes_differently_is_refused(case: str, tmp_path: Path) -> None:
    changes, form, says = REFUSED[case]
    model = saved(model_of(**changes).to(torch.bfloat16), tmp_path / "model")
    with pytest.raises(CheckpointError, match=re.escape(f"has {says}")):
        export_model(model, tmp_path / "out", form=form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.pth").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        export_model(saved(bf16(), tmp_path / "model"), tmp_path / "out.pth", form=PTH)
    assert (tmp_path / "out.pth").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_export_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(bf16(), tmp_path / "model")
    calls = 0

    def fail_later(name: str, number: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= 20:
            raise error

    monkeypatch.setattr("hrwkv.convert.exporting.SLACK", -(2**30))
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left|"):
        export_model(model, tmp_path / "out.pth", form=PTH, report=fail_later)
    assert calls >= 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
