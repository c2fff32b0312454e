"""Randomness as a function of (seed, stream, position, purpose), never of call order.

Philox4x64-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), as numpy
ships it: a block cipher over a counter, so any draw can be made alone, in any order, on any
rank, and its bits are the same on every machine. The key is a hash of (seed, purpose, stream),
the counter holds the position.

- `seed`: the user's number.
- `purpose`: what the draw is for ("sample", "initialise", "shuffle"); two never share bits.
- `stream`: which of several parallel sequences (a parameter's name, an epoch, the n-th answer).
- `position`: where in the stream (the token's position in its sequence, a step).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_TWO_TO_MINUS_52 = 2.0**-52


def bits(
    count: int, *, seed: int, purpose: str, stream: str | int = 0, position: int = 0
) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words. Positions never overlap while `count` is below 2**66."""
    words = np.frombuffer(key(seed=seed, purpose=purpose, stream=stream), dtype="<u8")
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=words, counter=counter).random_raw(count)


def key(*, seed: int, purpose: str, stream: str | int = 0) -> bytes:
    """The cipher's key: two words, the lower byte first."""
    assert "|" not in purpose, f"the purpose {purpose!r} could be taken for another and a stream"
    text = f"{seed}|{purpose}|{stream}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def uniform(
    count: int, *, seed: int, purpose: str, stream: str | int = 0, position: int = 0
) -> NDArray[np.float64]:
    """`count` numbers strictly between 0 and 1, so that their logarithms are finite."""
    words = bits(count, seed=seed, purpose=purpose, stream=stream, position=position)
    return _between_0_and_1(words)


def gumbel(
    count: int,
    *,
    seed: int,
    purpose: str,
    stream: str | int = 0,
    position: int = 0,
    at: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """`count` standard Gumbel draws: argmax(log p + gumbel) is a sample from p.

    Args:
        at: indices of those that are wanted, as logarithms take most of the time; None for all.
    """
    words = bits(count, seed=seed, purpose=purpose, stream=stream, position=position)
    return -np.log(-np.log(_between_0_and_1(words if at is None else words[at])))


def normal(
    count: int, *, seed: int, purpose: str, stream: str | int = 0, position: int = 0
) -> NDArray[np.float64]:
    """`count` standard normal draws, by Box and Muller's transform."""
    half = (count + 1) // 2
    draws = uniform(2 * half, seed=seed, purpose=purpose, stream=stream, position=position)
    radius = np.sqrt(-2.0 * np.log(draws[:half]))
    angle = 2.0 * np.pi * draws[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def permutation(count: int, *, seed: int, purpose: str, stream: str | int = 0) -> NDArray[np.int64]:
    """A permutation of ``range(count)``: the order of `count` random words."""
    return np.argsort(bits(count, seed=seed, purpose=purpose, stream=stream), kind="stable")


def _between_0_and_1(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    # 52 bits and a half: with 53 the largest would round up to 1.
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * _TWO_TO_MINUS_52
