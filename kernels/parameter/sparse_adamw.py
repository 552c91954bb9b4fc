"""AdamW in place on k entries of a tensor, with state for those entries only.

Memory moves in sectors of 32 bytes, so single entries cost up to 16 times their bytes and blocks of
16 16-bit entries cost their own.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.contracts import lazy, require
from trainc.kernels.library.register import register_update

__all__ = ["sparse_adamw_"]


def sparse_adamw_(
    weight: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    *,
    lr: Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor | float,
    step: Tensor | int,
    gathered: bool = False,
    block: int = 1,
    master: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Take one AdamW step on k entries of `weight`, in place, and leave the other entries untouched.

    `weight` is any floating tensor. `index` is (k / block,) int32 or int64: index[j] is a position in the flat weight
    counted in blocks, distinct (not checked), and stands for `block` neighbouring entries from index[j] * block.
    `exp_avg` and `exp_avg_sq` are (k,), of one floating dtype, in which the arithmetic is done, and are updated: 16-bit
    weights with float32 state round once, when stored. `grad` has the shape of the weight, or with `gathered` is the
    (k,) gradient of those entries. `master` is None or the (k,) entries in the state's dtype: then these are what is
    updated, and the weight gets them rounded. Lists of weights, with as many of each of the others (`master` None or a
    list, too), take one step together: on CUDA in a launch or two for all of them.

    `lr`, `weight_decay` (decoupled: entries are multiplied by 1 - lr * weight_decay) and `step` (counted from 1) are
    numbers or 0-d tensors, `beta1`, `beta2` and `eps` numbers. On CUDA a number becomes part of the launch, and a
    graph that captures it keeps it: what changes between replays must be a tensor on the device. Entries and state end
    up as torch.optim.AdamW would leave them. Returns None; there is no gradient.

    Raises RuntimeError for other shapes and dtypes and for lists of several lengths, and on a CPU, before anything is
    written, for a `step` below 1 and an index outside of the weight. CUDA's kernel does not wait to look: such an index
    makes its state nan and touches no weight.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; on chosen entries: SIFT, Song et al. 2024, arXiv:2312.11875.
    """
    scalars = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for value in (lr, weight_decay, step)
    ]
    several = [_listed(one) for one in (weight, grad, exp_avg, exp_avg_sq, index)]
    masters = [] if master is None else _listed(master)
    with torch.no_grad():
        _operator(*several, *scalars, beta1, beta2, eps, gathered, block, masters)


