"""Counter-based random streams: every number is a function of a seed and of names, never of a position in a batch.

Host streams are Philox (Salmon et al., 2011) under a key hashed from the names. Device streams, for projection
matrices too large to hold, are the SplitMix64 finaliser (Steele, Lea, Flood, 2014) applied to a counter: integer
arithmetic only, so that every device gives the same bits.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8, UInt64
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_LOW_64 = 2**64 - 1


def stream_key(seed: int, *names: str | int) -> int:
    """Return the 128-bit key of the stream called `names` under `seed`."""
    digest = hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the random stream called `names` under `seed`.

    >>> stream(0, "noise", 3).random() == stream(0, "noise", 3).random()
    True
    """
    return np.random.Generator(np.random.Philox(key=stream_key(seed, *names)))


def random_bits(key: int, counters: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return 64 hashed bits, as int64, for each counter: the same on every device.

    On a CPU numpy does the same arithmetic in place, several times faster.
    """
    if counters.device.type == "cpu":
        return torch.from_numpy(_hash_in_place(key, counters.numpy().astype(np.uint64)).view(np.int64))
    return _hash(key, counters)


def choose_positions(key: int, ids: Int[Tensor, " n"], count: int) -> Int[Tensor, " chosen"]:
    """Return the positions of `count` ids (all, if there are fewer), chosen by a hash: the same ids in any order."""
    return random_bits(key, ids).argsort(stable=True)[:count]


def random_signs(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Float[Tensor, " count"]:
    """Return entries `start` to `start + count` of an endless row of independent signs, -1 or 1, in float32."""
    return random_bools(key, start, count, device).float() * 2 - 1


def random_bools(key: int, start: int, count: int, device: torch.device | str = "cpu") -> UInt8[Tensor, " count"]:
    """Return entries `start` to `start + count` of an endless row of independent fair bits, 0 or 1."""
    first, last = start // 64, (start + count - 1) // 64
    words = random_bits(key, torch.arange(first, last + 1, dtype=torch.int64, device=device))
    if words.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(words.numpy().astype("<i8").view(np.uint8), bitorder="little"))
    else:
        bits = ((words[:, None] >> torch.arange(64, device=device)) & 1).flatten().to(torch.uint8)
    offset = start - 64 * first
    return bits[offset : offset + count]


def random_normals(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Float[Tensor, " count"]:
    """Return entries `start` to `start + count` of an endless row of N(0, 1) numbers in float32 (Box-Muller)."""
    words = random_bits(key, torch.arange(start, start + count, dtype=torch.int64, device=device))
    radius_bits, angle_bits = (words >> 32) & 0xFFFFFFFF, words & 0xFFFFFFFF
    radius = torch.sqrt(-2 * torch.log((radius_bits.double() + 0.5) * 2.0**-32))
    return (radius * torch.cos(angle_bits.double() * (2 * torch.pi * 2.0**-32))).float()


def _signed(word: int) -> int:
    """Return the low 64 bits of `word` as a signed integer."""
    return int(np.uint64(word & _LOW_64).astype(np.int64))


def _hash(key: int, counters: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return two rounds of SplitMix64 under a key."""
    low, high = _signed(key), _signed(key >> 64)
    mixed = _finalise((counters ^ high) * _GOLDEN + low)
    return _finalise(mixed + low)


def _hash_in_place(key: int, x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return what `_hash` does, in the memory of its input."""
    low, high = (np.uint64(word & _LOW_64) for word in (key, key >> 64))
    np.bitwise_xor(x, high, out=x)
    x *= np.uint64(_GOLDEN & _LOW_64)
    for _ in range(2):
        x += low
        x ^= x >> np.uint64(30)
        x *= np.uint64(_MIX_1 & _LOW_64)
        x ^= x >> np.uint64(27)
        x *= np.uint64(_MIX_2 & _LOW_64)
        x ^= x >> np.uint64(31)
    return x


def _finalise(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the SplitMix64 finaliser of each element."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """Return the logical right shift: torch has no unsigned one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
