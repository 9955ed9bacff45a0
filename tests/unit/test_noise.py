"""The noise contract: known answers of Philox, golden values of version 1, random access, distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from actors.sampling import noise
from actors.sampling.noise import ACCEPTANCE, DRAFT, GUMBEL, RESIDUAL, derive_key, gumbel, uniform

ALL_ONES = 0xFFFFFFFF

# Random123 1.14, tests/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

GOLDEN_KEYS = [
    (0, 0, 0x654F14E60978C939),
    (0, 1, 0x113A1F4A24C83AE4),
    (1, 0, 0xF78843D1D370D690),
    (-1, 0, 0x387BE47D7AE3956F),
    (42, 7, 0xDFBAFBFE194E127F),
    (9223372036854775807, 0, 0x8F3C6E0C20C64523),
    (-9223372036854775808, 3, 0xE19A0715AFEC2DA2),
]

GOLDEN_WORDS = [
    (0xF50D7D130A772EFC, 0, 0, [0xA6FD0763, 0xDC6CB75A, 0x28F9EA2C, 0x950D7D51, 0x1C60FB06, 0x866C2613]),
    (0xF50D7D130A772EFC, 1, 0, [0x0EA34708, 0x50E3FDCC, 0x63121512, 0x946EAB86, 0x8B14F503, 0x0614F5C5]),
    (
        0xF50D7D130A772EFC,
        4294967301,
        2,
        [0xBB55C28E, 0xF5BFC00B, 0x4EA4D12F, 0xA728C467, 0x061F7FAD, 0xAA5EEFDB],
    ),
    (0xFFFFFFFFFFFFFFFF, 10, 3, [0x07DCE201, 0x0A0AF054, 0x4D3B7E00, 0x3B892A3E, 0xFC27EA76, 0x03CE5788]),
]

GOLDEN_GUMBEL = [
    (
        0xF50D7D130A772EFC,
        0,
        0,
        [
            "-0x1.c18d6ep-5",
            "-0x1.5c118ap-1",
            "0x1.bf0978p+0",
            "0x1.168808p-3",
            "0x1.121824p+1",
            "0x1.2df388p-2",
        ],
    ),
    (
        0xF50D7D130A772EFC,
        1,
        0,
        ["0x1.6a87fep+1", "0x1.efb7cp-1", "0x1.6de1b6p-1", "0x1.2425eep-3", "0x1.f325ep-3", "0x1.dd2abap+1"],
    ),
    (
        0xF50D7D130A772EFC,
        4294967301,
        2,
        [
            "-0x1.192388p-2",
            "-0x1.2b2fep+0",
            "0x1.0099cp+0",
            "-0x1.d0700cp-5",
            "0x1.dc4afcp+1",
            "-0x1.744c1p-4",
        ],
    ),
    (
        0xFFFFFFFFFFFFFFFF,
        10,
        3,
        [
            "0x1.bbd634p+1",
            "0x1.9bf40ep+1",
            "0x1.0630acp+0",
            "0x1.544466p+0",
            "-0x1.6f4c88p+0",
            "0x1.0cdf06p+2",
        ],
    ),
]

GOLDEN_UNIFORM = [
    (0xF50D7D130A772EFC, 0, 1, "0x1.62f87d4a00000p-2"),
    (0xF50D7D130A772EFC, 1, 1, "0x1.4e616bfc00000p-3"),
    (0xF50D7D130A772EFC, 4294967296, 1, "0x1.198fb65100000p-1"),
    (0x0000000000000000, 0, 1, "0x1.6e739f2c00000p-3"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    assert noise.philox4x32(counter, key) == answer
    tensors = tuple(torch.tensor([word, 0]) for word in counter)
    assert tuple(int(word[0]) for word in noise.philox4x32(tensors, key)) == answer  # type: ignore[arg-type, index]
    assert noise._philox_ints(*counter, *key) == answer
    block = np.array([counter[0], 1], dtype=np.uint64)
    assert tuple(noise._philox_numpy(block, *counter[1:], *key)[0].tolist()) == answer


def test_version_is_one() -> None:
    # A new version needs new golden values, and users need to be told: seeds stop reproducing.
    assert noise.NOISE_VERSION == 1


@pytest.mark.parametrize(("seed", "choice", "key"), GOLDEN_KEYS)
def test_golden_keys(seed: int, choice: int, key: int) -> None:
    assert derive_key(seed, choice) == key


@pytest.mark.parametrize(("key", "position", "stream", "words"), GOLDEN_WORDS)
def test_golden_words(key: int, position: int, stream: int, words: list[int]) -> None:
    assert noise.random_words(key, position, len(words), stream).tolist() == words
    assert noise.random_words(key, position, 4099, stream)[: len(words)].tolist() == words


@pytest.mark.parametrize(("key", "position", "stream", "values"), GOLDEN_GUMBEL)
def test_golden_gumbel(key: int, position: int, stream: int, values: list[str]) -> None:
    expected = [float.fromhex(value) for value in values]
    assert gumbel(key, position, len(values), stream=stream).tolist() == expected
    assert gumbel(key, position, 4099, stream=stream)[: len(values)].tolist() == expected


@pytest.mark.parametrize(("key", "position", "stream", "value"), GOLDEN_UNIFORM)
def test_golden_uniform(key: int, position: int, stream: int, value: str) -> None:
    assert uniform(key, position, stream) == float.fromhex(value)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 16, 17, 31, 33, 320, 49152])
@pytest.mark.parametrize("count", [1, 8, 9, 300])
def test_random_access_equals_the_full_vector(vocab_size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + count)
    ids = torch.randint(vocab_size, (count,), generator=generator)
    full = gumbel(123, 45, vocab_size)
    assert full.shape == (vocab_size,)
    assert full.dtype == torch.float32
    assert torch.equal(gumbel(123, 45, vocab_size, ids), full[ids])


def test_random_access_keeps_the_shape() -> None:
    ids = torch.arange(300).reshape(3, 100)
    assert torch.equal(gumbel(9, 1, 300, ids).reshape(-1), gumbel(9, 1, 300))


def test_a_larger_vocabulary_extends_a_smaller_one() -> None:
    assert torch.equal(gumbel(5, 6, 50_000)[:1000], gumbel(5, 6, 1000))


@pytest.mark.parametrize("vocab_size", [5, 1000])
@pytest.mark.parametrize("position", [0, 2**32 + 17])
def test_tensor_form_equals_the_cpu_forms(vocab_size: int, position: int) -> None:
    """What other devices run, on the CPU: integer tensor operations."""
    key = derive_key(-1, 2)
    counters = torch.arange((vocab_size + 3) // 4)
    low, high = position & ALL_ONES, position >> 32
    stacked = noise._stacked((counters, low, high, GUMBEL), (key & ALL_ONES, key >> 32))
    words = stacked.reshape(-1)[:vocab_size]
    assert torch.equal(words, noise.random_words(key, position, vocab_size))
    torch.testing.assert_close(
        noise.to_gumbel(words), gumbel(key, position, vocab_size), rtol=1e-6, atol=1e-7
    )


@pytest.mark.skipif(noise.native_gumbel() is None, reason="the native core is not built")
@pytest.mark.parametrize("stream", [GUMBEL, RESIDUAL])
def test_native_form_equals_the_array_form(stream: int) -> None:
    """Integers agree exactly; the two logarithms may differ in the last bit of a few of 10^8 values."""
    for position in (0, 1, 2**33 + 5):
        native = gumbel(99, position, 49_155, stream=stream)
        arrays = noise.to_gumbel(noise.random_words(99, position, 49_155, stream))
        assert int((native != arrays).sum()) <= 1
        torch.testing.assert_close(native, arrays, rtol=2e-7, atol=0)


@given(
    key=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
    stream=st.sampled_from([GUMBEL, RESIDUAL, DRAFT]),
    token=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_every_value_is_finite_and_follows_the_formula(
    key: int, position: int, stream: int, token: int
) -> None:
    word = int(noise.random_words_of(key, position, torch.tensor([token]), stream))
    assert 0 <= word < 2**32
    w = min((word + 0.5) / 2**32, 1 - 2.0**-24)
    value = float(gumbel(key, position, 10**6 + 1, torch.tensor([token]), stream))
    assert value == pytest.approx(-math.log(-math.log1p(-w)), rel=1e-6, abs=1e-7)


def test_extreme_words_stay_finite_and_distinct() -> None:
    values = noise.to_gumbel(torch.tensor([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1]))
    assert torch.isfinite(values).all()
    assert float(values[0]) == pytest.approx(noise.MAX_GUMBEL, rel=1e-6)
    assert bool((values.diff() <= 0).all())
    assert values[0] > values[1] > values[2]
    assert float(values[-1]) == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_inputs_that_differ_give_other_noise() -> None:
    base = gumbel(1, 1, 64)
    others = [
        gumbel(2, 1, 64),
        gumbel(1 + 2**32, 1, 64),
        gumbel(1, 2, 64),
        gumbel(1, 1 + 2**32, 64),
        gumbel(1, 1, 64, stream=RESIDUAL),
        gumbel(1, 1, 64, stream=DRAFT),
    ]
    for other in others:
        assert not bool((base == other).any())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_choices_and_seeds_have_keys_of_their_own(seed: int) -> None:
    keys = {derive_key(s, choice) for s in (seed, 7) for choice in range(4)}
    assert len(keys) == 8
    assert all(0 <= key < 2**64 for key in keys)


def test_gumbel_distribution_over_tokens_positions_and_keys() -> None:
    across_tokens = gumbel(derive_key(3, 0), 11, 40_000).numpy()
    across_positions = np.array([float(gumbel(77, i, 100, torch.tensor([42]))) for i in range(2000)])
    across_keys = np.array([float(gumbel(derive_key(i, 0), 5, 100, torch.tensor([42]))) for i in range(2000)])
    for sample in (across_tokens, across_positions, across_keys):
        assert stats.kstest(sample, stats.gumbel_r.cdf).pvalue > 1e-4


def test_uniform_distribution_and_lanes() -> None:
    sample = np.array([uniform(derive_key(0, 0), i, ACCEPTANCE) for i in range(10_000)])
    assert ((sample > 0) & (sample < 1)).all()
    assert stats.kstest(sample, stats.uniform.cdf).pvalue > 1e-4
    lanes = noise.random_words(1, 2, 40_000).reshape(-1, 4).numpy() / 2.0**32
    for lane in lanes.T:
        counts = np.histogram(lane, bins=64, range=(0, 1))[0]
        assert stats.chisquare(counts).pvalue > 1e-4
    correlation = np.corrcoef(lanes.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(lanes))
