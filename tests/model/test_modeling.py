import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from hrwkv.layers import common
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.cache import HybridCache
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel, Keep
from tests.builders import cached_batch, hybrid_model, logits_of, random_ids

REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "hxa079_tiny"
# RWKV-Infer's names -> ours, in this order.
RENAMES = [
    (r"^blocks\.", "model.layers."),
    (r"\.att\.", ".self_attn."),
    (r"\.ffn\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.ln1\.", ".input_layernorm."),
    (r"\.ln2\.", ".post_attention_layernorm."),
    (r"^ln_out\.", "model.norm."),
    (r"^emb\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
]
MODELS = {
    "hybrid": {"attention_layers": (2,)},
    "hybrid-qwen3": {"attention_layers": (1, 3), "qk_norm": True},
    "hybrid-qwen2": {"attention_layers": (1,), "attention_bias": True, "attention_output_bias": True},
    "hybrid-rope": {"attention_layers": (3,), "attention_rope": True},
    "pure-rwkv": {"attention_layers": ()},
    "hybrid-nope": {"attention_layers": (2,), "linear_rope": False},
    "hxa07a": {"attention_layers": (0, 2), "variant": "hxa07a", "attention_bias": True},
    "hxa07c": {"attention_layers": (2,), "variant": "hxa07c"},
    "radlads": {"attention_layers": (), "variant": "radlads", "qk_norm": True},
    "teacher": {"attention_layers": (0, 1, 2, 3)},
}
# Layer 0 has no residual to itself, so its gates are the only parameters without a gradient.
UNREAD = {
    "hxa079": ("v0", "v1", "v2", "k0", "k1", "k2"),
    "hxa07a": (),
    "hxa07c": (),
    "radlads": ("v0", "v1", "v2"),
}


def reference_model() -> HybridModel:
    """The random checkpoint in RWKV-Infer's form, sizes taken from its tensors."""
    weights = torch.load(REFERENCE / "model.pth", map_location="cpu", weights_only=True)
    num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    heads, size = weights["blocks.0.att.r_k"].shape
    kinds = [FULL if f"blocks.{i}.att.q_proj.weight" in weights else LINEAR for i in range(num_layers)]
    ranks = {"decay": "w1", "iclr": "a1", "value": "v1", "key": "k1", "gate": "g1"}
    config = HybridConfig(
        vocab_size=weights["emb.weight"].shape[0],
        hidden_size=weights["emb.weight"].shape[1],
        intermediate_size=weights["blocks.0.ffn.gate.weight"].shape[0],
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=weights["blocks.0.att.key.weight"].shape[0] // size,
        head_dim=size,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 8e6},
        layer_types=kinds,
        attention_rope=False,
        **{f"{name}_rank": weights[f"blocks.0.att.{key}"].shape[1] for name, key in ranks.items()},
    )
    renamed = {}
    for name, tensor in weights.items():
        if not name.endswith(("layer_architecture", "head_size_record")):
            for pattern, new in RENAMES:
                name = re.sub(pattern, new, name)
            renamed[name] = tensor.float().flatten() if tensor.dim() == 3 else tensor.float()
    model = HybridModel(config)
    model.load_state_dict(renamed)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference logits lie outside the repository")
class TestReference:
    """RWKV-Infer's own logits, computed in bf16 on a GPU: its rounding is the 1.3 % that are left."""

    def test_one_forward(self) -> None:
        expected = torch.load(REFERENCE / "expected.pt", weights_only=True)
        ids, theirs = expected["ids"][0].long(), expected["logits"][0].float()
        assert relative_error(logits_of(reference_model(), ids, [len(ids)]), theirs) < 0.02

    def test_token_by_token(self) -> None:
        expected = torch.load(REFERENCE / "expected.pt", weights_only=True)
        ids, theirs = expected["ids"][0].long(), expected["logits"][0].float()
        model = reference_model()
        cache = HybridCache.allocate(model.config, slots=3, blocks=8, block_size=16)
        rows = []
        with torch.no_grad():
            for position, token in enumerate(ids.split(1)):
                batch = cached_batch(
                    [range(position, position + 1)], slots=[1], blocks=[[7, 3, 5, 1, 0, 2]], block_size=16
                )
                rows.append(model.compute_logits(model(token, batch, cache)))
        assert relative_error(torch.cat(rows), theirs) < 0.02


