import itertools
import math
import zlib
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats

from fewstep.diffusion.draws import Draws, Purpose
from fewstep.diffusion.philox import MASK, philox

PURPOSES = get_args(Purpose)


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers, written from the paper's definition."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            second // 2**32 ^ c[1] ^ k0,
            second % 2**32,
            first // 2**32 ^ c[3] ^ k1,
            first % 2**32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def python_words(seed: int, step: int, position: int, purpose: str, block: int) -> list[int]:
    counter = [block + (position // 2**32 << 20), position % 2**32, step, zlib.crc32(purpose.encode())]
    return python_philox(counter, [seed % 2**32, seed // 2**32])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """kat_vectors of the Random123 distribution."""
    words = philox(tuple(torch.tensor([c]) for c in counter), *key)
    assert [int(word) for word in words] == expected
    numbers = (np.array([c], dtype=np.int64) for c in counter)
    words = philox(tuple(numbers), *(np.array([k], dtype=np.int64) for k in key))
    assert np.concatenate(words).tolist() == expected
    assert python_philox(counter, key) == expected


@pytest.mark.parametrize("seed", [0, 3, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 2**32 - 1, 2**32 + 1, 2**40])
def test_every_kind_of_draw_against_python_numbers(seed: int, position: int) -> None:
    draws = Draws(seed, 12, torch.tensor([position]))
    first = python_words(seed, 12, position, "dm_noise", 0)
    assert draws.integers("dm_noise", -5, 1000).item() == -5 + first[0] * 1005 // 2**32
    assert draws.uniform("dm_noise").item() == pytest.approx((first[0] // 512 + 0.5) / 2**23, rel=1e-6)
    normal = draws.normal("dm_noise", (3, 2)).flatten().tolist()
    expected = []
    for block in range(2):
        u = [(word + 0.5) / 2**32 for word in python_words(seed, 12, position, "dm_noise", block)]
        radius = [math.sqrt(-2 * math.log(u[0])), math.sqrt(-2 * math.log(u[1]))]
        angle = [2 * math.pi * u[2], 2 * math.pi * u[3]]
        expected += [radius[0] * math.cos(angle[0]), radius[1] * math.cos(angle[1])]
        expected += [radius[0] * math.sin(angle[0]), radius[1] * math.sin(angle[1])]
    assert normal == pytest.approx(expected[:6], rel=1e-6, abs=1e-7)


def test_values_that_must_never_change() -> None:
    """A run resumed by a later version, and every published sample, depends on these."""
    draws = Draws(7, 3, torch.tensor([0, 5, 2**31 + 1]))
    assert draws.integers("dm_level", 20, 981).tolist() == [463, 44, 577]
    assert draws.shared_integer("simulated_step", 1000) == 656
    assert draws.uniform("label_dropout").tolist() == pytest.approx([0.39653966, 0.75189435, 0.31072423], rel=1e-6)
    expected = [
        [-0.0760138258, -0.2725800574, 0.4081919193, 0.5771259665, -0.8165474534, 0.9960305691],
        [0.3696103990, -0.3869085610, 0.4186905921, 0.5846545696, 0.6792231798, -0.3528897166],
        [-1.3734326363, -1.8366712332, 0.2615287006, -0.8711079359, 0.0655592531, 0.1865773797],
    ]
    torch.testing.assert_close(draws.normal("dm_noise", (6,)), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (3, 5, 7), (1, 16, 16)])
def test_shapes_and_kinds(shape: tuple[int, ...]) -> None:
    draws = Draws.of_batch(0, 0, 5)
    assert draws.normal("dm_noise", shape).shape == (5, *shape)
    assert draws.normal("dm_noise", shape).dtype == draws.uniform("dm_noise").dtype == torch.float32
    assert draws.uniform("dm_noise").shape == draws.integers("dm_noise", 0, 2).shape == (5,)
    assert draws.integers("dm_noise", 0, 2).dtype == torch.int64


def test_an_empty_batch_draws_nothing() -> None:
    draws = Draws.of_batch(0, 0, 0)
    assert draws.normal("dm_noise", (1, 4, 4)).shape == (0, 1, 4, 4)
    assert len(draws.integers("dm_level", 0, 5)) == len(draws.uniform("data_flip")) == 0


def test_of_batch_counts_positions_from_first() -> None:
    assert Draws.of_batch(1, 2, 3).positions.tolist() == [0, 1, 2]
    later = Draws.of_batch(1, 2, 3, first=2**33)
    assert later.positions.tolist() == [2**33, 2**33 + 1, 2**33 + 2]
    assert (later.seed, later.step, later.positions.dtype) == (1, 2, torch.int64)


def every_draw(draws: Draws) -> list[torch.Tensor]:
    normal = draws.normal("dm_noise", (2, 3, 3)).flatten(1)
    return [normal, draws.uniform("data_flip"), draws.integers("dm_level", 0, 2**31)]


def test_a_sample_depends_neither_on_its_batch_nor_on_the_order() -> None:
    whole = every_draw(Draws.of_batch(4, 9, 8))
    order = torch.tensor([5, 0, 7, 5])
    for values, chosen in zip(whole, every_draw(Draws(4, 9, order)), strict=True):
        assert torch.equal(values[order], chosen)
    halves = [every_draw(Draws.of_batch(4, 9, 4, first=first)) for first in (0, 4)]
    for values, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(values, torch.cat([first, second]))


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    draws = Draws.of_batch(0, 0, 3)
    assert torch.equal(draws.normal("dm_noise", (9,))[:, :5], draws.normal("dm_noise", (5,)))


def test_same_arguments_give_the_same_numbers() -> None:
    for first, second in zip(every_draw(Draws.of_batch(1, 2, 4)), every_draw(Draws.of_batch(1, 2, 4)), strict=True):
        assert torch.equal(first, second)


def test_seed_step_purpose_and_position_separate_draws() -> None:
    size, count = 500, 40
    variants: dict[str, torch.Tensor] = {
        "base": Draws.of_batch(1, 2, size).normal("dm_noise", (count,)),
        "seed": Draws.of_batch(2, 2, size).normal("dm_noise", (count,)),
        "high half of the seed": Draws.of_batch(1 + 2**32, 2, size).normal("dm_noise", (count,)),
        "step": Draws.of_batch(1, 3, size).normal("dm_noise", (count,)),
        "purpose": Draws.of_batch(1, 2, size).normal("gan_noise", (count,)),
        "position": Draws.of_batch(1, 2, size, first=size).normal("dm_noise", (count,)),
        "next position": Draws.of_batch(1, 2, size, first=1).normal("dm_noise", (count,)),
        "position above 2^32": Draws.of_batch(1, 2, size, first=5 * 2**32).normal("dm_noise", (count,)),
        "position above 2^40": Draws.of_batch(1, 2, size, first=2**40).normal("dm_noise", (count,)),
    }
    bound = 5 / math.sqrt(size * count)
    for (name, a), (other, b) in itertools.combinations(variants.items(), 2):
        assert not torch.equal(a, b), f"{name} does not separate draws from {other}"
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < bound, f"{name} correlates with {other}"


def test_values_of_one_sample_do_not_correlate() -> None:
    values = Draws.of_batch(3, 1, 20_000).normal("dm_noise", (12,)).double().numpy()
    for kind in (values, values**2):  # squares too: Box-Muller pairs share a radius
        correlation = np.corrcoef(kind.T) - np.eye(12)
        assert np.abs(correlation).max() < 5 / math.sqrt(20_000)


def test_every_purpose_has_its_own_key() -> None:
    assert len({zlib.crc32(purpose.encode()) for purpose in PURPOSES}) == len(PURPOSES)
    seen = {tuple(Draws.of_batch(0, 0, 3).integers(purpose, 0, 2**31).tolist()) for purpose in PURPOSES}
    assert len(seen) == len(PURPOSES)


def test_numbered_noises_of_one_purpose_are_different_ones() -> None:
    """Number 1 has the key that "simulation_noise_1" always had: earlier runs continue as they were."""
    draws = Draws.of_batch(3, 2, 50)
    noises = [draws.normal("simulation_noise", (40,), number) for number in range(1, 9)]
    for a, b in itertools.combinations(noises, 2):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 5 / math.sqrt(50 * 40)
    words = python_words(3, 2, 7, "simulation_noise_1", 0)
    radius, angle = math.sqrt(-2 * math.log((words[0] + 0.5) / 2**32)), 2 * math.pi * (words[2] + 0.5) / 2**32
    assert noises[0][7, 0].item() == pytest.approx(radius * math.cos(angle), abs=1e-6)


def test_normals_are_normal() -> None:
    values = Draws.of_batch(0, 0, 1000).normal("sample_noise", (1, 10, 10)).double().flatten().numpy()
    count = len(values)
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(stats.skew(values)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(values)) < 4 * math.sqrt(24 / count)
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_first_normals_of_every_sample_are_normal() -> None:
    values = Draws.of_batch(0, 0, 50_000).normal("pretrain_level", (1,)).double().flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_uniforms_are_uniform() -> None:
    values = Draws.of_batch(0, 0, 100_000).uniform("data_flip").double().numpy()
    assert 0 < values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("low", "high"), [(20, 981), (0, 1000), (-3, 4), (0, 2)])
def test_integers_are_uniform_and_reach_both_ends(low: int, high: int) -> None:
    values = Draws.of_batch(0, 0, 100_000).integers("dm_level", low, high).numpy()
    assert (values.min(), values.max()) == (low, high - 1)
    assert stats.chisquare(np.bincount(values - low, minlength=high - low)).pvalue > 1e-3


def test_a_single_value_is_always_drawn() -> None:
    assert Draws.of_batch(0, 0, 4).integers("generator_label", 3, 4).tolist() == [3] * 4


def test_shared_integer_is_the_same_whatever_the_positions() -> None:
    for step in range(20):
        batches = [Draws.of_batch(5, step, size, first=first) for size, first in ((1, 0), (7, 3), (2, 2**34), (0, 0))]
        assert len({draws.shared_integer("simulated_step", 1000) for draws in batches}) == 1
    by_step = [Draws.of_batch(5, step, 1).shared_integer("simulated_step", 4) for step in range(400)]
    assert stats.chisquare(np.bincount(by_step, minlength=4)).pvalue > 1e-3
    by_seed = {Draws.of_batch(seed, 0, 1).shared_integer("simulated_step", 1000) for seed in range(20)}
    assert len(by_seed) > 15


@pytest.mark.parametrize("name", ["normal", "uniform", "integers", "shared_integer"])
def test_an_unknown_purpose_is_refused(name: str) -> None:
    arguments: dict[str, list[Any]] = {"normal": [(2,)], "uniform": [], "integers": [0, 2], "shared_integer": [2]}
    with pytest.raises(ValueError, match=r"unknown purpose 'dm_noize': add it to draws.Purpose"):
        getattr(Draws.of_batch(0, 0, 2), name)("dm_noize", *arguments[name])


@pytest.mark.parametrize("word", [0, MASK])
def test_extreme_words_give_finite_normals_and_integers_in_range(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    full = torch.full((2, 1), word, dtype=torch.int64)
    monkeypatch.setattr(Draws, "_words", lambda self, code, blocks: (full,) * 4)
    monkeypatch.setattr(Draws, "_first_word", lambda self, purpose: full[:, 0])
    draws = Draws.of_batch(0, 0, 2)
    values = draws.normal("dm_noise", (4,))
    assert values.isfinite().all()
    assert values.abs().max() < 7
    assert draws.integers("dm_level", 20, 981).tolist() == [20 if word == 0 else 980] * 2


@pytest.mark.parametrize("word", [0, MASK])
def test_extreme_words_give_uniforms_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    monkeypatch.setattr(Draws, "_first_word", lambda self, purpose: torch.full((1,), word, dtype=torch.int64))
    assert 0 < Draws.of_batch(0, 0, 1).uniform("data_flip").item() < 1


class OtherTensor(torch.Tensor):
    """A tensor that numpy's path does not take, as fake tensors and those of other devices are."""


@pytest.mark.parametrize("seed", [3, 2**64 - 1, (5, 2**40, 2**64 - 1)])
@pytest.mark.parametrize("step", [0, 2**31, -1])
def test_torch_and_numpy_draw_the_same_numbers(seed: int | tuple[int, ...], step: int) -> None:
    positions = torch.tensor([0, 2**32 - 1, 2**40 + 3])
    in_numpy, in_torch = Draws(seed, step, positions), Draws(seed, step, positions.as_subclass(OtherTensor))
    assert in_numpy._in_numpy()
    assert not in_torch._in_numpy()
    for first, second in zip(every_draw(in_numpy), every_draw(in_torch), strict=True):
        assert torch.equal(first, second.as_subclass(torch.Tensor))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused kernels are for CUDA")
def test_cuda_draws_the_same_words() -> None:
    positions = torch.tensor([0, 5, 2**32 + 1, 2**40 + 3])
    here, there = Draws(2**63 + 7, 4, positions), Draws(2**63 + 7, 4, positions.cuda())
    for purpose in PURPOSES:
        assert torch.equal(here.integers(purpose, 0, 2**31), there.integers(purpose, 0, 2**31).cpu())
        torch.testing.assert_close(
            here.normal(purpose, (3, 5)), there.normal(purpose, (3, 5)).cpu(), rtol=2e-7, atol=1e-9
        )


def test_first_words_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    """Large batches draw one purpose alone, small ones all purposes in one pass."""
    large = Draws.of_batch(7, 3, 2000)
    for purpose in ("dm_level", "label_dropout", "global_state"):
        small = torch.cat(
            [Draws.of_batch(7, 3, 500, first=first).integers(purpose, 0, 2**31) for first in range(0, 2000, 500)]
        )
        assert torch.equal(large.integers(purpose, 0, 2**31), small)


def test_one_seed_a_sample() -> None:
    """Each sample's numbers are those of its own seed; what all samples share needs one seed."""
    positions = torch.tensor([5, 5, 7])
    several = Draws((3, 2**64 - 1, 2**33), 2, positions)
    for number, seed in enumerate((3, 2**64 - 1, 2**33)):
        single = Draws(seed, 2, positions[number : number + 1])
        assert torch.equal(several.normal("sample_noise", (2, 3))[number], single.normal("sample_noise", (2, 3))[0])
        assert torch.equal(several.uniform("dm_level")[number], single.uniform("dm_level")[0])
    with pytest.raises(ValueError, match="needs one seed for all"):
        several.shared_integer("simulated_step", 4)
