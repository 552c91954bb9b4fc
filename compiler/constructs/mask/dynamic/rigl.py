"""RigL: sparse from the start; small weights are dropped, and those with large gradients grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.constructs.mask.dynamic._regrowth import Regrowing

if TYPE_CHECKING:
    from trainc.runtime.mask.regrow import Growth


class Rigl(Regrowing):
    """Trains a random part of the entries; drops the smallest again and again, and grows those with large gradients.

    The others are zero. Every 100 steps, or `every`, but not at `from`, a fraction `replace` of the entries of each
    tensor that train, rounded down, is dropped: those with the smallest |w|. As many grow: of all entries that do not
    train then, those with the largest |g|, where g is the dense gradient of this step. A dropped entry may grow again
    at once, and keeps what it has; a new one is 0, and the optimizer begins it as it begins a parameter, but for its
    count of steps, which is the tensor's. As published, this step updates no weights of these tensors. `replace` falls
    by half a cosine over the run unless it says otherwise; after `until` the mask stays. Of equal entries the lower
    position trains. Passes compute the dense gradient in every step, so that zeros save no time.
    """

    cite: ClassVar = (
        "Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery: Making All Tickets Winners, ICML 2020,"
        " arXiv:1911.11134, algorithm 1"
    )
    usage: ClassVar = (
        "mask rigl on ndim(2) - type(Embedding) every 100 steps until 75%"
        " { density = 20%, replace = 30% * cosine(over = 75%) }"
    )

    def growth(self, seed: int) -> Growth:
        """Return |g|."""
        return lambda step, name, gradient: gradient.abs()
