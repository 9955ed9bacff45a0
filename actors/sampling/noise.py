"""Position-keyed noise: pure functions of (key, position, token id), version `NOISE_VERSION`.

The counter-based generator is Philox4x32-10 of Random123 (Salmon, Moraes, Dror, Shaw: "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011). Any value can be computed alone, in any order, on any device, so a
draft model with a cut vocabulary, a truncated target and a full target all read the same numbers.

Contract with users (changing any of it needs a new `NOISE_VERSION`):

- counter words `(v >> 2, low32(position), high32(position), stream)`, key words `(low32(key), high32(key))`;
  token `v` reads lane `v & 3`, a uint32 `x`;
- `w = min((x + 1/2) 2^-32, 1 - 2^-24)` in float64 and `gumbel = -log(-log1p(-w))`, computed in float64 and
  rounded once to float32. With `u = 1 - w`, an open-interval uniform, this is `-log(-log u)`. Large noise
  comes from `u` near 1, where `u` itself has lost its low bits; `log1p(-w)` keeps full relative precision
  there, so all 2^32 inputs remain distinguishable up to the largest value, log(2^33) = 22.87.

The integers are exact everywhere. The two logarithms may differ between math libraries by a unit in the last
place of float64, which survives the rounding to float32 about once in 10^8 values, as one float32 ulp.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NOISE_VERSION = 1

GUMBEL, ACCEPTANCE, RESIDUAL, DRAFT = 0, 1, 2, 3
"""Streams: target tokens; acceptance uniforms and residual samples of rules with q; a drafter's own draws."""

MAX_GUMBEL = 33 * math.log(2)
"""No noise value exceeds this."""

_KEY_TAG = 0x53324B31  # "S2K1"
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_W_MAX = 1.0 - 2.0**-24
_SMALL = 8
"""Up to this many counters plain integers are faster than array operations."""

Word = int | Tensor
Words = tuple[Word, Word, Word, Word]
_Words64 = npt.NDArray[np.uint64]


class NativeGumbel(Protocol):
    """The compiled form: writes the noise of token `ids` (all when None) into float32 `out` on the CPU."""

    def __call__(self, key: int, position: int, stream: int, ids: Tensor | None, out: Tensor) -> None: ...


