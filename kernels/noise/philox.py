"""Philox4x32-10 in eager PyTorch; its integers equal those of `tl.philox` on the same counters.

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
