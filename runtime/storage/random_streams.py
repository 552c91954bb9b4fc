"""Random numbers without state: each is a function of the seed, a purpose and counters.

Nothing is kept between calls, so a resumed run draws the numbers of the uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# An even number, so that both halves are mixed alike; 8 already pass the tests of uniformity.
ROUNDS = 10


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Return a 64-bit seed from a seed and a purpose: BLAKE2b over each part with its type and length.

    The result is the same in every version and on every machine.
    """
    digest = blake2b(digest_size=8, person=b"trainc")
    for part in (seed, *purpose):
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the SplitMix64 finaliser to each number."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(seed: int, epoch: int, n: int, start: int, count: int) -> NDArray[np.int64]:
    """Return entries `start` to `start + count` of a random order of `range(n)`, shape (count,).

    The order is a Feistel network over pairs (left, right) with left < a and right < b, a * b
    barely above n; a result outside `range(n)` goes through the network again until it is inside.
    """
    if not 0 <= start <= start + count <= n:
        raise ValueError(
            f"entries {start} to {start + count}: expected a range inside the {n} entries of the order"
        )
    a = isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    keys = [np.uint64(derive_seed(seed, "order", epoch, n, turn)) for turn in range(ROUNDS)]
    x = np.arange(start, start + count, dtype=np.uint64)
    outside = np.ones(count, dtype=np.bool_)
    while outside.any():
        x[outside] = _feistel_network(x[outside], np.uint64(a), np.uint64(b), keys)
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _feistel_network(
    x: NDArray[np.uint64], a: np.uint64, b: np.uint64, keys: list[np.uint64]
) -> NDArray[np.uint64]:
    """Apply a bijection of `range(a * b)` to each number."""
    left, right = x // b, x % b
    for turn, key in enumerate(keys):
        if turn % 2:
            right = (right + _mix(left ^ key) % b) % b
        else:
            left = (left + _mix(right ^ key) % a) % a
    return left * b + right


def seed_globals(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    # Python's generator is the same algorithm and would begin with the same numbers: a third word sets them apart.
    np.random.seed([*(seed >> shift & 0xFFFFFFFF for shift in (0, 32)), 1])
    random.seed(seed)


def seed_step(seed: int, step: int, micro: int, rank: int = 0) -> None:
    """Seed the global generators for one micro-batch of one step, in one of several processes."""
    seed_globals(derive_seed(seed, "step", step, micro, *([rank] if rank else [])))


def seed_data(seed: int, first_sample: int) -> None:
    """Seed the global generators before reading the batch that begins at a sample of the run."""
    seed_globals(derive_seed(seed, "data", first_sample))


def global_states() -> tuple[torch.Tensor, Any, Any]:
    """Return the states of the global generators of torch on the CPU, numpy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def same_states(one: Any, two: Any) -> bool:
    """Compare states of generators, with tensors and arrays in them."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    if isinstance(one, tuple | list):
        return all(map(same_states, one, two))
    if isinstance(one, dict):
        return all(same_states(value, two[key]) for key, value in one.items())
    return bool(one == two)


def set_global_states(states: tuple[torch.Tensor, Any, Any]) -> None:
    """Restore what `global_states` returned."""
    on_cpu, of_numpy, of_python = states
    torch.set_rng_state(on_cpu)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


@contextmanager
def kept_streams() -> Iterator[None]:
    """Let the global generators be after a block as they were before it, those of CUDA aside."""
    before = global_states()
    try:
        yield
    finally:
        set_global_states(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside a block; afterwards they are as before, those of CUDA aside."""
    with kept_streams():
        seed_globals(seed)
        yield