@pytest.mark.parametrize("case", MODELS)
def test_packed_is_one_at_a_time(case: str) -> None:
    model = hybrid_model(**MODELS[case])
    lengths = [13, 1, 0, 40, 16]
    ids = random_ids(sum(lengths))
    alone = [logits_of(model, part, [len(part)]) for part in ids.split(lengths) if len(part)]
    torch.testing.assert_close(logits_of(model, ids, lengths), torch.cat(alone), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", MODELS)
def test_prefill_in_pieces_then_decode_is_one_forward(case: str) -> None:
    """Three sequences of different lengths, scattered over slots and blocks that hold someone's rubbish."""
    model = hybrid_model(**MODELS[case])
    slots, blocks, size = [4, 0, 2], [[9, 1, 6, 3], [2, 8], [7, 0, 5]], 5
    ids = [random_ids(length, seed=length) for length in (19, 10, 12)]
    # Columns: what each of the three sequences brings in one forward; the last three rounds are decode steps.
    rounds = [(7, 1, 4), (1, 3, 5), (8, 3, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)]
    cache = HybridCache.allocate(model.config, slots=5, blocks=10, block_size=size)
    for memory in (*cache.k_cache, *cache.v_cache):
        memory.fill_(1e4)
    for state in cache.state:
        state.fill_(1e4)
        state[slots] = 0
    done, parts = [0, 0, 0], [[], [], []]
    with torch.no_grad():
        for counts in rounds:
            pieces = [range(start, start + count) for start, count in zip(done, counts, strict=True)]
            batch = cached_batch(pieces, slots=slots, blocks=blocks, block_size=size)
            tokens = torch.cat(
                [row[piece.start : piece.stop] for row, piece in zip(ids, pieces, strict=True)]
            )
            for part, logits in zip(
                parts, model.compute_logits(model(tokens, batch, cache)).split(counts), strict=True
            ):
                part.append(logits)
            done = [piece.stop for piece in pieces]
    assert done == [len(row) for row in ids]
    for row, part in zip(ids, parts, strict=True):
        torch.testing.assert_close(torch.cat(part), logits_of(model, row, [len(row)]), atol=3e-5, rtol=1e-5)
    for state in cache.state:
        assert (state[[1, 3]] == 1e4).all(), "a slot of nobody was written"


def test_cached_sequences_do_not_see_each_other() -> None:
    model = hybrid_model()
    first, other = random_ids(8, seed=1), random_ids(8, seed=2)
    outputs = []
    for neighbour in (other, first):
        cache = HybridCache.allocate(model.config, slots=2, blocks=4, block_size=4)
        batch = cached_batch([range(8), range(8)], slots=[1, 0], blocks=[[3, 0], [1, 2]], block_size=4)
        with torch.no_grad():
            outputs.append(model(torch.cat([first, neighbour]), batch, cache)[:8])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("variant", UNREAD)
@pytest.mark.parametrize("frozen", [(), ("mlp", "embed_tokens")], ids=["all-train", "mlp-frozen"])
def test_gradient_checkpointing_gives_the_same_gradients(frozen: tuple[str, ...], variant: str) -> None:
    """Reentrant checkpointing around frozen parameters gave silently wrong gradients elsewhere."""
    model = hybrid_model(variant=variant)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    gradients = []
    for keep in (None, *get_args(Keep)):
        model.train()
        model.model.gradient_checkpointing = keep is not None
        model.model.keep = keep or "nothing"
        model.zero_grad()
        logits = model.compute_logits(model(random_ids(30), TokenBatch.from_lengths([11, 19])))
        logits.log_softmax(-1)[:, 3].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unread = {f"model.layers.0.self_attn.{name}" for name in UNREAD[variant]}
    assert gradients[0].keys() == trained - unread
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("keep", [None, "stream"])
def test_the_forms_of_a_gpu_give_the_same_stream_and_gradients(
    keep: Keep | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms with the sums before them and the MLP's gate as one kernel each, around all that stays."""
    model = hybrid_model().train()
    model.model.gradient_checkpointing, model.model.keep = keep is not None, keep or "nothing"
    found = []
    for names in ((), ("norm.rms_norm", "norm.add_rms_norm", "swiglu.swiglu")):
        for kernel, name in (path.split(".") for path in names):
            fused = pytest.importorskip(f"hrwkv.kernels.{kernel}.fused")
            monkeypatch.setattr(common, name, getattr(fused, name))
        model.zero_grad()
        ids, batch = random_ids(12), TokenBatch.from_lengths([5, 7])
        stream: list[Tensor] = []
        with torch.no_grad():
            model(ids, batch, stream=stream)
        hidden = model(ids, batch)
        model.compute_logits(hidden).log_softmax(-1)[:, 3].sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([hidden.detach(), *stream, *gradients])
    assert len(found[0]) == len(found[1])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # fp32 through four layers and back


def test_each_choice_of_what_is_kept_keeps_less_than_the_next() -> None:
    """Bytes that autograd holds after a forward pass; every choice between nothing and everything differs."""
    model = hybrid_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name and "embed_tokens" not in name)
    kept = []
    for keep in (*get_args(Keep), None):
        model.model.gradient_checkpointing = keep is not None
        model.model.keep = keep or "nothing"
        alive: dict[int, int] = {}

        def pack(x: Tensor, alive: dict[int, int] = alive) -> Tensor:
            alive[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = model(random_ids(30), TokenBatch.from_lengths([11, 19]))
        kept.append(sum(alive.values()))
        del hidden
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(("variant", "name"), [("hxa079", "key"), ("hxa079", "value"), ("radlads", "value")])
def test_gradients_of_later_layers_reach_layer_0(variant: str, name: str) -> None:
    """With layer 0's own output cut off, its key and value learn through later layers' residuals."""
    model = hybrid_model(attention_layers=(2,), variant=variant)
    first = model.model.layers[0]
    first.self_attn.output.weight.data.zero_()
    first.self_attn.output.weight.requires_grad_(False)
    logits = model.compute_logits(model(random_ids(20), TokenBatch.from_lengths([9, 11])))
    logits.square().sum().backward()
    projection = getattr(first.self_attn, name).weight
    assert projection.grad.norm() > 1e-3 * projection.norm()


def test_the_first_value_and_key_come_from_layer_0_alone() -> None:
    model = hybrid_model(attention_layers=(1,))
    batch = TokenBatch.from_lengths([6])
    hidden, rope = model.model.embed_tokens(random_ids(6)), model.model.rope(batch)
    seen = []
    delta, first = None, None
    for block in model.model.layers:
        hidden, delta, first = block(hidden, batch, rope, first, delta=delta)
        seen.append(first)
    assert all(value is seen[0][0] and key is seen[0][1] for value, key in seen)


@pytest.mark.parametrize("linear_rope", [True, False], ids=["rope", "nope"])
def test_linear_rope_decides_whether_rwkv_layers_see_a_position(linear_rope: bool) -> None:
    ids = random_ids(9)
    near, far = (
        logits_of(
            hybrid_model(
                linear_rope=linear_rope, rope_parameters={"rope_type": "default", "rope_theta": theta}
            ),
            ids,
            [9],
        )
        for theta in (100.0, 1e6)
    )
    assert torch.equal(near, far) == (not linear_rope)


def test_a_tied_head_is_the_embedding() -> None:
    tied = hybrid_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert hybrid_model().lm_head.weight is not hybrid_model().model.embed_tokens.weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_unread_parameters_are_those_without_a_gradient(variant: str) -> None:
    model = hybrid_model(variant=variant).train()
    model.compute_logits(model(random_ids(9), TokenBatch.from_lengths([9]))).square().sum().backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == model.config.unread_parameters
