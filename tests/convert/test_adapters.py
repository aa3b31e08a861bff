"""A model with an adapter merged against the adapter at work beside the model's weights."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hrwkv.convert.adapters import Merge, merge_adapter, merge_weight
from hrwkv.convert.formats import pth_name
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.model.hf import HybridForCausalLM
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter
from tests.builders import hybrid_model, logits_of, random_ids
from tests.convert.test_merge_weight import SCALING, normal, parts_for

LENGTHS = [7, 21]
# fp32 sums of up to 40 products in another order, through four layers, on logits of about 1 to 10.
CLOSE = {"atol": 5e-5, "rtol": 1e-5}
# Layer 1 is RWKV, layer 2 attention.
MATRICES = (
    "model.layers.0.self_attn.receptance.weight",
    "model.layers.1.self_attn.key.weight",
    "model.layers.1.self_attn.value.weight",
    "model.layers.1.self_attn.output.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.3.mlp.down_proj.weight",
)


def in_training(name: str) -> str:
    """As RWKVInside's checkpoints spell it: one model more, and the mixer inside its wrapper."""
    if ".layers.2." not in name:
        name = name.replace(".self_attn.", ".self_attn.student_attn.")
    return name.replace("model.", "model.model.", 1)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "rwkv": pth_name,
    "hf": lambda name: name,
    "training": in_training,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "teacher").mkdir()
    (folder / "teacher" / "tokenizer.json").write_text('{"kept": true}')
    core = hybrid_model(qk_norm=True, attention_bias=True)
    save_model(core, folder / "model", companions=folder / "teacher")
    return folder / "model"


def weights_of(path: Path) -> dict[str, Tensor]:
    reader = ShardReader(path)
    return {name: reader.read(name) for name in reader.names()}


def adapter_of(kind: str, model: Path, spelling: str = "rwkv") -> dict[str, Tensor]:
    weights, adapter = weights_of(model), {}
    for seed, name in enumerate(MATRICES):
        for part, tensor in parts_for(kind, weights[name], seed=10 * seed).items():
            adapter[SPELLINGS[spelling](name).removesuffix("weight") + part] = tensor
    return adapter


def saved(adapter: dict[str, Tensor], path: Path) -> Path:
    torch.save(adapter, path)
    return path


