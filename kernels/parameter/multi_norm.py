"""Squared norms, inner products and non-finite counts of many tensors in one call.

Entries are widened to float64 before they are squared on a CPU, so errors are near 1e-15 for any size
and nothing that is finite in 16 or 32 bits overflows (one float32 norm of 16 million entries was off by
1e-3). On CUDA, see `triton_multi_norm`.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainc.kernels.library.contracts import lazy, require
from trainc.kernels.library.register import on_lists, register_update

__all__ = ["multi_norm"]

COLUMNS = 4
# Entries widened at a time: two blocks of float64 are 2 MB, still in cache; smaller ones took longer.
BLOCK = 1 << 17


def multi_norm(tensors: Sequence[Tensor], deltas: Sequence[Tensor] | None = None) -> Tensor:
    """Sum squares and products of many tensors in one call, and count what is not finite.

    `tensors` are n floating or complex tensors w of any shapes and dtypes on one device; `deltas` is None or n tensors
    d of the same shapes, such as their changes in a step. A complex tensor counts as its real and imaginary parts.
    Returns (n, 4) in float64 on that device, without gradient. Row i is sum w^2, sum d^2, sum w * d, and the number of
    non-finite entries of w and d together. Without deltas columns 1 and 2 are zero. A non-finite entry makes the sums
    that it enters non-finite. No tensors give (0, 4) on the CPU.

    Raises RuntimeError for deltas that do not match the tensors in number and shapes.
    """
    if deltas is not None and len(deltas) != len(tensors):
        raise RuntimeError(
            f"deltas must be as many as tensors: there are {len(deltas)} deltas and {len(tensors)} tensors"
        )
    if not tensors:
        return torch.zeros((0, COLUMNS), dtype=torch.float64)
    with torch.no_grad():
        sums: Tensor = _call(tensors, [] if deltas is None else deltas)
    return sums


def _parts(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the tensors, complex ones as their real and imaginary parts along a new last axis."""
    if not any_complex([one.dtype for one in tensors]):
        return tensors
    return [
        torch.view_as_real(one.detach().resolve_conj()) if one.is_complex() else one
        for one in tensors
    ]


def any_complex(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether one of the dtypes is complex: many tensors have few dtypes, and each is asked once."""
    return any(dtype.is_complex for dtype in set(dtypes))


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
    """Reject deltas that do not match the tensors, and complex tensors."""
    check_real([one.dtype for one in (*tensors, *deltas)])
    check_shapes(tensors, deltas)


def check_real(dtypes: Iterable[torch.dtype]) -> None:
    """Reject complex dtypes."""
    require(not any_complex(dtypes), lambda: "tensors and deltas must be real, not complex")


def check_shapes(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> None:
    """Reject deltas that do not match the tensors in number and shapes."""
    require(
        not deltas or [w.shape for w in tensors] == [d.shape for d in deltas],
        lambda: "deltas must be as many as tensors, and each of the shape of its tensor",
    )


def _widened(flat: Tensor, blocks: Tensor, start: int) -> Tensor:
    """The entries of a flat tensor from `start` on, in float64, in the memory of `blocks`."""
    block = flat[start : start + blocks.shape[0]]
    return blocks[: block.shape[0]].copy_(block)


def _sums(w: Tensor, d: Tensor | None, memory: Tensor) -> list[float]:
    """The four sums of one tensor; `memory` is float64 (2, BLOCK)."""
    left, right = w.reshape(-1), None if d is None else d.reshape(-1)
    ww = dd = wd = 0.0
    for start in range(0, left.numel(), memory.shape[1]):
        one = _widened(left, memory[0], start)
        ww += torch.dot(one, one).item()
        if right is not None:
            two = _widened(right, memory[1], start)
            dd += torch.dot(two, two).item()
            wd += torch.dot(one, two).item()
    broken = 0
    # A finite sum of squares has only finite terms.
    if not math.isfinite(ww + dd):
        both = [w] if d is None else [w, d]
        broken = sum(int((~tensor.isfinite()).sum()) for tensor in both)
    return [ww, dd, wd, broken]


def eager(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    check(tensors, deltas)
    if tensors[0].device.type != "cpu":  # what follows would wait for a device at every block
        return reference(tensors, deltas or None)
    memory = tensors[0].new_empty((2, BLOCK), dtype=torch.float64)
    rows = [_sums(w, deltas[i] if deltas else None, memory) for i, w in enumerate(tensors)]
    return torch.tensor(rows, dtype=torch.float64)


def fake(tensors: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    check(tensors, deltas)
    return tensors[0].new_empty((len(tensors), COLUMNS), dtype=torch.float64)


_cuda = lazy("parameter.triton_multi_norm", "multi_norm")
_operator = register_update("multi_norm", cpu=eager, cuda=_cuda, fake=fake)
_call = on_lists(_operator, cuda=_cuda, prepare=_parts)
