"""AdamW in place on k entries of a tensor, with state for those entries only.

Contract. `weight` is any floating tensor; `index` is (k,) int32 or int64, distinct positions in the
flat weight; `exp_avg` and `exp_avg_sq` are (k,). `grad` has the shape of the weight, or with
`gathered` is the (k,) gradient of those entries. `lr`, `weight_decay` and `step` (counted from 1)
are numbers or 0-d tensors. The k entries and the state end up as torch.optim.AdamW would leave
them; other entries are not touched. Arithmetic is in the state's dtype, so 16-bit weights with
float32 state round once, when stored. Used by sparse fine-tuning (SIFT, Song et al. 2024, arXiv
2312.11875).
"""

import math

import torch
from torch import Tensor

from trainc.kernels.support import require


def sparse_adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    *,
    lr: Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor | float,
    step: Tensor | int,
    gathered: bool = False,
) -> None:
    """One AdamW step on weight.view(-1)[index], in place; see the module for the arguments."""
    scalars = [
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for value in (lr, weight_decay, step)
    ]
    with torch.no_grad():
        torch.ops.trainc.sparse_adamw_(
            weight, grad, exp_avg, exp_avg_sq, index, *scalars, beta1, beta2, eps, gathered
        )


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


def _check(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    gathered: bool,
) -> None:
    require(
        index.dim() == 1 and index.dtype in (torch.int32, torch.int64),
        lambda: f"index is (k,) int32 or int64, not {tuple(index.shape)} {index.dtype}",
    )
    require(
        exp_avg.shape == index.shape and exp_avg_sq.shape == index.shape,
        lambda: f"the state holds {exp_avg.numel()} entries for {index.numel()} indices",
    )
    require(
        grad.shape == (index.shape if gathered else weight.shape),
        lambda: f"a gradient of shape {tuple(grad.shape)} fits neither the weight nor the index",
    )


@torch.library.custom_op(
    "trainc::sparse_adamw_",
    mutates_args=("weight", "exp_avg", "exp_avg_sq"),
)
def _step(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    gathered: bool,
) -> None:
    _check(weight, grad, exp_avg, exp_avg_sq, index, gathered)
    rate, decay, count = lr.item(), weight_decay.item(), step.item()
    where = index.long()
    g = (grad if gathered else grad.take(where)).to(exp_avg.dtype)
    # The operations of torch.optim.AdamW's single-tensor path, so float32 results are bit-equal.
    values = weight.take(where).to(exp_avg.dtype).mul_(1 - rate * decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**count)).add_(eps)
    values.addcdiv_(exp_avg, root, value=-rate / (1 - beta1**count))
    weight.put_(where, values.to(weight.dtype))


@_step.register_fake
def _(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    gathered: bool,
) -> None:
    _check(weight, grad, exp_avg, exp_avg_sq, index, gathered)
