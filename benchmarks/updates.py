"""The operators without gradients: measuring and changing weights in place."""

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
    """One AdamW step on one in 64 blocks of 16 entries of (examples * rows, width)."""
    make = Make(dtype, device)
    weight, grad = (make.normal(size.examples * size.rows, size.width, grad=False) for _ in "wg")
    blocks = weight.numel() // 16
    chosen = torch.randperm(blocks, device=device)[: max(1, blocks // 64)].sort().values
    index = (chosen.unsqueeze(1) * 16 + torch.arange(16, device=device)).flatten().int()
    state = [torch.rand(index.shape, device=device) for _ in range(2)]

    def fused(*given: Tensor) -> tuple[Tensor, ...]:
        weight, grad, first, second = given
        ours.sparse_adamw_(
            weight, grad, first, second, index, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS,
            weight_decay=DECAY, step=STEP,
        )  # fmt: skip
        return weight, first, second

    def aten(*given: Tensor) -> tuple[Tensor, ...]:
        weight, grad, first, second = given
        where = index.long()
        g = grad.view(-1)[where].to(first.dtype)
        values = weight.view(-1)[where].to(first.dtype) * (1 - LR * DECAY)
        first.mul_(BETA1).add_(g, alpha=1 - BETA1)
        second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        root = (second / (1 - BETA2**STEP)).sqrt_().add_(EPS)
        values.addcdiv_(first / (1 - BETA1**STEP), root, value=-LR)
        weight.view(-1)[where] = values.to(weight.dtype)
        return weight, first, second

    each = 3 * dtype.itemsize + 4 * 4 + 4
    return Problem([weight, grad, *state], fused, aten, (index.numel() * each, 0))


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
