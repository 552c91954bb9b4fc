"""Orthogonality: a penalty on the distance of each weight from an orthogonal matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainc.compiler.constructs.regularize.weights import _power
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward


class Orthogonal(Construct):
    """Adds `weight` times the sum over the selected weights of |W^T W - I|_F^2, or of a spectral norm, to the loss.

    A weight W is a matrix of its first axis and all others. Of a wide one |W W^T - I|_F^2 is computed, which is smaller
    by the constant columns - rows and has the same gradient; the metric is that of W^T W. With `form = srip` the term
    is the largest |s^2 - 1| of the singular values s: the spectral norm of W^T W - I, of a wide weight of W W^T - I,
    since the former is never below 1 there. Its vector is found by power iteration, `iterations` of them before the
    passes of each step, from the vector of the step before, and is in checkpoints.
    """

    cite: ClassVar = (
        "Brock et al., Neural Photo Editing with Introspective Adversarial Networks, ICLR 2017, arXiv:1609.07093; srip:"
        " Bansal, Chen and Wang, Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?, NeurIPS"
        " 2018, arXiv:1810.09102"
    )
    usage: ClassVar = 'regularize orthogonal on "blocks.**" & ndim(2) { weight = 1e-3 }'
    targets: ClassVar = "parameters"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("perturb", "iterate for the eigenvectors", ("params",)),
        Effect("forward", "add the penalty", ("params", "clock"), ("loss",)),
    )

    weight: Schedule = Field(description="coefficient of the penalty")
    form: Literal["frobenius", "srip"] = Field(
        default="frobenius",
        description="the squared Frobenius norm of W^T W - I, or its spectral norm (`srip`)",
    )
    iterations: int | None = Field(
        default=None, ge=1, description="power iterations in each step, for `srip`; 2 unless given"
    )

    @field_validator("iterations")
    @classmethod
    def _of_srip(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("form") != "srip":
            raise ValueError("`iterations` is part of `form = srip`: add it, or remove this")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report parameters that are no matrices, and a selection in which all are frozen."""
        yield from _power.only_matrices(bound)

    def performs(self, effect: Effect) -> bool:
        """Say whether it iterates, which the Frobenius norm needs not."""
        return effect.phase != "perturb" or self.form == "srip"

    def lower(self, to: Lowering) -> None:
        """Add the penalty on the selected weights that train; for `srip` keep their vectors."""
        import torch

        names = _power.trained_matrices(to)
        keys: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        if self.form == "srip":

            def now() -> dict[str, Tensor]:
                return {name: to.tensor(name).detach() for name in names}

            vectors = _power.PowerVectors(to.label, now, self.iterations or 2, "excess")
            keys = {name: f"{to.label}:vector:{name}" for name in names}
            tensors = {keys[name]: vector for name, vector in vectors.vectors.items()}
            to.action(vectors)

        def value(forward: Forward) -> Tensor:
            found = []
            for name in names:
                vector = forward.tensors[keys[name]] if keys else None
                found.append(self.reference(forward.parameters[name], vector))
            return torch.stack(found).sum()

        to.term(value, over="parameters", weight=self.weight, tensors=tensors)

    @staticmethod
    def reference(weight: Tensor, vector: Tensor | None = None) -> Tensor:
        """Return |W^T W - I|_F^2 of one weight, or with an eigenvector of the smaller side its |v^T (W^T W - I) v|."""
        import torch

        matrix = _power.as_matrix(weight)
        rows, columns = matrix.shape
        if vector is not None:
            vector = vector.to(weight.device)
            return (vector * _power.apply(matrix, vector, "excess")).sum().abs()
        own = _power.gram(matrix)
        apart = own - torch.eye(len(own), dtype=own.dtype, device=own.device)
        return apart.square().sum() + max(columns - rows, 0)
