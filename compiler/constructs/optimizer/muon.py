"""Muon: orthogonalised momentum for matrices, and another optimizer for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.optimizer._base import Optimizer
from trainc.compiler.errors import FieldError
from trainc.compiler.model.import_path import ImportProblem
from trainc.dsl.reading.construct import NestedClause, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering

FIRST_VERSION = "2.9"


class Muon(Optimizer):
    """Steps along the orthogonalised momentum of each matrix: `w = w - lr (scale O + decay w)`, with O near U V'.

    `b = momentum b + (1 - momentum) g`; with `nesterov`, `u = momentum b + (1 - momentum) g`, else `u = b`. O is u
    after `ns_steps` Newton-Schulz steps in bfloat16, `x = a x + (b A + c A A) x` with `A = x x'`, from u / |u|: all of
    its singular values are near 1. `scale` depends on the shape of the matrix alone (`adjust_lr_fn`). It is
    `torch.optim.Muon`, bit for bit.

    Without `on` it trains the weights with two axes that are no embedding and no head. `others` trains everything else
    that is trainable: `others = adamw { lr = 3e-4 }` is the same as a clause `optimizer adamw` on `trainable - (...)`,
    and has its name. Any other division is two clauses with selectors. A parameter that none of them selects is an
    error, and so is one that two select.

    Every entry of an update depends on the whole matrix. So a matrix may not be sharded over processes (FSDP2), nor
    have a `mask`. `lr` clauses multiply its rate, and `lr trust_ratio` scales the whole update. Several matrices in one
    tensor, such as q, k and v, are orthogonalised as one. Convolutions and stacks of experts, which have more than two
    axes, are for `others`.
    """

    cite: ClassVar = (
        "Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,"
        " kellerjordan.github.io/posts/muon; `match_rms_adamw`: Liu et al., Muon is Scalable for LLM Training,"
        " arXiv:2502.16982"
    )
    usage: ClassVar = (
        "optimizer muon { lr = 0.02, weight_decay = 0.01, others = adamw { lr = 3e-4 } }"
    )
    default_on: ClassVar = "ndim(2) - role(embedding) - role(head)"
    nests: ClassVar = "others"
    decay_form: ClassVar = "decoupled"
    entrywise: ClassVar = False

    momentum: float = Field(
        default=0.95, ge=0, lt=1, description="weight of the previous momentum buffer, in [0, 1)"
    )
    nesterov: bool = Field(default=True, description="use Nesterov momentum")
    ns_coefficients: tuple[float, float, float] = Field(
        default=(3.4445, -4.775, 2.0315),
        description="a, b and c of the Newton-Schulz polynomial `a x + b x^3 + c x^5`",
    )
    ns_steps: int = Field(default=5, ge=1, lt=100, description="Newton-Schulz steps")
    eps: float = Field(
        default=1e-7, gt=0, description="smallest norm that the momentum is divided by"
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        default="original",
        description="scale of the update of a matrix with A rows and B columns: `original` is sqrt(max(1, A / B)),"
        " `match_rms_adamw` 0.2 sqrt(max(A, B)), with which rates of AdamW fit",
    )
    others: NestedClause | None = Field(
        default=None,
        description="the optimizer of everything that this clause does not train: `adamw { lr = 3e-4 }`",
    )

    @property
    def averages_gradients(self) -> bool:
        """True: the momentum buffer."""
        return True

    @property
    def moments(self) -> float:
        """Return 1, the momentum buffer."""
        return 1

    def scale(self, rows: float, columns: float) -> float:
        """Return what the update of a matrix is multiplied by, beside the rate."""
        if self.adjust_lr_fn == "original":
            return float(max(1.0, rows / columns) ** 0.5)
        return float(0.2 * max(rows, columns) ** 0.5)

    def update_norm(self, out: float, into: float) -> float:
        """Return the scale of the update, whose singular values are equal."""
        return self.scale(out, into)

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Refuse what is no matrix."""
        other = next((p for p in bound.parameters if p.ndim != 2), None)
        if other is not None:
            yield Problem(
                "bad-value",
                f"`optimizer muon` trains matrices, and `{other.name}` has {other.ndim}"
                f" {'axis' if other.ndim == 1 else 'axes'}",
                help=f"select weights with two axes (`& ndim(2)`): `others` trains `{other.name}`",
            )

    def examine(self) -> None:
        """Raise ImportProblem where this PyTorch has no Muon."""
        import torch

        if not hasattr(torch.optim, "Muon"):
            raise ImportProblem(
                "missing-library",
                f"this PyTorch ({torch.__version__}) has no `torch.optim.Muon`",
                help=f"install PyTorch {FIRST_VERSION} or later, or use another optimizer",
                field="head",
            )

    def lower(self, to: Lowering) -> None:
        """Claim the matrices; raises FieldError for one that is sharded or complex, or has sparse gradients."""
        for name in to.clause.targets:
            if to.is_sharded(name):
                raise FieldError("on", _sharded(f"`{name}`"))
            if to.tensor(name).is_complex():
                raise FieldError(
                    "on", f"`{name}` is complex, and Muon takes real matrices: leave it to `others`"
                )
            if to.has_sparse_gradient(name):
                raise FieldError(
                    "on",
                    f"the gradient of `{name}` is sparse, and Muon takes dense ones: leave it to `others`",
                )
        super().lower(to)

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        from trainc.runtime.processes.sharded import is_sharded

        for group in groups:
            if any(map(is_sharded, group["params"])):
                raise ValueError(f"{self.title}: {_sharded('a matrix')}")
        return torch.optim.Muon(
            groups,
            lr=1.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_coefficients=self.ns_coefficients,
            ns_steps=self.ns_steps,
            eps=self.eps,
            adjust_lr_fn=self.adjust_lr_fn,
        )

    def reference(
        self, w: Tensor, gradients: list[Tensor], lr: float, weight_decay: float = 0.0
    ) -> Tensor:
        """Return `w` after one update per gradient, by definition; all of one shape."""
        import torch

        a, b, c = self.ns_coefficients
        buffer = torch.zeros_like(w)
        for g in gradients:
            buffer = buffer + (1 - self.momentum) * (g - buffer)
            u = g + self.momentum * (buffer - g) if self.nesterov else buffer
            tall = u.size(0) > u.size(1)
            x = (u.T if tall else u).bfloat16()
            x = x / x.norm().clamp(min=self.eps)
            for _ in range(self.ns_steps):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = (x.T if tall else x).to(w.dtype)
            w = w - lr * weight_decay * w - lr * self.scale(*w.shape) * x
        return w


def _sharded(what: str) -> str:
    return (
        f"{what} is sharded over processes (FSDP2), and Muon needs the whole of it: use DistributedDataParallel, or"
        " leave it to another optimizer"
    )
