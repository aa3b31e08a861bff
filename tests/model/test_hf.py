import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hrwkv.layers.time_mix import TimeMix
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.model.hf import HybridForCausalLM
from tests.builders import (
    VOCAB,
    hf_logits,
    hf_teacher,
    hybrid_config,
    hybrid_model,
    logits_of,
    random_ids,
)

MODELS = {
    "hybrid": {"kept": (2,)},
    "two-kept": {"kept": (1, 3)},
    "all-linear": {"kept": ()},
    "all-attention": {"kept": (0, 1, 2, 3)},
    "hxa07a": {"kept": (0, 2), "variant": "hxa07a"},
    "hxa07c": {"kept": (2,), "variant": "hxa07c"},
    "radlads": {"kept": (1, 3), "variant": "radlads", "linear_rope": False},
}
LENGTHS = [7, 3, 5]
# The cached and the uncached forward add up in another order; logits are of size 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def build(kept: tuple[int, ...] = (2,), **changes: Any) -> HybridForCausalLM:
    return HybridForCausalLM.from_core(hybrid_model(kept, **{"eos_token_id": None, **changes}))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    return build(**MODELS[request.param])


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids [B, T], mask [B, T] and the rows without padding; padding is a token like any other."""
    rows = [random_ids(length, seed=length) for length in lengths]
    width = max(lengths)
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=11) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask, rows


def no_grad_logits(model: HybridForCausalLM, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


def generate(model: HybridForCausalLM, ids: Tensor, **arguments: Any) -> Tensor:
    mask = arguments.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, **arguments)


def test_logits_are_the_core_models(model: HybridForCausalLM) -> None:
    core = hybrid_model(
        model.config.full_layers, variant=model.config.variant, linear_rope=model.config.linear_rope
    )
    ids = random_ids(12)
    expected = logits_of(core, ids, [6, 6]).view(2, 6, VOCAB)
    assert torch.equal(no_grad_logits(model, ids.view(2, 6), use_cache=False), expected)
    assert list(model.state_dict()) == list(core.state_dict())


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_leaves_the_logits_of_the_tokens(model: HybridForCausalLM, side: str) -> None:
    ids, mask, rows = left_padded(LENGTHS)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
        rows = [row.flip(0) for row in rows]
    elif side == "both":
        ids, mask = F.pad(ids, (0, 2), value=11), F.pad(mask, (0, 2))
    logits = no_grad_logits(model, ids, attention_mask=mask, use_cache=False)
    for row, own, real in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(own[real], no_grad_logits(model, row[None], use_cache=False)[0], **CLOSE)


def test_packed_documents_with_positions_do_not_see_one_another(model: HybridForCausalLM) -> None:
    ids = random_ids(15)
    positions = torch.tensor([[*range(7), *range(3), *range(5)]])
    packed = no_grad_logits(model, ids[None], position_ids=positions, use_cache=False)[0]
    alone = [no_grad_logits(model, part[None], use_cache=False)[0] for part in ids.split([7, 3, 5])]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)


def test_rows_are_sequences_at_whatever_position_they_begin(model: HybridForCausalLM) -> None:
    ids = random_ids(14).view(2, 7)
    positions = torch.stack([torch.arange(2, 9), torch.arange(5, 12)])
    together = no_grad_logits(model, ids, position_ids=positions, use_cache=False)
    for row, own, logits in zip(ids, positions, together, strict=True):
        alone = no_grad_logits(model, row[None], position_ids=own[None], use_cache=False)[0]
        torch.testing.assert_close(logits, alone, **CLOSE)


def test_cached_generate_is_uncached_generate(model: HybridForCausalLM) -> None:
    ids = random_ids(14).view(2, 7)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_static_cache_generates_the_same(model: HybridForCausalLM) -> None:
    ids, mask, _ = left_padded(LENGTHS)
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation="static"), expected)


def test_static_cache_is_the_one_that_is_used() -> None:
    output = generate(
        build(), random_ids(7)[None], cache_implementation="static", return_dict_in_generate=True
    )
    assert type(output.past_key_values) is StaticCache


def test_beams_are_uncached_beams(model: HybridForCausalLM) -> None:
    ids, mask, _ = left_padded(LENGTHS)
    beams = {"attention_mask": mask, "num_beams": 3}
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))


def test_left_padded_generation_is_each_prompts_own(model: HybridForCausalLM) -> None:
    ids, mask, rows = left_padded(LENGTHS)
    together = generate(model, ids, attention_mask=mask)[:, max(LENGTHS) :]
    for row, own in zip(rows, together, strict=True):
        assert torch.equal(generate(model, row[None])[0, len(row) :], own)


def test_embeddings_generate_as_their_tokens(model: HybridForCausalLM) -> None:
    ids = random_ids(14).view(2, 7)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=9, do_sample=False
    )
    assert torch.equal(embedded, generate(model, ids)[:, 7:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
def test_prefill_in_pieces_is_one_prefill(model: HybridForCausalLM, kind: str, masked: bool) -> None:
    ids, mask, _ = left_padded(LENGTHS if masked else [7, 7, 7])
    dynamic = kind == "dynamic"
    cache = DynamicCache(config=model.config) if dynamic else StaticCache(model.config, max_cache_len=16)
    pieces, end = [], 0
    for start, end in ((0, 3), (3, 4), (4, 7)):  # the first piece of a short row is padding only
        arguments = {"attention_mask": mask[:, :end]} if masked else {}
        pieces.append(no_grad_logits(model, ids[:, start:end], past_key_values=cache, **arguments))
    whole = no_grad_logits(model, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], **CLOSE)


def test_generate_prefills_in_chunks() -> None:
    model, (ids, mask, _) = build(), left_padded(LENGTHS)
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=4), expected)


def test_a_cache_goes_on_in_a_second_generate() -> None:
    model, ids = build(), random_ids(7)[None]
    cache = DynamicCache(config=model.config)
    first = generate(model, ids, past_key_values=cache)
    longer = torch.cat([first, random_ids(4, seed=1)[None]], dim=1)
    assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))


def test_a_reset_cache_is_a_new_one() -> None:
    model, ids = build(()), random_ids(14).view(2, 7)
    cache = DynamicCache(config=model.config)
    first = no_grad_logits(model, ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(no_grad_logits(model, ids, past_key_values=cache), first)


def test_state_is_fp32_in_a_bf16_model() -> None:
    model, ids = build().to(torch.bfloat16), random_ids(14).view(2, 7)
    with torch.no_grad():
        output = model(ids)
    layers = output.past_key_values.layers
    assert output.logits.dtype == torch.bfloat16
    assert [layers[i].recurrent_states[0].dtype for i in (0, 1, 3)] == [torch.float32] * 3
    assert layers[2].keys.dtype == torch.bfloat16
    assert all(layers[i].has_previous_state[0] for i in (0, 1, 3))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_save_pretrained_then_auto_class_gives_the_same_bits(tied: bool, tmp_path: Path) -> None:
    model = build((1, 3), tie_word_embeddings=tied, qk_norm=True)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is HybridForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = random_ids(14).view(2, 7)
    assert torch.equal(no_grad_logits(again, ids), no_grad_logits(model, ids))
    assert torch.equal(generate(again, ids), generate(model, ids))


def test_from_pretrained_in_bf16(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in half.state_dict().items())
    ids = random_ids(7)[None]
    assert torch.equal(no_grad_logits(half, ids), no_grad_logits(model.to(torch.bfloat16), ids))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_directories_are_the_same_for_both_loaders(tied: bool, tmp_path: Path) -> None:
    core, ids = hybrid_model(tie_word_embeddings=tied), random_ids(7)
    save_model(core, tmp_path / "ours", companions=tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(no_grad_logits(opened, ids[None])[0], logits_of(core, ids, [7]))
    opened.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    assert torch.equal(logits_of(load_model(tmp_path / "theirs"), ids, [7]), logits_of(core, ids, [7]))
    assert json.loads((tmp_path / "theirs/config.json").read_text())["architectures"] == ["HybridForCausalLM"]


def test_a_teacher_opens_without_a_copy_and_generates_as_in_its_own_class(tmp_path: Path) -> None:
    teacher = hf_teacher(tmp_path / "teacher", "qwen3", changes={"eos_token_id": None})
    core = load_model(tmp_path / "teacher")
    model, ids = HybridForCausalLM.from_core(core), random_ids(7)
    assert model.model is core.model
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(no_grad_logits(model, ids[None])[0], hf_logits(teacher, ids, [7]), **CLOSE)
    assert torch.equal(generate(model, ids[None]), generate(teacher, ids[None]))


def test_loss_is_the_cross_entropy_of_the_next_labels() -> None:
    model, (ids, mask, _) = build(), left_padded(LENGTHS)
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=5).loss
    torch.testing.assert_close(summed * 5, expected * (labels[:, 1:] != -100).sum())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = random_ids(14).view(2, 7)
    gradients = []
    for enabled in (False, True):
        model = build().train()
        if enabled:
            model.gradient_checkpointing_enable()
        assert model.model.gradient_checkpointing == enabled
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    unread = {f"model.layers.0.self_attn.{name}" for name in ("v0", "v1", "v2", "k0", "k1", "k2")}
    assert {name for name, gradient in plain.items() if gradient is None} == unread
    for name in plain.keys() - unread:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7)


def test_hidden_states_are_what_enters_each_layer_and_the_end(model: HybridForCausalLM) -> None:
    ids, mask, _ = left_padded(LENGTHS)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
    real, states = mask.bool(), output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0][real], model.get_input_embeddings()(ids)[real])
    assert torch.equal(model.lm_head(states[-1])[real], output.logits[real])


def test_kept_logits_and_tuples_are_parts_of_the_whole() -> None:
    model, ids = build(), random_ids(14).view(2, 7)
    whole = no_grad_logits(model, ids)
    torch.testing.assert_close(no_grad_logits(model, ids, logits_to_keep=2), whole[:, -2:])
    torch.testing.assert_close(
        no_grad_logits(model, ids, logits_to_keep=torch.tensor([0, 4])), whole[:, [0, 4]]
    )
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], whole)


def test_lora_trains_saves_reloads_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["receptance", "key", "value", "output", "q_proj", "k_proj", "v_proj", "o_proj"]
    ids = random_ids(14).view(2, 7)
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(build().train(), lora)
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    before = wrapped(ids, labels=ids).loss
    before.backward()
    optimiser.step()
    wrapped.eval()
    trained = no_grad_logits(wrapped, ids)
    assert wrapped(ids, labels=ids).loss < before
    wrapped.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(no_grad_logits(reloaded, ids), trained)
    assert torch.equal(generate(reloaded, ids), generate(wrapped, ids))
    merged = reloaded.merge_and_unload()
    assert type(merged) is HybridForCausalLM
    torch.testing.assert_close(no_grad_logits(merged, ids), trained, **CLOSE)


@pytest.mark.parametrize(
    ("variant", "own"), [("hxa079", ("r_k",)), ("hxa07a", ()), ("hxa07c", ("v1",)), ("radlads", ())]
)
def test_a_model_from_a_config_learns_in_every_layer(variant: str, own: tuple[str, ...]) -> None:
    config = hybrid_config(eos_token_id=None, variant=variant)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is HybridForCausalLM
    mixers = [module for module in model.modules() if isinstance(module, TimeMix)]
    assert len(mixers) == 3
    model(random_ids(7)[None], labels=random_ids(7)[None]).loss.backward()
    for name in ("w0", "w1", "a1", "g1", "g2", "receptance.weight", *own):
        assert all(mixer.get_parameter(name).grad.abs().sum() > 0 for mixer in mixers), name


def expect_refusal(message: str, model: HybridForCausalLM, ids: Tensor, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=message):
        no_grad_logits(model, ids, **arguments)


def test_calls_that_a_cache_cannot_hold_are_refused() -> None:
    model, ids = build(), random_ids(14).view(2, 7)
    hole = torch.ones_like(ids).index_fill(1, torch.tensor([3]), 0)
    expect_refusal("padding behind a token", model, ids, attention_mask=hole)
    expect_refusal(r"shape \[2, 6\], expected \[2, 7\]", model, ids, attention_mask=hole[:, :6])
    expect_refusal(r"expected \[2, 7\]", model, ids, attention_mask=torch.ones(2, 1, 7, 7))
    expect_refusal("config=model.config", model, ids, past_key_values=DynamicCache())
    cache = DynamicCache(config=model.config)
    no_grad_logits(model, ids, past_key_values=cache)
    expect_refusal(r"expected \[2, 8\]", model, ids[:, :1], past_key_values=cache, attention_mask=hole)
    padded = F.pad(torch.ones_like(ids), (0, 1))
    expect_refusal("pad on the left", model, ids[:, :1], past_key_values=cache, attention_mask=padded)
    expect_refusal("holds 2 rows, the call brings 1", model, ids[:1], past_key_values=cache)
    offloaded = DynamicCache(config=model.config, offloading=True)
    expect_refusal("in place", model, ids, past_key_values=offloaded)


def test_a_static_cache_that_is_full_is_refused() -> None:
    model, ids = build(), random_ids(14).view(2, 7)
    cache = StaticCache(model.config, max_cache_len=6)
    expect_refusal("holds 6 tokens, the call needs 7", model, ids, past_key_values=cache)


def test_other_impossible_calls_are_refused() -> None:
    model, ids = build(), random_ids(7)[None]
    expect_refusal("not both", model, ids, inputs_embeds=torch.zeros(1, 7, 24))
    expect_refusal("no attention map", model, ids, output_attentions=True)
    with pytest.raises(ValueError, match="no gradient"):
        model(ids, labels=ids, use_cache=True)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids, assistant_model=build(()))


@pytest.mark.parametrize(
    "first",
    ["import hrwkv", "from transformers import AutoModelForCausalLM\nimport hrwkv"],
    ids=["before-transformers", "after-transformers"],
)
def test_import_registers_the_auto_classes(first: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    code = (
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "import sys\n"
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)\n"
    )
    run = run_python(f"{first}\n{code}", str(tmp_path))
    assert run.stdout.split() == ["HybridConfig", "HybridForCausalLM"], run.stderr


def test_import_alone_loads_neither_torch_nor_transformers() -> None:
    run = run_python("import hrwkv, sys\nprint([n for n in ('torch', 'transformers') if n in sys.modules])")
    assert run.stdout.strip() == "[]", run.stderr


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
