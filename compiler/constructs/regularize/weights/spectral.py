"""Spectral norm regularization: a penalty on the largest singular value of each weight."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.regularize.weights import _power
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward


class Spectral(Construct):
    """Adds `weight / 2 * sum sigma(W)^2` to the loss, where sigma(W) is the largest singular value of a weight.

    A weight is a matrix of its first axis and all others. The singular vector is found by power iteration, `iterations`
    of them before the passes of each step, from the vector of the step before; it is in checkpoints. The gradient is
    that of sigma^2 with this vector held: `weight * sigma u v^T`.
    """

    cite: ClassVar = (
        "Yoshida and Miyato, Spectral Norm Regularization for Improving the Generalizability of Deep Learning, 2017,"
        " arXiv:1705.10941"
    )
    usage: ClassVar = 'regularize spectral on "blocks.**" & ndim(2) { weight = 0.01 }'
    targets: ClassVar = "parameters"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("perturb", "iterate for the singular vectors", ("params",)),
        Effect("forward", "add the penalty", ("params", "clock"), ("loss",)),
    )

    weight: Schedule = Field(description="coefficient of half the squared singular values")
    iterations: int = Field(default=1, ge=1, description="power iterations in each step")

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report parameters that are no matrices, and a selection in which all are frozen."""
        yield from _power.only_matrices(bound)

    def lower(self, to: Lowering) -> None:
        """Keep the singular vectors, and add the penalty on the selected weights that train."""
        names = _power.trained_matrices(to)
        now = partial(_now, to, names)
        vectors = _power.PowerVectors(to.label, now, self.iterations, "weight")
        keys = {name: f"{to.label}:vector:{name}" for name in names}

        def value(forward: Forward) -> Tensor:
            found = (
                self.reference(forward.parameters[name], forward.tensors[key])
                for name, key in keys.items()
            )
            return _summed(found)

        tensors = {keys[name]: vector for name, vector in vectors.vectors.items()}
        to.term(value, over="parameters", weight=self.weight, tensors=tensors)
        to.action(vectors)

    @staticmethod
    def reference(weight: Tensor, vector: Tensor) -> Tensor:
        """Return half of sigma^2 of one weight, 0-d, from its singular vector of the smaller side."""
        matrix, vector = _power.as_matrix(weight), vector.to(weight.device)
        return (vector * _power.apply(matrix, vector, "weight")).sum() / 2


def _now(to: Lowering, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: to.tensor(name).detach() for name in names}


def _summed(values: Iterable[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(values)).sum()
