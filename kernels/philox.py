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

# A round leaves its words in swapped order, so its constants and keys swap from round to round.
# All are tensors, which saves an operation the wrapping of a number: a small draw is overhead.
_STEPS = [-1 if number % 2 else 1 for number in range(ROUNDS)]
_CONSTANTS = torch.tensor([MULTIPLIERS[::step] for step in _STEPS]).unsqueeze(2)
_SHIFTS = torch.tensor([(32, 0)[::step] for step in _STEPS]).unsqueeze(2)
_BUMPS = torch.tensor([[n * w for w in WEYL[::-step]] for n, step in enumerate(_STEPS)])
_BUMPS = _BUMPS.unsqueeze(2)
_HALF, _LOW, _TOP = (torch.tensor(value) for value in (32, MASK, MASK ^ 0xFF))

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
    odd = odd.bitwise_and_(MASK)
    return even[0], odd[0], even[1], odd[1]


def _rounds(key: Key, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor]:
    """The words (w0, w2) and (w1, w3), each pair stacked on a new first dim.

    The second pair's upper halves are whatever the last product left there. Both halves of a round
    are computed at once: multiplied words beside added words.
    """
    device = c0.device
    key = pack_key(*key, device=device) if isinstance(key, tuple) else key
    shape = torch.broadcast_tensors(c0, c1, c2, c3)[0].shape
    keys = (key >> _SHIFTS.to(device)).add_(_BUMPS.to(device)).unbind()
    constants = _CONSTANTS.to(device)[:2].unbind()
    words, *products = (
        torch.empty((2, math.prod(shape)), dtype=torch.int64, device=device) for _ in range(3)
    )
    upper, lower = words.view(2, *shape).unbind()
    upper.copy_(c0)
    lower.copy_(c2)
    halves = [product.view(2, *shape).unbind() for product in products]
    added: tuple[Tensor, ...] = (c1, c3)
    for number, lane in enumerate(keys):
        product = products[number % 2]
        # int64 wraps, so the product's 64 bits are the unsigned product's; only words that will be
        # multiplied need their upper halves cleared.
        torch.mul(words, constants[number % 2], out=product)
        torch.bitwise_right_shift(product, _HALF, out=words)
        upper.bitwise_xor_(added[1])
        lower.bitwise_xor_(added[0])
        words.bitwise_xor_(lane).bitwise_and_(_LOW)
        added = halves[number % 2]
    return words.view(2, *shape), product.view(2, *shape)


def normal_pair(
    first: Tensor, second: Tensor, cosine: Tensor | None = None, sine: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two float32 standard normals from the low halves of two words, by Box-Muller."""
    # u = (w >> 8) / 2^24 without the shift: a power of two scales floats exactly.
    radius = first.bitwise_and(_TOP).to(torch.float32).mul_(2.0**-32).add_(2.0**-24)
    radius.log_().mul_(-2.0).sqrt_()
    angle = second.bitwise_and(_TOP).to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
    return torch.mul(angle.cos(), radius, out=cosine), torch.mul(angle.sin_(), radius, out=sine)


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

    counts = torch.arange(max(views, examples, lines, groups), device=device)
    example, where = torch.empty((2, views, examples, lines), dtype=torch.int64, device=device)
    example.copy_((counts[:examples] + first_example).unsqueeze(1))
    where.copy_(counts[:views].view(-1, 1, 1))
    if lines > 1:
        where.add_(counts[:lines], alpha=MAX_VIEWS)
    example, where = example.view(-1, 1), where.view(-1, 1)
    group, place = counts[:groups], torch.full((), site, dtype=torch.int64, device=device)
    noise = torch.empty((example.shape[0], groups, 2, 2), device=device)
    lanes = noise.permute(3, 2, 0, 1)
    key = key if isinstance(key, tuple) else key.to(device)
    step = max(1, CHUNK // max(groups, 1))
    for start in range(0, noise.shape[0], step):
        part = slice(start, start + step)
        pairs = _rounds(key, group, example[part], where[part], place)
        normal_pair(*pairs, *lanes[:, :, part])
    shape = (views, examples, channels) if tokens is None else (views, examples, tokens, channels)
    return noise.flatten(1)[:, :channels].reshape(shape)
