"""Triton kernel for AdamW on chosen entries, with its launcher; imported by the first CUDA call.

One pass: gather the gradient, update the state (which is dense and read in full vectors), write the
weight's entries. Blocks of 16 neighbouring 16-bit entries fill whole memory sectors.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED
from trainc.kernels.library.launch import launch
from trainc.kernels.parameter import sparse_adamw as operator

BLOCK = 1024


@triton.jit
def adamw(
    WEIGHT, GRAD, MEAN, SQUARE, MASTER, INDEX, SCALARS, count, blocks, beta1, beta2, eps,
    GATHERED: tl.constexpr, HAS_MASTER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of the count entries,); SCALARS holds decay, rate and root of the step."""
    decay, rate, root = tl.load(SCALARS), tl.load(SCALARS + 1), tl.load(SCALARS + 2)
    line = tl.program_id(0).to(tl.int64) * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
    within = tl.arange(0, WIDTH)
    block = tl.load(INDEX + line, mask=line * WIDTH < count, other=0).to(tl.int64)
    # Two dimensions let the compiler see that the entries of a block are neighbours.
    entry = line[:, None] * WIDTH + within[None, :]
    where = block[:, None] * WIDTH + within[None, :]
    mask = (line * WIDTH < count)[:, None] & (within < WIDTH)[None, :]
    # No entry of this number: a device cannot raise, so its state becomes nan and nothing else is touched.
    inside = mask & ((block >= 0) & (block < blocks))[:, None]
    g = tl.load(GRAD + (entry if GATHERED else where), mask=inside, other=float("nan")).to(
        tl.float32
    )
    mean = tl.load(MEAN + entry, mask=mask, other=0.0)
    square = tl.load(SQUARE + entry, mask=mask, other=0.0)
    mean += (g - mean) * (1.0 - beta1)
    square = square * beta2 + g * g * (1.0 - beta2)
    tl.store(MEAN + entry, mean, mask=mask)
    tl.store(SQUARE + entry, square, mask=mask)
    if HAS_MASTER:
        w = tl.load(MASTER + entry, mask=mask, other=0.0)
    else:
        w = tl.load(WEIGHT + where, mask=inside, other=0.0).to(tl.float32)
    w = w * decay - rate * mean / (tl.sqrt(square) / root + eps)
    if HAS_MASTER:
        tl.store(MASTER + entry, w, mask=mask)
    tl.store(WEIGHT + where, w.to(WEIGHT.dtype.element_ty), mask=inside)


def coefficients(lr: Tensor, weight_decay: Tensor, step: Tensor, beta1: float, beta2: float,
                 device: torch.device) -> Tensor:  # fmt: skip
    """1 - lr * decay, lr / (1 - beta1^step), sqrt(1 - beta2^step): float32 (3,), never waiting."""
    rate, decay, count = (value.double() for value in (lr, weight_decay, step))
    every = [1 - rate * decay, rate / (1 - beta1**count), (1 - beta2**count).sqrt()]
    if len({value.device for value in every}) > 1:
        every = [value.to(device) for value in every]
    return torch.stack(every).float().to(device, non_blocking=True)


def supported(weight: Tensor, grad: Tensor, state: Tensor, block: int, gathered: bool) -> bool:
    """Whether the Triton kernel takes these; ATen takes the rest."""
    narrow = all(t.dtype in (torch.float32, *REDUCED) for t in (weight, grad))
    dense = weight.is_contiguous() and (gathered or grad.is_contiguous())
    return (
        narrow and dense and state.dtype == torch.float32 and state.numel() > 0
        and block & (block - 1) == 0 and block <= BLOCK
    )  # fmt: skip


def sparse_adamw_(*arguments: Any) -> None:
    """The CUDA kernel of trainc::sparse_adamw_."""
    weight, grad, exp_avg, exp_avg_sq, index, *scalars, gathered, block, master = arguments
    lr, weight_decay, step, beta1, beta2, eps = scalars
    state = [exp_avg, exp_avg_sq, *([] if master is None else [master])]
    if not supported(weight, grad, exp_avg, block, gathered) or not all(
        t.is_contiguous() for t in state
    ):
        operator.eager(*arguments)
        return
    operator.check(weight, grad, exp_avg, exp_avg_sq, index, gathered, block, master)
    factors = coefficients(lr, weight_decay, step, beta1, beta2, weight.device)
    launch(
        adamw, (triton.cdiv(exp_avg.numel(), BLOCK),),
        weight, grad.contiguous(), exp_avg, exp_avg_sq, exp_avg if master is None else master,
        index.contiguous(), factors, exp_avg.numel(), weight.numel() // block, beta1, beta2, eps,
        GATHERED=gathered, HAS_MASTER=master is not None, WIDTH=block, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