def _mul_hi_lo(multiplier: int, x: Word) -> tuple[Word, Word]:
    """High and low halves of a 32 x 32 bit product. Split so that nothing leaves a signed 64-bit integer."""
    low = x * (multiplier & 0xFFFF)
    high = x * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Words, key: tuple[Word, Word]) -> Words:
    """Philox4x32-10. Words are uint32 values held in Python ints or in int64 tensors of one shape; words that
    do not vary may stay ints, which saves their share of the first rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _philox_ints(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, int, int, int]:
    """`philox4x32` for one counter: Python integers need no split products."""
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _philox_numpy(c0: _Words64, c1: int, c2: int, c3: int, k0: int, k1: int) -> _Words64:
    """`philox4x32` for counters that differ in word 0, uint64 [n] (overwritten); returns uint64 [n, 4].

    Only for CPUs, where unsigned 64-bit products save most of the tensor operations."""
    x0 = c0
    x1, x2, x3 = (np.full_like(c0, word) for word in (c1, c2, c3))
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    m0, m1 = np.uint64(_MULTIPLIERS[0]), np.uint64(_MULTIPLIERS[1])
    mask, half = np.uint64(_MASK), np.uint64(32)
    for _ in range(_ROUNDS):
        np.multiply(x0, m0, out=p0)
        np.multiply(x2, m1, out=p1)
        np.right_shift(p1, half, out=x0)
        x0 ^= x1
        x0 ^= np.uint64(k0)
        np.right_shift(p0, half, out=x2)
        x2 ^= x3
        x2 ^= np.uint64(k1)
        np.bitwise_and(p1, mask, out=x1)
        np.bitwise_and(p0, mask, out=x3)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack((x0, x1, x2, x3), axis=1)


def derive_key(seed: int, choice: int) -> int:
    """The noise key (uint64) of choice `choice` of a request with int64 `seed`: H(seed, choice)."""
    seed &= 2**64 - 1
    words = _philox_ints(
        choice & _MASK, (choice >> 32) & _MASK, _KEY_TAG, NOISE_VERSION, seed & _MASK, seed >> 32
    )
    return words[0] | (words[1] << 32)


def _split(key: int, position: int) -> tuple[int, int, int, int]:
    return key & _MASK, (key >> 32) & _MASK, position & _MASK, (position >> 32) & _MASK


def uniform(key: int, position: int, stream: int = ACCEPTANCE) -> float:
    """One number in the open interval (0, 1): lane 0 of the first counter, `(x + 1/2) 2^-32`."""
    k0, k1, low, high = _split(key, position)
    return (_philox_ints(0, low, high, stream, k0, k1)[0] + 0.5) * 2.0**-32


def random_words(
    key: int, position: int, vocab_size: int, stream: int = GUMBEL, device: torch.device | None = None
) -> Tensor:
    """The uint32 values of tokens 0..vocab_size-1, int64 [V]: one Philox call per four tokens."""
    k0, k1, low, high = _split(key, position)
    blocks = (vocab_size + 3) // 4
    if device is None or device.type == "cpu":
        if blocks <= _SMALL:
            listed = [w for b in range(blocks) for w in _philox_ints(b, low, high, stream, k0, k1)]
            return torch.tensor(listed[:vocab_size], dtype=torch.int64)
        words = _philox_numpy(np.arange(blocks, dtype=np.uint64), low, high, stream, k0, k1)
        return torch.from_numpy(words.view(np.int64)).reshape(-1)[:vocab_size]
    counters = torch.arange(blocks, dtype=torch.int64, device=device)
    return _stacked((counters, low, high, stream), (k0, k1)).reshape(-1)[:vocab_size]


def random_words_of(key: int, position: int, token_ids: Tensor, stream: int = GUMBEL) -> Tensor:
    """The uint32 values of the given tokens (int64 [n]), on their device."""
    k0, k1, low, high = _split(key, position)
    if token_ids.device.type != "cpu":
        stacked = _stacked((token_ids >> 2, low, high, stream), (k0, k1))
    elif token_ids.numel() <= _SMALL:
        ids = token_ids.tolist()
        blocks = {b: _philox_ints(b, low, high, stream, k0, k1) for b in {v >> 2 for v in ids}}
        return torch.tensor([blocks[v >> 2][v & 3] for v in ids], dtype=torch.int64)
    else:
        words = _philox_numpy((token_ids >> 2).numpy().view(np.uint64), low, high, stream, k0, k1)
        stacked = torch.from_numpy(words.view(np.int64))
    return stacked.gather(-1, (token_ids & 3).unsqueeze(-1)).squeeze(-1)


def _stacked(counter: Words, key: tuple[int, int]) -> Tensor:
    return torch.stack(cast("tuple[Tensor, ...]", philox4x32(counter, key)), dim=-1)


def to_gumbel(words: Tensor) -> Tensor:
    """uint32 values (int64 tensor) to standard Gumbel noise, float32 (see the module's contract)."""
    w = words.to(torch.float64).add_(0.5).mul_(2.0**-32).clamp_(max=_W_MAX)
    return w.neg_().log1p_().neg_().log_().neg_().to(torch.float32)


@cache
def native_gumbel() -> NativeGumbel | None:
    """The compiled noise of `actors.native`, or None where it was not built."""
    try:
        from actors.native.library import gumbel as compiled
    except ImportError:
        return None
    return cast("NativeGumbel | None", compiled)


def gumbel(
    key: int,
    position: int,
    vocab_size: int,
    token_ids: Tensor | None = None,
    stream: int = GUMBEL,
    device: torch.device | None = None,
) -> Tensor:
    """Standard Gumbel noise, float32.

    Args:
        key: uint64 noise key (`derive_key`).
        position: absolute index in the sequence of the token that is decided.
        vocab_size: size V of the target's vocabulary.
        token_ids: int64 ids in [0, V), any shape; None for all of them.
        stream: one of `GUMBEL`, `RESIDUAL`, `DRAFT`.
        device: where to compute when `token_ids` is None; else their device is used.

    Returns:
        The shape of `token_ids`, or [V].
    """
    if token_ids is not None:
        device = token_ids.device
    native = native_gumbel() if device is None or device.type == "cpu" else None
    if native is not None:
        ids = None if token_ids is None else token_ids.contiguous()
        out = torch.empty((vocab_size,) if ids is None else ids.shape, dtype=torch.float32)
        native(key, position, stream, ids, out)
        return out
    if token_ids is None:
        return to_gumbel(random_words(key, position, vocab_size, stream, device))
    flat = random_words_of(key, position, token_ids.reshape(-1), stream)
    return to_gumbel(flat).reshape(token_ids.shape)