def _listed(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def reference(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (values, exp_avg, exp_avg_sq), (k,) each, by definition (arXiv 1711.05101)."""
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    mean = exp_avg / (1 - beta1**step)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt()
    return values * (1 - lr * weight_decay) - lr * mean / (root + eps), exp_avg, exp_avg_sq


def check(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    gathered: bool,
    block: int,
    master: Tensor | None,
) -> None:
    """Reject arguments outside the contract."""
    require(
        index.dim() == 1 and index.dtype in (torch.int32, torch.int64),
        lambda: (
            f"index must be (k / block,) int32 or int64, not {tuple(index.shape)} {index.dtype}"
        ),
    )
    require(
        exp_avg.dim() == 1
        and exp_avg.shape[0] == index.shape[0] * block
        and exp_avg_sq.shape == exp_avg.shape,
        lambda: (
            f"exp_avg and exp_avg_sq must hold {block} entries for each of {index.numel()} indices, "
            f"not {tuple(exp_avg.shape)} and {tuple(exp_avg_sq.shape)}"
        ),
    )
    require(
        exp_avg_sq.dtype == exp_avg.dtype and exp_avg.is_floating_point(),
        lambda: (
            "exp_avg and exp_avg_sq must have one floating-point dtype, "
            f"not {exp_avg.dtype} and {exp_avg_sq.dtype}"
        ),
    )
    require(
        weight.is_floating_point() and grad.is_floating_point(),
        lambda: (
            f"weight and grad must be floating-point tensors, not {weight.dtype} and {grad.dtype}"
        ),
    )
    require(
        master is None or (master.shape == exp_avg.shape and master.dtype == exp_avg.dtype),
        lambda: (
            f"master must be like exp_avg, {tuple(exp_avg.shape)} {exp_avg.dtype}, "
            f"not {tuple(master.shape)} {master.dtype}"  # type: ignore[union-attr]
        ),
    )
    require(
        grad.shape == (exp_avg.shape if gathered else weight.shape),
        lambda: (
            f"grad must have the shape of weight, {tuple(weight.shape)}, or with gathered that of exp_avg, "
            f"{tuple(exp_avg.shape)}, not {tuple(grad.shape)}"
        ),
    )


def each(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    indices: Sequence[Tensor],
    gathered: bool,
    block: int,
    masters: Sequence[Tensor],
) -> list[Any]:
    """One weight's tensors after another's, checked: weight, grad, exp_avg, exp_avg_sq, index, and master or None."""
    lists = (weights, grads, exp_avgs, exp_avg_sqs, indices)
    lengths = {len(one) for one in (*lists, *([masters] if masters else []))}
    require(
        len(lengths) == 1,
        lambda: (
            "weight, grad, exp_avg, exp_avg_sq, index and master must be lists of one length, "
            f"not {[len(one) for one in (*lists, masters)]}"
        ),
    )
    held: Sequence[Tensor | None] = masters or [None] * len(weights)
    found = list(zip(*lists, held, strict=True))
    for weight, grad, exp_avg, exp_avg_sq, index, master in found:
        check(weight, grad, exp_avg, exp_avg_sq, index, gathered, block, master)
    return found


def eager(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    indices: Sequence[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    gathered: bool,
    block: int,
    masters: Sequence[Tensor],
) -> None:
    found = each(weights, grads, exp_avgs, exp_avg_sqs, indices, gathered, block, masters)
    rate, decay, count = lr.item(), weight_decay.item(), step.item()
    require(count >= 1, lambda: f"step must count from 1, and is {count}")
    for weight, _, _, _, index, _ in found:  # before anything is written
        if index.numel():
            low, high, blocks = int(index.min()), int(index.max()), weight.numel() // block
            require(
                low >= 0 and high < blocks,
                partial(_outside, low, high, blocks),
            )
    numbers = (rate, decay, 1 - beta1**count, math.sqrt(1 - beta2**count), beta1, beta2, eps)
    for tensors in found:
        every: Any = (*tensors, *numbers, gathered, block)
        _update(*every)


def _outside(low: int, high: int, blocks: int) -> str:
    return f"index must be in [0, {blocks}), and {low if low < 0 else high} is not"


def _update(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, index: Tensor,
    master: Tensor | None, rate: float, decay: float, first: float, second: float,
    beta1: float, beta2: float, eps: float, gathered: bool, block: int,
) -> None:  # fmt: skip
    """One weight's step; `first` and `second` undo what the moments lack in early steps."""
    where = index.long()
    if block > 1:
        within = torch.arange(block, device=index.device)
        where = (where.unsqueeze(1) * block + within).view(-1)
    g = (grad if gathered else _chosen(grad, where)).to(exp_avg.dtype)
    # The operations of torch.optim.AdamW's single-tensor path, so float32 results are bit-equal.
    values = _chosen(weight, where).to(exp_avg.dtype) if master is None else master
    values.mul_(1 - rate * decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_(second).add_(eps)
    values.addcdiv_(exp_avg, root, value=-rate / first)
    values = values.to(weight.dtype)
    if weight.is_contiguous():
        weight.view(-1).scatter_(0, where, values)
    else:
        weight.put_(where, values)


def _chosen(tensor: Tensor, where: Tensor) -> Tensor:
    """Entries by flat index, in half the time of `take` where the memory is flat."""
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, where)
    return tensor.take(where)


def fake(*arguments: Any) -> None:
    each(*arguments[:5], *arguments[-3:])


_operator = register_update(
    "sparse_adamw_",
    cpu=eager,
    cuda=lazy("parameter.triton_sparse_adamw", "sparse_adamw_"),
    fake=fake,
    mutates=("weights", "exp_avgs", "exp_avg_sqs", "masters"),
)
