"""Squared norms, inner products and non-finite counts of many tensors in one call.

Contract. `tensors` are n floating tensors of any shapes; `deltas` is None or n tensors of the same
shapes. Row i of the (n, 4) float64 result is: sum w^2, sum d^2, sum w*d, and the number of
non-finite entries of w and d together. Without deltas columns 1 and 2 are zero. A tensor with
non-finite entries has non-finite sums. Not differentiable.

Accumulation. 16-bit and float32 entries are summed in float32 within a block of 32768 and in
float64 across blocks, so the error stays near 1e-6 for any size (one float32 norm of 16 million
entries was off by 1e-3); float64 tensors are summed in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.kernels.support import accumulation_dtype, on_demand, require

COLUMNS = 4
BLOCK = 1 << 15


def multi_norm(tensors: Sequence[Tensor], deltas: Sequence[Tensor] | None = None) -> Tensor:
    """(n, 4) float64 sums over n tensors; see the module for the columns."""
    if not tensors:
        return torch.zeros((0, COLUMNS), dtype=torch.float64)
    with torch.no_grad():
        sums: Tensor = torch.ops.trainc.multi_norm(
            list(tensors), [] if deltas is None else list(deltas)
        )
    return sums


def reference(tensors: Sequence[Tensor], deltas: Sequence[Tensor] | None = None) -> Tensor:
    """The definition, tensor by tensor in float64."""
    rows = []
    for index, tensor in enumerate(tensors):
        w = tensor.double()
        d = torch.zeros_like(w) if deltas is None else deltas[index].double()
        broken = (~w.isfinite()).sum() + (~d.isfinite()).sum()
        rows.append(torch.stack([w.square().sum(), d.square().sum(), (w * d).sum(), broken]))
    return torch.stack(rows) if rows else torch.zeros(0, COLUMNS, dtype=torch.float64)


def check(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> None:
    """Reject deltas that do not match the tensors."""
    require(
        not deltas
        or (
            len(deltas) == len(tensors)
            and all(w.shape == d.shape for w, d in zip(tensors, deltas, strict=True))
        ),
        lambda: "deltas must match tensors one to one in shape",
    )


def _blocks(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Flat blocks of all tensors in the accumulation dtype, and the tensor each belongs to."""
    blocks, owners = [], []
    for owner, tensor in enumerate(tensors):
        flat = tensor.reshape(-1).to(accumulation_dtype(tensor.dtype))
        parts = flat.split(BLOCK)
        blocks.extend(parts)
        owners.extend([owner] * len(parts))
    return blocks, torch.tensor(owners, dtype=torch.int64, device=tensors[0].device)


def _squares(blocks: list[Tensor]) -> Tensor:
    """Squared norm of each block, float64."""
    return torch.stack(torch._foreach_norm(blocks)).double().square_()


def eager(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    check(tensors, deltas)
    blocks, owners = _blocks(tensors)
    result = torch.zeros((len(tensors), COLUMNS), dtype=torch.float64, device=owners.device)
    result[:, 0].index_add_(0, owners, _squares(blocks))
    if deltas:
        others, _ = _blocks(deltas)
        result[:, 1].index_add_(0, owners, _squares(others))
        products = [
            torch.dot(left, right.to(left.dtype))
            for left, right in zip(blocks, others, strict=True)
        ]
        result[:, 2].index_add_(0, owners, torch.stack(products).double())
    rows = list(range(len(tensors)))
    if result.device.type == "cpu":
        # A finite sum of squares has only finite terms; elsewhere asking would stall the device.
        rows = (~result[:, :2].isfinite().all(1)).nonzero().flatten().tolist()
    for row in rows:
        both = [tensors[row], deltas[row]] if deltas else [tensors[row]]
        result[row, 3] = torch.stack([(~tensor.isfinite()).sum() for tensor in both]).sum()
    return result


_operator = torch.library.custom_op(
    "trainc::multi_norm", eager, mutates_args=(), device_types="cpu"
)


@_operator.register_fake
def _(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    check(tensors, deltas)
    return tensors[0].new_empty((len(tensors), COLUMNS), dtype=torch.float64)


_operator.register_kernel("cuda")(on_demand("triton_multi_norm", "multi_norm"))
