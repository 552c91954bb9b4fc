"""The operators without gradients: measuring and changing weights in place."""

from typing import Any

import torch
from torch import Tensor

import trainc.functional as ours
from benchmarks.operators import Make, Problem, Size

BETA1, BETA2, EPS, LR, DECAY, STEP = 0.9, 0.999, 1e-8, 1e-4, 0.1, 10


def multi_norm(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Measure `examples` pairs of tensors of (rows, width)."""
    make = Make(dtype, device)
    tensors, deltas = (
        [make.normal(size.rows, size.width, grad=False) for _ in range(size.examples)]
        for _ in range(2)
    )

    def aten(*given: Tensor) -> Tensor:
        rows = []
        for w, d in zip(given[: size.examples], given[size.examples :], strict=True):
            w, d = w.double(), d.double()
            bad = (~w.isfinite()).sum() + (~d.isfinite()).sum()
            rows.append(torch.stack([w.square().sum(), d.square().sum(), (w * d).sum(), bad]))
        return torch.stack(rows)

    def fast(*given: Tensor) -> Tensor:
        rows = []
        for w, d in zip(given[: size.examples], given[size.examples :], strict=True):
            bad = (~w.isfinite()).sum() + (~d.isfinite()).sum()
            w, d = w.float(), d.float()
            rows.append(torch.stack([w.square().sum(), d.square().sum(), (w * d).sum(), bad]))
        return torch.stack(rows)

    return Problem(
        [*tensors, *deltas],
        lambda *given: ours.multi_norm(given[: size.examples], given[size.examples :]),
        fast, (2 * size.examples * size.rows * size.width * dtype.itemsize, 0), exact=aten,
    )  # fmt: skip


def sparse_adamw(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """One AdamW step on one in 64 blocks of 16 entries of each of `examples` weights of (rows, width)."""
    make, count = Make(dtype, device), size.examples
    weights, grads = (
        [make.normal(size.rows, size.width, grad=False) for _ in range(count)] for _ in "wg"
    )
    index = [_blocks_of_16(size.rows * size.width // 16, device) for _ in range(count)]
    state = [torch.rand(one.shape, device=device) for _ in range(2) for one in index]

    def fused(*given: Tensor) -> tuple[Tensor, ...]:
        lists = (*(given[n * count : (n + 1) * count] for n in range(4)), index)
        # A single weight is all that the operator took at first.
        taken: Any = lists if count > 1 else [one for (one,) in lists]
        ours.sparse_adamw_(
            *taken, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, step=STEP
        )
        weights, _, first, second, _ = lists
        return (*weights, *first, *second)

    def aten(*given: Tensor) -> tuple[Tensor, ...]:
        weights, grads, first, second = (given[n * count : (n + 1) * count] for n in range(4))
        for one in zip(weights, grads, first, second, index, strict=True):
            _aten_adamw(*one)
        return (*weights, *first, *second)

    each = 3 * dtype.itemsize + 4 * 4 + 4
    moved = sum(one.numel() for one in index) * each
    return Problem([*weights, *grads, *state], fused, aten, (moved, 0))


def _blocks_of_16(blocks: int, device: str) -> Tensor:
    """The entries of one in 64 blocks, in order."""
    chosen = torch.randperm(blocks, device=device)[: max(1, blocks // 64)].sort().values
    return (chosen.unsqueeze(1) * 16 + torch.arange(16, device=device)).flatten().int()


def _aten_adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, index: Tensor) -> None:
    where = index.long()
    g = grad.view(-1)[where].to(first.dtype)
    values = weight.view(-1)[where].to(first.dtype) * (1 - LR * DECAY)
    first.mul_(BETA1).add_(g, alpha=1 - BETA1)
    second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    root = (second / (1 - BETA2**STEP)).sqrt_().add_(EPS)
    values.addcdiv_(first / (1 - BETA1**STEP), root, value=-LR)
    weight.view(-1)[where] = values.to(weight.dtype)


def masked_update(size: Size, dtype: torch.dtype, device: str) -> Problem:
    """Zero half the entries of a weight and of two moments."""
    make = Make(dtype, device)
    shape = (size.examples * size.rows, size.width)
    tensors = [make.normal(*shape, grad=False) for _ in range(3)]
    mask = torch.rand(shape, device=device) < 0.5

    def fused(*given: Tensor) -> tuple[Tensor, ...]:
        ours.masked_update_(given, mask)
        return given

    def aten(*given: Tensor) -> tuple[Tensor, ...]:
        for tensor in given:
            tensor.mul_(mask)
        return given

    return Problem(tensors, fused, aten, (mask.numel() * (1 + 6 * dtype.itemsize), 0))
