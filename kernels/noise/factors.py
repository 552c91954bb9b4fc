"""The factors of multiplicative noise: drawn from their counters, and kept from forward to backward."""

import math
from collections import OrderedDict
from threading import Lock
from typing import Any

from torch import Tensor

from trainc.kernels.library.contracts import accumulation_dtype
from trainc.kernels.noise.normals import normal

# Factors that wait for their backward pass take this much memory at most, all sites together.
KEPT_BYTES = 32 << 20


def factor(
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    site: int,
    views: int,
    share: str,
    first_example: Tensor | None,
) -> Tensor:
    """The factor z for x: (views * B, 1 or T, C) with T tokens, in float32, or float64 for float64 x."""
    examples = x.shape[0] // views
    tokens = math.prod(x.shape[1:-1]) if share != "token" else None
    noise = normal(
        key, site, views, examples, x.shape[-1], tokens,
        0 if first_example is None else first_example.to(x.device), x.device,
    )  # fmt: skip
    dtype = accumulation_dtype(x.dtype)
    z = noise.to(dtype).mul_(sigma.to(dtype)).add_(1.0)
    return z.reshape(x.shape[0], 1 if tokens is None else tokens, x.shape[-1])


class FactorCache:
    """Factors by the arguments they were drawn for, each given out once; the oldest make room."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._factors: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._lock = Lock()

    def take(self, drawn_for: tuple[Any, ...]) -> Tensor | None:
        """The factor kept for these arguments, which is forgotten; None where there is none."""
        with self._lock:
            found = self._factors.pop(drawn_for, None)
            self.held -= 0 if found is None else found.nbytes
        return found

    def keep(self, drawn_for: tuple[Any, ...], z: Tensor) -> None:
        """Hold a factor, unless it alone is larger than the limit."""
        if z.nbytes > self.limit:
            return
        with self._lock:
            known = self._factors.pop(drawn_for, None)
            self.held += z.nbytes - (0 if known is None else known.nbytes)
            self._factors[drawn_for] = z
            while self.held > self.limit:
                self.held -= self._factors.popitem(last=False)[1].nbytes


_kept = FactorCache(KEPT_BYTES)


def factor_once(x: Tensor, *noise: Any) -> Tensor:
    """`factor`, drawn by the forward pass and given to the backward pass, whose arguments are the same.

    Forward and backward call one operator, in eager mode and in captured graphs, so the second call with the same
    arguments takes what the first one left. On another device nothing is kept: reading sigma and key would wait for it.
    """
    if x.device.type != "cpu":
        return factor(x, *noise)
    sigma, key, site, views, share, first_example = noise
    numbers = (t if t is None else t.item() for t in (sigma, key, first_example))
    # Shared by the tokens it does not depend on them: one of the two calls may have a factor, the other all tokens.
    shape = x.shape if share != "token" else (x.shape[0], x.shape[-1])
    drawn_for = (*numbers, site, views, share, *shape, accumulation_dtype(x.dtype))
    z = _kept.take(drawn_for)
    if z is None:
        z = factor(x, *noise)
        _kept.keep(drawn_for, z)
    return z