def work_beside(linear: nn.Linear, parts: Mapping[str, Tensor], scaling: float) -> None:
    """The adapter at run time, by other sums than a merge: nothing is added to the weight."""
    if "bone" in parts:
        bone = parts["bone"]

        def with_bone(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            turned = torch.einsum("jab,tjb->tja", bone, inputs[0].unflatten(-1, (-1, bone.shape[-1])))
            spread = turned.sum(1).repeat(1, module.out_features // bone.shape[-1])
            return output + nn.functional.linear(turned.flatten(1), module.weight) + spread

        linear.register_forward_hook(with_bone)
        return
    low, high = parts["lora_A"], parts["lora_B"]
    if "lora_M" in parts:
        columns = (linear.weight.double() + scaling * high.double() @ low.double()).square().sum(0).sqrt()
        factor = (parts["lora_M"].flatten() / (columns + 1e-6)).float()
        linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor,))
    linear.register_forward_hook(
        lambda module, inputs, output: output + scaling * (inputs[0] @ low.T) @ high.T
    )


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [("lora", "rwkv"), ("lora", "hf"), ("lora", "training"), ("dora", "rwkv"), ("bone", "training")],
)
def test_merged_model_computes_what_the_adapter_does(
    kind: str, spelling: str, model: Path, tmp_path: Path
) -> None:
    scaling = None if kind == "bone" else SCALING
    adapter = saved(adapter_of(kind, model, spelling), tmp_path / "adapter.pth")
    made = merge_adapter(model, adapter, tmp_path / "out", scaling=scaling)
    assert made == Merge((tmp_path / "out").resolve(), merged=len(MATRICES), replaced=0)

    running, before = load_model(model), weights_of(model)
    ids = random_ids(sum(LENGTHS))
    without = logits_of(running, ids, LENGTHS)
    for seed, name in enumerate(MATRICES):
        module = running.get_submodule(name.removesuffix(".weight"))
        work_beside(module, parts_for(kind, before[name], seed=10 * seed), SCALING)
    expected = logits_of(running, ids, LENGTHS)
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(logits_of(load_model(tmp_path / "out"), ids, LENGTHS), expected, **CLOSE)

    after = weights_of(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(MATRICES)


def test_output_is_a_complete_directory_and_says_what_was_merged(model: Path, tmp_path: Path) -> None:
    adapter = saved(adapter_of("lora", model), tmp_path / "mine.pth")
    seen: list[tuple[str, int, int]] = []
    merge_adapter(model, adapter, tmp_path / "out", scaling=0.5, report=lambda *call: seen.append(call))
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"kept": true}'
    assert json.loads((tmp_path / "out" / "adapter.json").read_text()) == {
        "model": "model",
        "adapter": "mine.pth",
        "form": "rwkv",
        "scaling": 0.5,
        "merged": len(MATRICES),
        "replaced": 0,
    }
    names = list(weights_of(model))
    assert sorted(call[0] for call in seen) == sorted(names)
    assert [call[1:] for call in seen] == [(number, len(names)) for number in range(1, len(names) + 1)]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_whole_tensors_replace_those_of_the_model(spelling: str, model: Path, tmp_path: Path) -> None:
    """Norms, decay, bonus, biases and attention weights come so; published vectors are [1, 1, C]."""
    before = weights_of(model)
    names = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        *(f"model.layers.1.self_attn.{part}" for part in ("w0", "a0", "v0", "k0", "w1", "g2", "r_k")),
        *(f"model.layers.1.self_attn.{part}.weight" for part in ("r_norm", "k_norm", "receptance")),
        *(f"model.layers.2.self_attn.{part}" for part in ("q_norm.weight", "k_norm.weight", "v_proj.bias")),
        "model.layers.2.self_attn.o_proj.weight",
    ]
    values = {name: normal(*before[name].shape, seed=seed) for seed, name in enumerate(names)}
    adapter = {SPELLINGS[spelling](name): value for name, value in values.items()}
    for name in names[4:8]:
        adapter[SPELLINGS[spelling](name)] = values[name].view(1, 1, -1)
    adapter[SPELLINGS[spelling]("model.layers.1.self_attn.layer_architecture")] = torch.tensor(78.0)
    made = merge_adapter(model, saved(adapter, tmp_path / "a.pth"), tmp_path / "out")
    assert (made.merged, made.replaced) == (0, len(names))
    after = weights_of(tmp_path / "out")
    for name in before:
        assert torch.equal(after[name], values.get(name, before[name])), name


def test_parts_are_merged_into_the_value_that_came_with_them(model: Path, tmp_path: Path) -> None:
    """A training checkpoint holds both; the model's own weight has then no say."""
    name = MATRICES[1]
    weight = normal(16, 24, seed=5)
    parts = parts_for("lora", weight)
    prefix = pth_name(name).removesuffix("weight")
    adapter = {pth_name(name): weight, **{prefix + part: tensor for part, tensor in parts.items()}}
    made = merge_adapter(model, saved(adapter, tmp_path / "a.pth"), tmp_path / "out", scaling=2.0)
    assert (made.merged, made.replaced) == (1, 1)
    assert torch.equal(weights_of(tmp_path / "out")[name], merge_weight(weight, parts, scaling=2.0))


def test_every_tensor_keeps_the_dtype_that_the_model_stores(model: Path, tmp_path: Path) -> None:
    """An adapter in fp32 is merged in fp32 and rounded once, into a model that may mix dtypes."""
    stored = {
        name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in weights_of(model).items()
    }
    with ShardWriter(tmp_path / "mixed") as writer:
        for name, tensor in stored.items():
            writer.add(name, tensor)
        writer.write_text("config.json", (model / "config.json").read_text())
    adapter = {**adapter_of("lora", model), "blocks.1.att.w0": normal(32, seed=1).bfloat16()}
    merge_adapter(tmp_path / "mixed", saved(adapter, tmp_path / "a.pth"), tmp_path / "out", scaling=SCALING)
    after = weights_of(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in stored.items()
    }
    for seed, name in enumerate(MATRICES):
        parts = parts_for("lora", stored[name], seed=10 * seed)
        assert torch.equal(after[name], merge_weight(stored[name], parts, scaling=SCALING))
    assert torch.equal(after["model.layers.1.self_attn.w0"], adapter["blocks.1.att.w0"].float())


