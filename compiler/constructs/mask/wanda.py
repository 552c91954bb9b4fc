"""Wanda: prune the weights that matter least for the inputs that layers are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from trainc.compiler.constructs.mask._base import ZEROS
from trainc.compiler.constructs.mask._calibration import (
    CalibratedMask,
    kept_of,
    wide_rows,
)
from trainc.dsl.reading.construct import Effect

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class Wanda(CalibratedMask):
    """Keeps in each row of a linear layer's weight the entries with the largest |w_ij| ||x_j||, the others at zero.

    ||x_j|| is the L2 norm of input j over all tokens of the first `batches` steps from `from`, of all replicas and
    micro-batches together; the model trains in them as ever. Then each output keeps `density` of its inputs, one at
    least, or n of each m with `structure = n_m(n, m)`, and the other entries are exactly zero after every step of any
    optimizer. Of equal scores the one at the lower position is kept. Entries are not compared between rows, as
    published: every output keeps as many.
    """

    cite: ClassVar = (
        "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,"
        " arXiv:2306.11695"
    )
    usage: ClassVar = (
        "mask wanda on ndim(2) & type(Linear) - role(head) { density = 50%, batches = 1 }"
    )
    functions: ClassVar = (
        *CalibratedMask.functions,
        "trainc.compiler.constructs.mask.wanda:wanda_mask",
    )
    effects: ClassVar = (
        *ZEROS,
        Effect("observe", "sum the squares of the layers' inputs", ("forward",)),
    )

    def lower(self, to: Lowering) -> None:
        """Sum squares of inputs, and choose when they are known."""
        self.prune(to, squares, 1, self.keep)

    def keep(self, weight: Tensor, squares: Tensor, density: float) -> Tensor:
        """Return which entries of a weight (out, in) are kept, by sums of squares (in,)."""
        return wanda_mask(weight, squares.sqrt(), density, str(self.structure))

    def reference(
        self,
        weights: Mapping[str, Tensor],
        inputs: Mapping[str, Sequence[Tensor]],
        gradients: Sequence[Mapping[str, Tensor]],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
    ) -> dict[str, Tensor]:
        """Return the weights after a run with these gradients, whose entries are chosen when `batches` are over.

        `inputs` are those (n, in) of each weight's layer in the first steps; entries are ranked one by one.
        """
        import torch

        trained = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        optimizer, mask = (
            make(list(trained.values())),
            {n: 1.0 * (w == w) for n, w in weights.items()},
        )
        for number, gradient in enumerate(gradients):
            if number == self.batches:
                for n, w in trained.items():
                    norms = torch.cat([*inputs[n]]).square().sum(0).sqrt().tolist()
                    for i, row in enumerate(w.tolist()):
                        scores = [(-abs(value) * norms[j], j) for j, value in enumerate(row)]
                        pruned = sorted(scores)[len(row) - int((1 - self.kept) * len(row)) :]
                        mask[n][i, [j for _, j in pruned]] = 0
                    w.data *= mask[n]
            for n, w in trained.items():
                w.grad = gradient[n] * mask[n]
            optimizer.step()
            for n, w in trained.items():
                w.data *= mask[n]
        return {n: w.detach() for n, w in trained.items()}


def squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each feature of inputs (..., features)."""
    return wide_rows(x).square().sum(0)


def wanda_mask(
    weight: Tensor,
    activation_norm: Tensor,
    density: float | None = None,
    structure: str = "element",
) -> Tensor:
    """Return where the entries of a weight are that Wanda keeps, bool (out, in).

    Each row keeps the largest |`weight`_ij| `activation_norm`_j: all but int((1 - `density`) in) of them, or, with
    the `structure` `"n_m(n, m)"`, also `"n:m"`, n of each m consecutive ones; of equal ones those at lower positions.
    `weight` is (out, in), `activation_norm` (in,) the L2 norm of each input, up to a factor.

    Raises ValueError for norms of another shape or below 0, for a weight or norm that is NaN, for a density that is not
    above 0 and at most 1, and for groups that do not divide the inputs. Source: Sun et al., arXiv:2306.11695,
    equation 1.
    """
    import torch

    if weight.dim() != 2 or activation_norm.shape != weight.shape[1:]:
        raise ValueError(
            f"expected a weight (out, in) and one norm for each input, not {list(weight.shape)} and"
            f" {list(activation_norm.shape)}"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    score = weight.detach().abs().to(wide) * activation_norm.to(weight.device, wide)
    if bool(score.isnan().any()) or bool((activation_norm < 0).any()):
        raise ValueError(
            "a weight times its norm is NaN, or a norm is below 0: entries cannot be compared by such numbers"
        )
    kept, of = kept_of(weight.shape[1], density, structure)
    groups = score.reshape(-1, of)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)
