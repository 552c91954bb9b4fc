"""Philox4x32-10 in eager PyTorch, bit-equal in its integers to triton's `tl.philox` on the same
counters.

Layout. One call of the generator yields four 32-bit words from a 128-bit counter and a 64-bit key:

  key      (seed, step): seed in the low word, step in the high word of one int64
  counter  c0 = channel // 4   c1 = example   c2 = view + 256 * token   c3 = site

Word pairs (0, 1) and (2, 3) each become two normals by Box-Muller, so channel c is normal c % 4 of
group c // 4. `token` is 0 where all tokens of an example share their noise. Counters depend on
nothing but these coordinates, so the noise is the same for any tiling of the batch, on any device,
and when recomputed.

Words become floats through their top 24 bits, which are exact in float32: u = (w >> 8) / 2^24 for
the angle and u + 2^-24, in (0, 1], for the radius (so the largest normal is 5.77). Generator:
Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Groups drawn at once: the generator's temporaries should stay in a core's cache.
CHUNK = 1 << 16
MAX_VIEWS = 256
MAX_TOKENS = 1 << 24
MAX_SITES = 1 << 32

Key = Tensor | tuple[int, int]


def pack_key(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The 0-d int64 key of (seed, step), each in [0, 2^32)."""
    if not (0 <= seed <= MASK and 0 <= step <= MASK):
        raise ValueError(f"seed and step must be in [0, 2^32), not {seed} and {step}")
    packed = (step << 32) | seed
    return torch.tensor(packed - (packed >> 63 << 64), dtype=torch.int64, device=device)


def philox(
    key: Key, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, in int64, for broadcastable int64 counters and a packed or paired key."""
    even, odd = _rounds(key, c0, c1, c2, c3)
    return even[0], odd[0], even[1], odd[1]


def _rounds(key: Key, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor]:
    """The words (w0, w2) and (w1, w3), each pair stacked on a new first dim.

    Both halves of a round are computed at once: multiplied words beside added words. A round leaves
    its words in swapped order, so constants and keys swap from round to round.
    """
    if isinstance(key, tuple):
        key = pack_key(*key, device=c0.device)
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    words, added = torch.stack((c0, c2)), torch.stack((c3, c1))
    column = [2] + [1] * c0.dim()

    def table(rows: list[tuple[int, ...]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=words.device)

    swapped = [(0, 32)[:: 1 if index % 2 else -1] for index in range(ROUNDS)]
    bumps = [tuple(index * w for w in WEYL)[:: 1 if index % 2 else -1] for index in range(ROUNDS)]
    keys = ((key >> table(swapped)) + table(bumps)).bitwise_and_(MASK).view([ROUNDS, *column])
    constants = table([MULTIPLIERS, MULTIPLIERS[::-1]]).view([2, *column]).unbind()
    for index, lane in enumerate(keys.unbind()):
        # int64 wraps, so the product's 64 bits are the unsigned product's; only words that will be
        # multiplied need their upper halves cleared.
        product = words * constants[index % 2]
        words = (product >> 32).bitwise_xor_(added).bitwise_xor_(lane).bitwise_and_(MASK)
        added = product.flip(0)
    return words, product.bitwise_and_(MASK)


def uniform(word: Tensor) -> Tensor:
    """A word's top 24 bits as float32 in [0, 1)."""
    return (word >> 8).to(torch.float32).mul_(2.0**-24)


def normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 standard normals from two words by Box-Muller."""
    radius = uniform(first).add_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = uniform(second).mul_(2.0 * math.pi)
    return torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)


def normal(
    key: Key,
    site: int,
    views: int,
    examples: int,
    channels: int,
    tokens: int | None = None,
    first_example: Tensor | int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals in float32, (views, examples, channels) or (.., examples, tokens, channels).

    `first_example` is the index, within the step's batch, of the first example asked for.
    """
    if not (0 <= site < MAX_SITES and views <= MAX_VIEWS and (tokens or 0) <= MAX_TOKENS):
        raise ValueError(f"site {site}, views {views} or tokens {tokens} do not fit the counter")
    if device is None:
        device = key.device if isinstance(key, Tensor) else "cpu"
    groups, lines = (channels + 3) // 4, 1 if tokens is None else tokens
    noise = torch.empty((views * examples * lines, groups, 2, 2), device=device)
    group = torch.arange(groups, dtype=torch.int64, device=device)
    place = torch.full((), site, dtype=torch.int64, device=device)
    key = key if isinstance(key, tuple) else key.to(device)
    step = max(1, CHUNK // max(groups, 1))
    for start in range(0, noise.shape[0], step):
        part = noise[start : start + step]
        row = torch.arange(start, start + part.shape[0], dtype=torch.int64, device=device)
        token, example, view = row % lines, row // lines % examples, row // (lines * examples)
        example = (example + first_example).bitwise_and_(MASK)
        where = (view + token * MAX_VIEWS).unsqueeze(1)
        pairs = _rounds(key, group, example.unsqueeze(1), where, place)
        for lane, normals in enumerate(normal_pair(*pairs)):
            part[..., lane] = normals.movedim(0, -1)
    shape = (views, examples, channels) if tokens is None else (views, examples, tokens, channels)
    return noise.flatten(1)[:, :channels].reshape(shape)