def test_adapter_may_be_a_folder_or_safetensors(model: Path, tmp_path: Path) -> None:
    adapter = adapter_of("bone", model)
    names = sorted(adapter)
    (tmp_path / "folder").mkdir()
    saved({name: adapter[name] for name in names[:3]}, tmp_path / "folder" / "1.pth")
    saved({name: adapter[name] for name in names[3:]}, tmp_path / "folder" / "2.pth")
    save_file(adapter, tmp_path / "a.safetensors")
    for source in ("folder", "a.safetensors"):
        merge_adapter(model, tmp_path / source, tmp_path / f"out-{source}")
    first, second = (weights_of(tmp_path / f"out-{source}") for source in ("folder", "a.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[MATRICES[0]], weights_of(model)[MATRICES[0]])


KEY = "blocks.1.att.key"
HALF = {f"{KEY}.lora_A": torch.zeros(3, 24)}
LORA = {**HALF, f"{KEY}.lora_B": torch.zeros(16, 3)}
BONE = {f"{KEY}.bone": torch.zeros(3, 8, 8)}
REFUSALS: dict[str, tuple[dict[str, Tensor], float | None, str]] = {
    "no-scaling": (LORA, None, r"both 0\.5 .* and 2\.0 .* are in circulation"),
    "endless-scaling": (LORA, float("inf"), "scaling is inf, expected a finite number"),
    "scaling-for-bone": (BONE, 0.5, r"scaling is 0\.5, but .*a\.pth has no LoRA or DoRA parts"),
    "half": (
        HALF,
        0.5,
        r"a\.pth: model\.layers\.1\.self_attn\.key: found lora_A, expected lora_A and lora_B",
    ),
    "other-model": (
        {f"{KEY}.lora_A": torch.zeros(3, 8), f"{KEY}.lora_B": torch.zeros(16, 3)},
        0.5,
        r"model\.layers\.1\.self_attn\.key: lora_A has shape \[3, 8\], expected \[3, 24\]",
    ),
    "other-layer": (
        {"blocks.9.att.key.bone": torch.zeros(3, 8, 8)},
        None,
        r"blocks\.9\.att\.key\.bone is no",
    ),
    "other-kind": ({"blocks.2.att.key.bone": torch.zeros(3, 8, 8)}, None, r"blocks\.2\.att\.key\.bone is no"),
    "pissa": ({**LORA, f"{KEY}.init_lora_A": torch.zeros(3, 24)}, 0.5, r"key\.init_lora_A is no tensor of"),
    "nobody's-name": ({"step": torch.zeros(1), **BONE}, None, "step is no tensor of the model"),
    "part-of-a-vector": (
        {"blocks.1.ln1.lora_A": torch.zeros(3, 24), "blocks.1.ln1.lora_B": torch.zeros(24, 3)},
        0.5,
        r"input_layernorm: the weight has shape \[24\], expected \[out, in\]",
    ),
    "peft-name": ({"base_model.model.lm_head.lora_A": torch.zeros(1)}, None, "holds adapter_config.json too"),
    "whole-misshapen": (
        {"blocks.1.att.w0": torch.zeros(1, 32)},
        None,
        r"blocks\.1\.att\.w0 has shape \[1, 32\], expected \[32\]",
    ),
    "twice": (
        {f"{KEY}.bone": torch.zeros(3, 8, 8), "model.layers.1.self_attn.key.bone": torch.zeros(3, 8, 8)},
        None,
        r"blocks\.1\.att\.key\.bone and model\.layers\.1\.self_attn\.key\.bone are one tensor",
    ),
    "integers": (
        {f"{KEY}.bone": torch.zeros(3, 8, 8, dtype=torch.int8)},
        None,
        "has dtype int8, expected bfl",
    ),
    "nothing": ({}, None, "changes nothing: expected"),
    "only-constants": ({"blocks.1.att.head_size_record": torch.tensor(8.0)}, None, "changes nothing"),
    "not-finite": (
        {f"{KEY}.bone": torch.full((3, 8, 8), float("nan"))},
        None,
        r"model\.layers\.1\.self_attn\.key\.weight holds NaN or infinity with",
    ),
    "overflow": (
        LORA | {f"{KEY}.lora_B": torch.full((16, 3), 3e38), f"{KEY}.lora_A": torch.ones(3, 24)},
        2.0,
        "infi",
    ),
}


def refuse(model: Path, adapter: Path, out: Path, says: str, scaling: float | None = None) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        merge_adapter(model, adapter, out, scaling=scaling)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.parametrize("case", REFUSALS)
def test_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    case: str, model: Path, tmp_path: Path
) -> None:
    adapter, scaling, says = REFUSALS[case]
    refuse(model, saved(adapter, tmp_path / "a.pth"), tmp_path / "out", says, scaling)


def test_misfit_is_told_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(*unused: object) -> None:
        raise AssertionError("the writer was opened")

    monkeypatch.setattr(ShardWriter, "__enter__", untouched)
    misfits = [case for case in REFUSALS if case not in ("not-finite", "overflow")]
    for case in misfits:
        adapter, scaling, says = REFUSALS[case]
        refuse(model, saved(adapter, tmp_path / "a.pth"), tmp_path / "out", says, scaling)


def test_missing_adapter_and_existing_output_are_refused(model: Path, tmp_path: Path) -> None:
    refuse(model, tmp_path / "none.pth", tmp_path / "out", r"none\.pth does not exist")
    (tmp_path / "out").mkdir()
    adapter = saved(adapter_of("bone", model), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="exists already"):
        merge_adapter(model, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_tied_head_is_not_adapted_behind_the_embedding(model: Path, tmp_path: Path) -> None:
    save_model(hybrid_model(tie_word_embeddings=True), tmp_path / "tied", companions=model)
    cases = {
        "head.weight": ({"head.weight": torch.zeros(97, 24)}, r"head\.weight is no .*tie_word_embeddings"),
        "embedding": (
            {"emb.lora_A": torch.zeros(2, 24), "emb.lora_B": torch.zeros(97, 2)},
            "adapts the embedding or the head, but in this model both are one tensor",
        ),
    }
    for adapter, says in cases.values():
        refuse(tmp_path / "tied", saved(adapter, tmp_path / "a.pth"), tmp_path / "out", says, 0.5)
    whole = {"emb.weight": normal(97, 24, seed=3)}
    merge_adapter(tmp_path / "tied", saved(whole, tmp_path / "a.pth"), tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, whole["emb.weight"])


def peft_adapter(path: Path, model: Path, **changes: Any) -> nn.Module:
    """A PEFT adapter with every value random, saved; returns PEFT's own unmerged model."""
    peft = pytest.importorskip("peft")
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["receptance", "key", "q_proj", "down_proj"],
        **changes,
    }
    base = HybridForCausalLM.from_core(load_model(model))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for seed, parameter in enumerate(wrapped.parameters()):
            if parameter.requires_grad:
                parameter.add_(normal(*parameter.shape, seed=seed))
    wrapped.save_pretrained(path, save_embedding_layers=False)
    return wrapped.eval()


PEFT_CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "lora": ({}, 11, 0),
    "dora": ({"use_dora": True}, 11, 0),
    "whole-modules": ({"modules_to_save": ["lm_head", "input_layernorm"]}, 11, 5),
    "biases": ({"bias": "lora_only"}, 11, 7),
    "embedding": ({"target_modules": ["embed_tokens", "lm_head"]}, 2, 0),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_directory_is_merged_as_peft_computes(case: str, model: Path, tmp_path: Path) -> None:
    changes, merged, replaced = PEFT_CASES[case]
    wrapped = peft_adapter(tmp_path / "adapter", model, **changes)
    made = merge_adapter(model, tmp_path / "adapter", tmp_path / "out")
    assert (made.merged, made.replaced) == (merged, replaced)
    ids = random_ids(14)
    with torch.no_grad():
        expected = wrapped(input_ids=ids[None]).logits[0]
    ours = logits_of(load_model(tmp_path / "out"), ids, [14])
    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (ours - logits_of(load_model(model), ids, [14])).abs().max() > 0.1
    record = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert (record["form"], record["adapter"], record["scaling"]) == ("peft", "adapter", None)


def test_peft_keeps_the_stored_dtypes(model: Path, tmp_path: Path) -> None:
    save_model(load_model(model), tmp_path / "half", companions=model, dtype=torch.bfloat16)
    peft_adapter(tmp_path / "adapter", model)
    merge_adapter(tmp_path / "half", tmp_path / "adapter", tmp_path / "out")
    before, after = weights_of(tmp_path / "half"), weights_of(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = ("receptance.weight", "key.weight", "q_proj.weight", "down_proj.weight")
    assert changed == {name for name in before if name.endswith(targets)}


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(path / "adapter_model.safetensors")
    change(weights)
    save_file(weights, path / "adapter_model.safetensors")


PEFT_KEY = "base_model.model.model.layers.1.self_attn.key.lora_A.weight"
PEFT_REFUSALS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "left-over": (
        lambda weights: weights.update({PEFT_KEY.replace("layers.1", "layers.9"): torch.zeros(2, 24)}),
        r"no place for base_model\.model\.model\.layers\.9\.self_attn\.key\.lora_A",
    ),
    "missing": (
        lambda weights: weights.pop(PEFT_KEY),
        r"its weights lack .*layers\.1\.self_attn\.key\.lora_A",
    ),
    "misshapen": (
        lambda weights: weights.update({PEFT_KEY: torch.zeros(2, 8)}),
        "size mismatch for .*lora_A",
    ),
}


@pytest.mark.parametrize("case", PEFT_REFUSALS)
def test_peft_names_that_match_nothing_are_errors(case: str, model: Path, tmp_path: Path) -> None:
    change, says = PEFT_REFUSALS[case]
    peft_adapter(tmp_path / "adapter", model)
    rewritten(tmp_path / "adapter", change)
    refuse(model, tmp_path / "adapter", tmp_path / "out", f"of type LORA .*{says}")


def test_peft_directory_is_checked_before_the_model_loads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    peft_adapter(adapter, model)
    refuse(model, adapter, out, r"scaling is 2\.0, but .*adapter is of PEFT and tells its own", 2.0)
    config = adapter / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "target_modules": ["nothing"]}))
    refuse(model, adapter, out, "Target modules .*nothing.* not found")
    config.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}))
    refuse(model, adapter, out, "of type PROMPT_TUNING .prompts are no weights")
    config.write_text(json.dumps({**values, "peft_type": "NEWER"}))
    refuse(model, adapter, out, "cannot merge .* of type NEWER")
    config.write_text("{")
    refuse(model, adapter, out, r"cannot read .*adapter_config\.json")
    config.write_text(json.dumps(values))
    (adapter / "adapter_model.safetensors").rename(adapter / "other")
    refuse(model, adapter, out, r"has adapter_config\.json and no adapter_model\.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse(model, adapter, out, r"needs the peft library: pip install 'hrwkv\[train\]'")


def test_peft_does_not_change_a_tied_embedding(model: Path, tmp_path: Path) -> None:
    """Merged, one stored tensor would serve as both, and the logits would not be those of PEFT."""
    save_model(hybrid_model(tie_word_embeddings=True), tmp_path / "tied", companions=model)
    peft_adapter(tmp_path / "adapter", tmp_path / "tied", target_modules=["embed_tokens"])
    refuse(tmp_path / "tied", tmp_path / "adapter", tmp_path / "out", "both are one tensor")
