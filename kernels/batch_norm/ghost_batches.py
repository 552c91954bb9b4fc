"""How a batch divides into ghost batches: the contract, the counts, and views of the parts."""

import math

import torch
from torch import Tensor

from trainc.kernels.library.contracts import check_affine, require

REMAINDERS = ("error", "merge_last", "smaller", "even")
RUNNING = ("in_order", "mean")


def resolve(examples: int, ghost_size: int, remainder: str) -> tuple[int, str]:
    """The size and the rule of ghost batches as operators take them: `even` ones are as torch.chunk gives them."""
    if remainder != "even" or ghost_size < 1 or examples <= ghost_size:
        return ghost_size, remainder
    ghosts = -(-examples // ghost_size)
    return -(-examples // ghosts), "smaller"


def count(x: Tensor, ghost_size: int, remainder: str) -> int:
    """How many ghost batches x has: a batch smaller than one is one, an empty batch none."""
    examples = x.shape[0]
    if examples < ghost_size:
        return min(examples, 1)
    return -(-examples // ghost_size) if remainder == "smaller" else examples // ghost_size


def parts(ghosts: int, ghost_size: int, x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of each ghost batch's examples, tensor beside tensor; the last takes what is left, more or less."""
    if ghosts < 2:
        return [(x, *others)] * ghosts
    sizes = [ghost_size] * (ghosts - 1) + [x.shape[0] - ghost_size * (ghosts - 1)]
    return list(zip(*(tensor.split(sizes) for tensor in (x, *others)), strict=True))


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, ghost_size: int, remainder: str
) -> None:
    """Reject arguments outside the contract."""
    require(
        remainder in REMAINDERS, lambda: f"remainder must be one of {REMAINDERS}, not {remainder!r}"
    )
    require(x.dim() >= 2, lambda: f"x must be (B, C, ...), not {tuple(x.shape)}")
    check_affine((x.shape[1],), weight, bias)
    require(ghost_size > 0, lambda: f"ghost_size must be at least 1, not {ghost_size}")
    if remainder == "error":
        require(
            x.shape[0] % ghost_size == 0,
            lambda: (
                f"ghost_size {ghost_size} does not divide the batch of {x.shape[0]} examples: "
                'change one of them, or let the last ghost batch take the rest with remainder="merge_last"'
            ),
        )
    least = min(ghost_size, x.shape[0])
    if remainder in ("smaller", "even") and x.shape[0] > ghost_size:
        least = x.shape[0] - ghost_size * (count(x, ghost_size, "smaller") - 1)
    least *= math.prod(x.shape[2:])
    require(
        x.shape[0] == 0 or least > 1,
        lambda: "a ghost batch must have more than one value per channel, or it has no variance",
    )


def laid_out(x: Tensor) -> Tensor:
    """x, or a dense copy: channels-last stays as it is, every other layout becomes contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()
