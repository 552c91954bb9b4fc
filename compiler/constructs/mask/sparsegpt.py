"""SparseGPT: prune weights one input after another, and let the others make up for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.mask._base import ZEROS, call_text
from trainc.compiler.constructs.mask._calibration import (
    CalibratedMask,
    kept_of,
    wide_rows,
)
from trainc.dsl.reading.construct import Effect
from trainc.dsl.values.value_json import Call

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class Sparsegpt(CalibratedMask):
    """Keeps `density` of a linear layer's weight W and moves the kept entries so that W x changes little.

    The inputs x of the first `batches` steps from `from`, of all replicas and micro-batches together, give
    H = sum x x^T; the model trains in these steps as ever. Then, before the next forward pass, the inputs of each
    layer are taken one after another, in blocks of `block`: in each block the entries with the smallest w^2 / d^2 go,
    d^2 being the diagonal entry of the inverse of H over the inputs that are left, and the entries of later inputs
    are moved by the step that makes up for it best (optimal brain surgeon). H has `damping` times its mean diagonal
    added to the diagonal. From then on the pruned entries are zero after every step of any optimizer. An input that is
    always zero has no kept entry. Each layer of n inputs holds n * n numbers until entries are chosen.
    """

    cite: ClassVar = (
        "Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023,"
        " arXiv:2301.00774, algorithm 1"
    )
    usage: ClassVar = (
        "mask sparsegpt on ndim(2) & type(Linear) - role(head) { density = 50%, batches = 1 }"
    )
    functions: ClassVar = (
        *CalibratedMask.functions,
        "trainc.compiler.constructs.mask.sparsegpt:sparsegpt",
    )
    effects: ClassVar = (
        Effect(
            "perturb",
            "choose the entries that train, zero the others and move the rest",
            ("params", "clock"),
            ("params", "optimizer_state", "metrics"),
        ),
        *ZEROS[1:],
        Effect("observe", "sum the products of the layers' inputs", ("forward",)),
    )

    block: int = Field(default=128, ge=1, description="inputs whose entries are compared together")
    damping: float = Field(
        default=0.01, gt=0, description="what is added to the diagonal of H, over its mean diagonal"
    )

    @model_validator(mode="after")
    def _block_fits(self) -> Self:
        if isinstance(self.structure, Call):
            group = int(call_text(self.structure).rpartition(",")[2].rstrip(")"))
            if self.block % group:
                raise ValueError(
                    f"a block of {self.block} inputs is no multiple of {group}: write another `block`"
                )
        return self

    def lower(self, to: Lowering) -> None:
        """Sum products of inputs; choose, and move the weights, when they are known."""
        self.prune(to, products, 2, self.keep)

    def keep(self, weight: Tensor, hessian: Tensor, density: float) -> Tensor:
        """Prune a weight (out, in) in place and return which entries are kept, by sums of products (in, in)."""
        structure = str(self.structure)
        moved, kept = sparsegpt(weight, hessian, density, structure, self.block, self.damping)
        weight.copy_(moved)
        return kept

    def reference(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """Return the pruned weight (out, in) for inputs (n, in) by explicit inverses, entry by entry, in float64."""
        import torch

        w, columns = weight.detach().double().clone(), weight.shape[1]
        h = inputs.double().T @ inputs.double()
        dead = h.diagonal() == 0
        h[dead, dead], w[:, dead] = 1.0, 0.0
        h += self.damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        left = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            scores = [
                (float(w[i, j] ** 2 / left[j][0, 0]), i, j)
                for i in range(len(w))
                for j in range(start, stop)
            ]
            count = int((1 - self.kept) * len(scores) + 1e-9)
            pruned = {(i, j) for _, i, j in sorted(scores)[:count]}
            for j in range(start, stop):
                for i in (i for i, column in pruned if column == j):
                    w[i, j:] -= w[i, j] / left[j][0, 0] * left[j][0]
                    w[i, j] = 0.0
        return w


def products(x: Tensor) -> Tensor:
    """Return the sum over rows of the products of every two features of inputs (..., features)."""
    rows = wide_rows(x)
    exact = rows.double()  # which no autocast rounds
    return (exact.T @ exact).to(rows.dtype)


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    density: float | None = None,
    structure: str = "element",
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Return a weight pruned by SparseGPT, (out, in) in its dtype, and where its entries are kept, bool.

    `weight` is (out, in), `hessian` (in, in) the sum of x x^T over inputs, up to a factor; `damping` times its mean
    diagonal is added to the diagonal. Of each `block` of inputs int((1 - `density`) size) entries are pruned, all rows
    together; with the `structure` `"n_m(n, m)"`, also `"n:m"`, n of each m consecutive inputs of a row are kept. It is
    computed in float32 at least.

    Raises ValueError for a weight that is no matrix, for a Hessian of another shape or that is no such sum, for entries
    of either that are not finite, for a density that is not above 0 and at most 1, for a block below 1 or a damping
    below 0, and for groups that do not divide the inputs or the block. Source: Frantar and Alistarh, arXiv:2301.00774,
    algorithm 1.
    """
    import torch

    if weight.dim() != 2 or not weight.isfinite().all():
        raise ValueError(f"expected a finite weight (out, in), not one of shape {[*weight.shape]}")
    if block < 1 or damping < 0:
        raise ValueError(
            f"`block` is {block} and `damping` {damping:g}: expected 1 or more, and 0 or more"
        )
    rows, columns = weight.shape
    if hessian.shape != (columns, columns) or not hessian.isfinite().all():
        raise ValueError(
            f"expected a finite Hessian ({columns}, {columns}) for a weight {[rows, columns]}, not one of shape"
            f" {list(hessian.shape)}"
        )
    groups = kept_of(columns, density, structure)
    n_m = None if structure == "element" else groups
    if n_m is not None and block % n_m[1]:
        raise ValueError(f"a block of {block} inputs is no multiple of {n_m[1]}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    left = weight.detach().to(wide, copy=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    root, dead = _inverse_root(hessian.to(weight.device, wide, copy=True), damping)
    left[:, dead] = 0
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        errors = _prune(left[:, part], kept[:, part], root[part, part], density, n_m)
        left[:, part.stop :] -= errors @ root[part, part.stop :]
    return left.to(weight.dtype), kept & ~dead


def _inverse_root(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the inverse of a damped Hessian, and which inputs are always zero."""
    import torch

    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise ValueError(
            "the damped Hessian is not positive definite: expected a sum of x x^T over inputs, or a larger `damping`"
        )
    inverse = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky(inverse, upper=True), dead


def _prune(
    left: Tensor, kept: Tensor, root: Tensor, density: float | None, n_m: tuple[int, int] | None
) -> Tensor:
    """Prune a block of inputs (out, size) in place, and return the errors that later inputs make up for."""
    import torch

    scores = (left / root.diagonal()).square()
    if n_m is None and density is not None:
        count = int((1 - density) * scores.numel() + 1e-9)
        pruned = scores.flatten().argsort(stable=True)[:count]
        kept.copy_(
            torch.ones_like(scores, dtype=torch.bool)
            .view(-1)
            .index_fill_(0, pruned, False)
            .view_as(kept)
        )
    errors = torch.zeros_like(left)
    for i in range(left.shape[1]):
        if n_m is not None and i % n_m[1] == 0:
            group = (left[:, i : i + n_m[1]] / root.diagonal()[i : i + n_m[1]]).square()
            smallest = group.argsort(dim=1, stable=True)[:, : n_m[1] - n_m[0]]
            kept[:, i : i + n_m[1]] = torch.ones_like(group, dtype=torch.bool).scatter_(
                1, smallest, False
            )
        w = left[:, i].where(~kept[:, i], 0)
        errors[:, i] = w / root[i, i]
        left[:, i:] -= errors[:, i : i + 1] * root[i, i:]
        left[:, i].masked_fill_(~kept[:, i], 0)
    return errors
