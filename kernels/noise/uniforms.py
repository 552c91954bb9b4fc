"""Draw uniform numbers by their coordinates, on any device, eagerly and in a captured graph.

u = Phi(eps) of the normals eps that `multiplicative_noise` draws: uniform in [0, 1], to the last bits of float32, and
with the same counters, so that the same coordinates give the same number for any tiling.
"""

import torch
from torch import Tensor

from trainc.kernels.noise.multiplicative_noise import multiplicative_noise


def uniform(
    like: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str = "token",
    first_example: Tensor | None = None,
) -> Tensor:
    """Uniform numbers in float32 for `like` (views * B, ..., C), a row for each view of each example.

    They are of `like`'s shape, or with `share = "token"` the same for all middle dims, which then have size 1. `key`,
    `site`, `views` and `first_example` are those of `multiplicative_noise`.
    """
    middle = like.shape[1:-1] if share != "token" else [1] * (like.dim() - 2)
    ones = torch.ones([like.shape[0], *middle, like.shape[-1]], device=like.device)
    one = torch.ones((), device=like.device)
    eps = multiplicative_noise(ones, one, key, site, views, share, first_example) - 1
    return 0.5 * (1 + torch.erf(eps * 0.5**0.5))
