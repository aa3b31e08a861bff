"""Fused products against the separate ones: same numbers, same parameters, same memory, never stale."""

from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hrwkv.layers import projections, time_mix
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.projections import Projections
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.cache import HybridCache
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.model.modeling import HybridModel
from tests.builders import cached_batch, hybrid_model, logits_of, random_ids

LENGTHS = (7, 1, 19)
IDS = random_ids(sum(LENGTHS))
# fp32 sums of 24 products in another order, through four layers; in parts of the largest logit.
TOLERANCE = 5e-6
GPU_TOLERANCE = 5e-5  # exp2 and rsqrt are a few last places off, and sums are in other orders
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "biases": BIASES,
    "qk-norm-biases": {"qk_norm": True, **BIASES},
    "mlp-bias-alone": {"mlp_bias": True},
}
PRODUCTS = ("mm", "addmm", "bmm", "addmv", "mv")


class Counted(TorchDispatchMode):
    """Counts the operations inside by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.calls[name] for name in PRODUCTS)


class Alive(TorchDispatchMode):
    """The most bytes at a time of these pieces of memory and of those that concatenations make."""

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self.pieces = [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]
        self.peak = 0

    def num_bytes(self) -> int:
        return sum(size for piece, size in self.pieces if not piece.expired())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.cat:
            self.pieces.append((StorageWeakRef(result.untyped_storage()), result.untyped_storage().nbytes()))
            self.peak = max(self.peak, self.num_bytes())
        return result


def both(attention_layers: tuple[int, ...] = (2,), **changes: Any) -> tuple[HybridModel, HybridModel]:
    """The same model, apart and fused."""
    apart, fused = (hybrid_model(attention_layers, **changes) for _ in range(2))
    fused.fuse_projections()
    return apart, fused


def assert_same_logits(fused: HybridModel, apart: HybridModel, ids: Tensor = IDS) -> None:
    lengths = LENGTHS if ids is IDS else [len(ids)]
    ours, theirs = logits_of(fused, ids, lengths), logits_of(apart, ids, lengths)
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()


def storage_bytes(model: HybridModel) -> int:
    """Bytes of all memory behind the parameters and what is fused, each piece once."""
    tensors = list(model.parameters())
    for module in model.modules():
        if isinstance(module, Projections) and module._fused is not None:
            tensors += [x for x in (module._fused.weight, module._fused.bias) if x is not None]
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(pieces.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_products_are_the_separate_ones(variant: str, case: str) -> None:
    apart, fused = both(variant=variant, **CASES[case])
    assert_same_logits(fused, apart)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_factors_in_one_launch_too(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that a GPU takes, in Triton's interpreter where there is none."""
    fused_form = pytest.importorskip("hrwkv.kernels.low_rank.fused")
    apart, fused = both(variant=variant)
    expected = logits_of(apart, IDS, LENGTHS)
    monkeypatch.setattr(time_mix, "expand", fused_form.expand)
    assert (logits_of(fused, IDS, LENGTHS) - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu(variant: str, case: str) -> None:
    """Pieces of prompts of two lengths, then two decode steps of both."""
    apart, fused = (
        model.cuda()
        for model in (hybrid_model(variant=variant, head_dim=32, **CASES[case]) for _ in range(2))
    )
    fused.fuse_projections()
    results = []
    for model in (apart, fused):
        cache = HybridCache.allocate(model.config, slots=2, blocks=6, block_size=16, device="cuda")
        rows = []
        for pieces in ([range(9), range(5)], [range(9, 10), range(5, 6)], [range(10, 11), range(6, 7)]):
            batch = cached_batch(pieces, slots=[0, 1], blocks=[[0], [1]], block_size=16)
            batch = replace(
                batch, **{name: x.cuda() for name, x in vars(batch).items() if isinstance(x, Tensor)}
            )
            with torch.no_grad():
                rows.append(model(random_ids(sum(batch.lengths)).cuda(), batch, cache))
        results.append(torch.cat(rows))
    theirs, ours = results
    assert (ours - theirs).norm() < GPU_TOLERANCE * theirs.norm()


@pytest.mark.parametrize("case", ["plain", "qk-norm-biases"])
def test_a_teacher_too(case: str) -> None:
    apart, fused = both((0, 1, 2, 3), **CASES[case])
    assert_same_logits(fused, apart)


@pytest.mark.parametrize(
    ("variant", "before", "after"),
    [("hxa079", 13, 6), ("hxa07a", 9, 4), ("hxa07c", 11, 5), ("radlads", 11, 5)],
)
@torch.no_grad()
def test_a_mixer_multiplies_its_input_once(variant: str, before: int, after: int) -> None:
    """Beside it are the second factors; the output projection is not counted, the first layer's gates are."""
    for fuses, expected in ((False, before), (True, after)):
        mixer = hybrid_model((), variant=variant).model.layers[1].self_attn
        if fuses:
            mixer.fuse_projections()
        with Counted() as counted:
            mixer._project(torch.randn(1, 24), in_first=False)
        assert counted.products == expected


@pytest.mark.parametrize(("layer", "before", "after"), [("self_attn", 4, 2), ("mlp", 3, 2)])
@torch.no_grad()
def test_attention_and_mlp_multiply_their_input_once(layer: str, before: int, after: int) -> None:
    x, batch = torch.randn(1, 24), TokenBatch.from_lengths([1])
    arguments = (x, batch) if layer == "self_attn" else (x,)
    for fuses, expected in ((False, before), (True, after)):
        module = hybrid_model((2,)).model.layers[2].get_submodule(layer)
        if fuses:
            module.fuse_projections()
        with Counted() as counted:
            module(*arguments)
        assert sum(counted.calls[name] for name in ("mm", "addmm")) == expected  # attention's own are no mm


@torch.no_grad()
def test_many_tokens_are_multiplied_apart() -> None:
    """What reads a view of a wide product may copy it, which a prompt's products would pay for nothing."""
    mlp = hybrid_model().model.layers[0].mlp
    mlp.fuse_projections()
    for count, expected in ((projections.FEW_TOKENS, 2), (projections.FEW_TOKENS + 1, 3)):
        with Counted() as counted:
            mlp(torch.randn(count, 24))
        assert counted.products == expected


@pytest.mark.parametrize("case", CASES)
def test_parameters_stay_and_share_the_memory(case: str) -> None:
    apart, fused = hybrid_model(**CASES[case]), hybrid_model(**CASES[case])
    own = dict(fused.named_parameters())
    fused.fuse_projections()
    assert all(own[name] is parameter for name, parameter in fused.named_parameters())
    assert list(fused.state_dict()) == list(apart.state_dict())
    for name, value in apart.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name
    # The zeros beside r, k and v's biases are all that comes on top: a row of ranks in fp32, three layers.
    zeros = 3 * (5 + 4 + 3 + 3 + 6) * 4 if "attention_bias" in CASES[case] else 0
    assert storage_bytes(fused) == storage_bytes(apart) + zeros


def test_one_layer_at_most_is_held_twice() -> None:
    model = hybrid_model()
    before = storage_bytes(model)
    with Alive(parameter.untyped_storage() for parameter in model.parameters()) as alive:
        model.fuse_projections()
    widest = max(module._fused.weight.nbytes for module in model.modules() if isinstance(module, Projections))
    assert before < alive.peak <= before + widest
    assert alive.num_bytes() == before


def test_fusing_again_moves_nothing() -> None:
    _, fused = both()
    before = {name: parameter.data_ptr() for name, parameter in fused.named_parameters()}
    fused.fuse_projections()
    assert {name: parameter.data_ptr() for name, parameter in fused.named_parameters()} == before


def test_loading_into_a_fused_model_loads_what_is_multiplied() -> None:
    _, fused = both()
    other = hybrid_model(seed=1)
    fused.load_state_dict(other.state_dict())
    assert_same_logits(fused, other)


def converted(model: HybridModel) -> HybridModel:
    return model.to(torch.float64)


def assigned(model: HybridModel) -> HybridModel:
    model.load_state_dict(hybrid_model(seed=1).state_dict(), assign=True)
    return model


def pointed_elsewhere(model: HybridModel) -> HybridModel:
    model.model.layers[0].self_attn.key.weight.data = torch.ones(16, 24)
    return model


def replaced(model: HybridModel) -> HybridModel:
    model.model.layers[0].self_attn.w1 = nn.Parameter(torch.ones(24, 5))
    return model


@pytest.mark.parametrize("change", [converted, deepcopy, assigned, pointed_elsewhere, replaced])
def test_parameters_with_memory_of_their_own_are_refused_until_they_are_fused(
    change: Callable[[HybridModel], HybridModel],
) -> None:
    changed = change(both()[1])
    with pytest.raises(RuntimeError, match=r"after it was fused: call fuse_projections\(\) again"):
        logits_of(changed, IDS, LENGTHS)
    apart = hybrid_model().to(changed.lm_head.weight.dtype)
    apart.load_state_dict(changed.state_dict())
    changed.fuse_projections()
    assert_same_logits(changed, apart)


def test_with_gradients_products_are_apart_and_a_step_moves_what_is_multiplied() -> None:
    apart, fused = both(**BIASES)
    for model in (apart, fused):
        logits = model.compute_logits(model(IDS, TokenBatch.from_lengths(LENGTHS)))
        logits.square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for model in (fused, apart)
    )
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()
    assert_same_logits(fused, apart)


def test_a_fused_model_is_saved_as_it_was(tmp_path: Path) -> None:
    apart, fused = both(**BIASES)
    (tmp_path / "from").mkdir()
    save_model(fused, tmp_path / "out", companions=tmp_path / "from")
    saved = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(saved.pop(name), value) for name, value in apart.state_dict().items())
    assert not saved


def test_mixed_dtypes_are_refused_and_change_nothing() -> None:
    mixer = hybrid_model().model.layers[0].self_attn
    mixer.a1.data = mixer.a1.data.double()
    before = mixer.key.weight.data_ptr()
    with pytest.raises(
        ValueError, match="are torch.float32 on cpu and torch.float64 on cpu, expected one kind"
    ):
        mixer.fuse_projections()
    assert mixer.key.weight.data_ptr() == before
