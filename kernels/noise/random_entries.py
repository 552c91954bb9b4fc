"""Random numbers for the entries of a parameter: standard normals, or uniforms in [0, 1).

Entry (r, c) of a parameter seen as a matrix, its first axis the rows (a vector is one row), is word c % 4 of the group
c // 4 of example r in view 0 at the site: counters of `philox.py`, so the numbers are the same on any device.
"""

import torch
from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype, lazy, require
from trainc.kernels.library.register import register
from trainc.kernels.noise.normals import normal, uniform
from trainc.kernels.noise.philox import MAX_SITES

DISTRIBUTIONS = ("normal", "uniform")


def random_entries(like: Tensor, key: Tensor, site: int, distribution: str) -> Tensor:
    """Draw numbers of a `distribution` in the shape of a parameter, drawn in float32 and the same for the same key.

    `like` is any floating tensor, `key` the 0-d int64 of `philox.pack_key(seed, step)`, `site` in [0, 2^32). The dtype
    is float64 where that of `like` is, else float32. No gradient flows. Raises RuntimeError for arguments outside of
    this.
    """
    drawn: Tensor = _draw(like.detach(), key, site, distribution)
    return drawn


def matrix_shape(like: Tensor) -> tuple[int, int]:
    """The rows and columns of a parameter seen as a matrix; a vector is one row."""
    rows = like.shape[0] if like.dim() > 1 else 1
    return rows, like.numel() // rows if rows else 0


def check(like: Tensor, key: Tensor, site: int, distribution: str) -> None:
    """Reject arguments outside the contract."""
    require(
        distribution in DISTRIBUTIONS,
        lambda: f"the distribution must be one of {DISTRIBUTIONS}, not {distribution!r}",
    )
    require(
        like.is_floating_point(),
        lambda: f"random entries are those of a floating tensor, not of {like.dtype}",
    )
    require(0 <= site < MAX_SITES, lambda: f"site must be in [0, 2^32), not {site}")
    require(
        key.dim() == 0 and key.dtype == torch.int64, lambda: "key must be a 0-d tensor of int64"
    )


def eager(like: Tensor, key: Tensor, site: int, distribution: str) -> Tensor:
    check(like, key, site, distribution)
    draw = normal if distribution == "normal" else uniform
    rows, columns = matrix_shape(like)
    found = draw(key, site, 1, rows, columns, device=like.device)
    return found.reshape(like.shape).to(accumulation_dtype(like.dtype))


def fake(like: Tensor, key: Tensor, site: int, distribution: str) -> Tensor:
    check(like, key, site, distribution)
    return like.new_empty(like.shape, dtype=accumulation_dtype(like.dtype))


_draw = register(
    "random_entries",
    cpu=eager,
    cuda=lazy("noise.triton_random_entries", "random_entries"),
    fake=fake,
)
