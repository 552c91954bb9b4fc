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
TOP = MASK ^ 0xFF

# Groups drawn at once: ten or so temporaries of 512 KB.
CHUNK = 1 << 16
MAX_VIEWS = 256
MAX_TOKENS = 1 << 24
MAX_SITES = 1 << 32

_SHIFTS = torch.tensor((0, 32))
_BUMPS = torch.tensor([[n * word for word in WEYL] for n in range(ROUNDS)])
_TOP = torch.tensor(TOP)

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
    key = pack_key(*key, device=c0.device) if isinstance(key, tuple) else key
    lanes = (key >> _SHIFTS.to(c0.device)).add(_BUMPS.to(c0.device)).bitwise_and_(MASK)
    for k0, k1 in lanes.unbind():
        # int64 wraps, so the product's 64 bits are the unsigned product's.
        p0, p2 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (p2 >> 32 & MASK) ^ k0 ^ c1, (p0 >> 32 & MASK) ^ k1 ^ c3
        c1, c3 = p2 & MASK, p0 & MASK
    return c0, c1, c2, c3


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
    from trainc.kernels.noise import philox_numpy

    if not (0 <= site < MAX_SITES and views <= MAX_VIEWS and (tokens or 0) <= MAX_TOKENS):
        raise ValueError(f"site {site}, views {views} or tokens {tokens} do not fit the counter")
    if device is None:
        device = key.device if isinstance(key, Tensor) else "cpu"
    key = pack_key(*key) if isinstance(key, tuple) else key
    extents = (views, examples, 1 if tokens is None else tokens, (channels + 3) // 4)
    if torch.device(device).type == "cpu" and philox_numpy.available():
        noise = philox_numpy.normal(int(key), site, *extents, int(first_example))
    else:
        noise = _normal(key.to(device), site, *extents, first_example)
    shape = (views, examples, channels) if tokens is None else (views, examples, tokens, channels)
    return noise[:, :channels].reshape(shape)


def _normal(
    key: Tensor,
    site: int,
    views: int,
    examples: int,
    tokens: int,
    groups: int,
    first: Tensor | int,
) -> Tensor:
    """(views * examples * tokens, 4 * groups) normals of any device, `first` added to examples."""
    device, shape = key.device, (views, examples, tokens)
    view, example, token, group = (torch.arange(n, device=device) for n in (*shape, groups))
    rows = (example + first).view(1, -1, 1).expand(shape).reshape(-1, 1)
    where = (view.view(-1, 1, 1) + MAX_VIEWS * token).expand(shape).reshape(-1, 1)
    place = torch.full((), site, dtype=torch.int64, device=device)
    noise = torch.empty((rows.shape[0], groups, 2, 2), device=device)
    lanes = noise.permute(3, 2, 0, 1)
    step = max(1, CHUNK // max(groups, 1))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        w0, w1, w2, w3 = philox(key, group.unsqueeze(0), rows[part], where[part], place)
        normal_pair(torch.stack((w0, w2)), torch.stack((w1, w3)), *lanes[:, :, part])
    return noise.flatten(1)
