import math

import pytest
import torch

from hrwkv.convert.initialise import copy_factors, initial_value, rank_sizes, tensor_generator
from hrwkv.model.config import RANKS, HybridConfig
from hrwkv.settings import ConvertSettings
from tests.builders import hybrid_config

HXA079 = ConvertSettings(keep_attention=0)
RADLADS = ConvertSettings(keep_attention=0, initialisation="radlads")

# Published sizes: hidden size, heads, head size -> decay, iclr, value, key, gate.
PUBLISHED = {
    "qwen3-0.6b": ((1024, 16, 128), (256, 96, 64, 64, 256)),
    "qwen3-1.7b": ((2048, 16, 128), (256, 96, 64, 64, 256)),
    "qwen3-4b": ((2560, 32, 128), (256, 128, 96, 96, 256)),
    "llama-8b": ((4096, 32, 128), (256, 128, 96, 96, 256)),
    "qwen3-14b": ((5120, 40, 128), (288, 128, 96, 96, 320)),
    "qwen3-32b": ((5120, 64, 128), (384, 160, 128, 128, 480)),
    "reka-flash-3": ((6144, 64, 96), (320, 128, 96, 96, 384)),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_sizes_are_those_of_the_published_models(model: str) -> None:
    (hidden, heads, size), ranks = PUBLISHED[model]
    config = HybridConfig(hidden_size=hidden, num_attention_heads=heads, head_dim=size, num_hidden_layers=2)
    assert tuple(rank_sizes(config, HXA079).values()) == ranks
    assert tuple(rank_sizes(config, HXA079)) == RANKS


def test_sizes_that_are_given_win() -> None:
    config = hybrid_config()
    given = ConvertSettings(keep_attention=0, decay_rank=7, gate_rank=3)
    assert rank_sizes(config, given) == {**rank_sizes(config, HXA079), "decay_rank": 7, "gate_rank": 3}


def test_sizes_of_the_radlads_paper_follow_the_hidden_size() -> None:
    config = HybridConfig(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=2
    )
    expected = {
        name: max(1, round(3584**exponent * factor / 32)) * 32
        for name, exponent, factor in zip(
            RANKS, (0.5, 0.5, 0.5, 0.5, 0.8), (1.8, 1.8, 1.3, 1.3, 0.6), strict=True
        )
    }
    assert rank_sizes(config, RADLADS) == expected
    assert set(rank_sizes(hybrid_config(), RADLADS).values()) == {32}, "no minimum above one step of 32"


def published_w0(n: int, layer: int, *, width: int, size: int, layers: int) -> float:
    """The published loop over channels, one channel of it."""
    ratio = layer / (layers - 1)
    www = -6 + 6 * (n / (width - 1)) ** (1 + ratio**0.3)
    z = ((n % size) - (size - 1) / 2) / ((size - 1) / 2)
    return www + 0.5 + z * abs(z) * 2.5


def published_a0(n: int, *, width: int, size: int) -> float:
    z = ((n % size) - (size - 1) / 2) / ((size - 1) / 2)
    return -0.19 + z * abs(z) * 0.3 + (n / (width - 1) - 0.5) * 0.4


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_decay_and_rate_are_the_published_loops(layer: int) -> None:
    config = hybrid_config()
    sizes = {"width": 32, "size": 8}
    w0 = initial_value("w0", (32,), layer=layer, config=config, settings=HXA079)
    a0 = initial_value("a0", (32,), layer=layer, config=config, settings=HXA079)
    expected_w0 = torch.tensor([published_w0(n, layer, **sizes, layers=4) for n in range(32)])
    expected_a0 = torch.tensor([published_a0(n, **sizes) for n in range(32)])
    torch.testing.assert_close(w0, expected_w0, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(a0, expected_a0, atol=1e-6, rtol=1e-6)
    assert w0.min() >= -8
    assert w0.max() <= 3
    assert w0[0] == pytest.approx(-8)
    assert w0[-1] == pytest.approx(3)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_decay_of_the_radlads_paper(layer: int) -> None:
    w0 = initial_value("w0", (32,), layer=layer, config=hybrid_config(), settings=RADLADS)
    power = 0.85 + math.sqrt(layer / 3)
    expected = torch.tensor([-7 + 5 * (n / 31) ** power + 0.5 for n in range(32)])
    torch.testing.assert_close(w0, expected, atol=2e-6, rtol=1e-6)


def test_a_model_of_one_layer_has_finite_values() -> None:
    config = hybrid_config(attention_layers=(), num_hidden_layers=1)
    for settings in (HXA079, RADLADS):
        assert initial_value("w0", (32,), layer=0, config=config, settings=settings).isfinite().all()


GIVEN = ConvertSettings(keep_attention=1, residual_logit=-2.0)
CONSTANTS = {
    "residual given": (GIVEN, {"v0": -2.0, "k0": -2.0, "r_k": -0.04}),
    "hxa079": (HXA079, {"v0": 0.73, "k0": 0.73, "r_k": -0.04}),
    "radlads": (RADLADS, {"v0": 1.0, "k0": 1.0, "r_k": 0.0, "a0": 0.0}),
}


@pytest.mark.parametrize("recipe", CONSTANTS)
def test_constants_and_zero_first_factors(recipe: str) -> None:
    settings, constants = CONSTANTS[recipe]
    expected = {**constants, **dict.fromkeys(("w1", "a1", "v1", "k1", "g1"), 0.0)}
    for name, value in expected.items():
        tensor = initial_value(name, (4, 8), layer=1, config=hybrid_config(), settings=settings)
        assert torch.equal(tensor, torch.full((4, 8), value)), name


@pytest.mark.parametrize("shape", [(5, 32), (32, 5), (8, 8)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("name", ["w2", "a2", "v2", "k2", "g2"])
def test_second_factors_are_orthogonal(name: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    matrix = initial_value(name, shape, layer=1, config=hybrid_config(), settings=HXA079)
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    square = 0.01 * max(rows / columns, 1)
    torch.testing.assert_close(gram, square * torch.eye(min(shape)), atol=1e-6, rtol=1e-5)


def test_every_random_tensor_has_its_own_stream() -> None:
    config = hybrid_config()

    def draw(name: str, layer: int, seed: int) -> torch.Tensor:
        settings = ConvertSettings(keep_attention=0, seed=seed)
        return initial_value(name, (5, 32), layer=layer, config=config, settings=settings)

    assert torch.equal(draw("w2", 1, 0), draw("w2", 1, 0))
    others = [draw("g2", 1, 0), draw("w2", 2, 0), draw("w2", 1, 1)]
    assert not any(torch.equal(draw("w2", 1, 0), other) for other in others)
    assert tensor_generator(0, layer=11, name="w2").initial_seed() >= 0


def test_a_fresh_gate_is_nearly_closed() -> None:
    """g1 = 0 makes the gate half of g2's column sums: small, of both signs, so the output starts near 0."""
    config = hybrid_config()
    g2 = initial_value("g2", (6, 32), layer=1, config=config, settings=HXA079)
    x = torch.randn(3, 24)
    gate = torch.sigmoid(x @ torch.zeros(24, 6)) @ g2
    torch.testing.assert_close(gate, 0.5 * g2.sum(0).expand(3, -1))
    assert gate.abs().max() < 0.3
    assert gate.min() < 0 < gate.max()


def test_factors() -> None:
    assert copy_factors(HXA079) == {"receptance": 0.5, "key": 0.5, "value": 0.3, "output": 0.5}
    assert set(copy_factors(RADLADS).values()) == {1.0}
    given = ConvertSettings(keep_attention=0, initialisation="radlads", value_factor=0.25)
    assert copy_factors(given) == {"receptance": 1.0, "key": 1.0, "value": 0.25, "output": 1.0}
