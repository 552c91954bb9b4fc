"""Compare what a fresh graph computes with what the bound modules compute, before the graph is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_ALLOWED = {torch.float64: 1e-7, torch.float32: 1e-3}
"""The difference that rounding explains, relative to a tensor's norm, by dtype; in 16 bits 0.1."""
_FLOOR = 1e-2
"""A tensor is compared as if its norm were at least this fraction of the largest: smaller ones may be rounding."""


class TrialResult(NamedTuple):
    """One micro-batch's differentiated loss, gradients, and per-example squared norms by parameter."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    squares: dict[str, Tensor]


def difference(
    graph: TrialResult, modules: TrialResult, dtypes: Iterable[torch.dtype]
) -> str | None:
    """Say what a graph computes differently from the bound modules, None where nothing is.

    `dtypes` are those of the computation: the coarsest decides what rounding explains. Where the modules' loss is not
    finite, nothing can be said.
    """
    if not torch.isfinite(modules.loss):
        return None
    if not _comparable(graph.loss, modules.loss):
        return f"the loss has the shape {list(graph.loss.shape)} and the dtype {graph.loss.dtype} by the graph"
    want, got = float(modules.loss), float(graph.loss)
    allowed = max((_ALLOWED.get(dtype, 0.1) for dtype in dtypes), default=0.1)
    if not abs(got - want) <= allowed * max(abs(want), _FLOOR):
        return f"the loss is {got:.6g} by the graph and {want:.6g} by the modules"
    worst = _worst(graph.gradients, modules.gradients, allowed)
    if worst is not None:
        return f"the gradient of `{worst}` is not the one by the modules"
    worst = _worst(graph.squares, modules.squares, 2 * allowed)
    return (
        None
        if worst is None
        else f"the per-example norms of `{worst}` are not those by the modules"
    )


def disagreement(
    got: Mapping[str, Tensor | None],
    want: Mapping[str, Tensor | None],
    dtypes: Iterable[torch.dtype],
) -> str | None:
    """Return the name of the result of one pass that differs most in another of the same; None where rounding explains.

    Results whose names begin alike up to a colon are compared as of one size. Entries that are not finite must be the
    same.
    """
    allowed = max((_ALLOWED.get(dtype, 0.1) for dtype in dtypes), default=0.1)
    groups: dict[str, list[str]] = {}
    for name in want:
        groups.setdefault(name.partition(":")[0], []).append(name)
    found = (
        _worst({n: got.get(n) for n in names}, {n: want[n] for n in names}, allowed, finite=True)
        for names in groups.values()
    )
    return next(filter(None, found), None)


def _worst(
    got: Mapping[str, Tensor | None],
    want: Mapping[str, Tensor | None],
    allowed: float,
    *,
    finite: bool = False,
) -> str | None:
    """Return the name of the tensor that differs most; None where none differs by more than is allowed.

    With `finite` entries that are not finite in both are left out.
    """
    names = list(dict.fromkeys([*want, *got]))
    pairs = [_norms(got.get(name), want.get(name), finite=finite) for name in names]
    if not pairs:
        return None
    gaps, norms = torch.stack(pairs).unbind(1)
    relative = gaps / norms.clamp(min=_FLOOR * float(norms.max())).clamp(min=1e-30)
    relative = relative.nan_to_num(nan=torch.inf)
    worst = int(relative.argmax())
    return names[worst] if relative[worst] > allowed else None


def _norms(got: Tensor | None, want: Tensor | None, *, finite: bool) -> Tensor:
    """Return the norm of the difference and of what is wanted, on the CPU in float64; None counts as zeros."""
    like = want if got is None else got
    if like is None:
        return torch.zeros(2, dtype=torch.float64)
    one, two = (_dense(tensor, like) for tensor in (got, want))
    if not _comparable(one, two):
        return torch.tensor([torch.inf, 1.0], dtype=torch.float64)
    if finite:
        same = (one == two) | (one.isnan() & two.isnan())
        one, two = (x.masked_fill(same & ~x.isfinite(), 0) for x in (one, two))
    return torch.stack([(one - two).norm(), two.norm()]).double().cpu()


def _comparable(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.is_complex() == two.is_complex()


def _dense(tensor: Tensor | None, like: Tensor) -> Tensor:
    if tensor is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense if dense.dtype == torch.float64 or dense.is_complex() else dense.float()
