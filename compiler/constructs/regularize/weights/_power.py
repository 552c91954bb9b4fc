"""The largest singular values of weights by power iteration, whose vectors are kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from trainc.dsl.reading.construct import Problem
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step

FIRST = 15
"""Iterations more in the first step, which starts from a random vector."""
Of = Literal["weight", "excess"]
"""Of W^T W, or of W^T W - I."""


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, float32 at least: its first axis and all others."""
    import torch

    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def gram(matrix: Tensor) -> Tensor:
    """Return the smaller of W^T W and W W^T, which have the same eigenvalues but for zeros."""
    import torch

    with torch.autocast(matrix.device.type, enabled=False):
        return matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix


def apply(matrix: Tensor, vector: Tensor, of: Of) -> Tensor:
    """Return the smaller Gram matrix times a vector, less the vector for `excess`."""
    import torch

    wide = matrix.shape[0] < matrix.shape[1]
    with torch.autocast(matrix.device.type, enabled=False):
        product = matrix @ (matrix.mT @ vector) if wide else matrix.mT @ (matrix @ vector)
    return product - vector if of == "excess" else product


def power_iteration(matrix: Tensor, vector: Tensor, iterations: int, of: Of) -> Tensor:
    """Return a unit vector nearer to the eigenvector whose eigenvalue is the largest in size."""
    import torch

    for _ in range(iterations):
        vector = torch.nn.functional.normalize(apply(matrix, vector, of), dim=0)
    return vector


class PowerVectors(Action):
    """Phase 3: iterates once or more before the passes of a step; the vectors are in checkpoints."""

    phase = Phase.PERTURB

    def __init__(
        self,
        name: str,
        parameters: Callable[[], Mapping[str, Tensor]],
        iterations: int,
        of: Of,
    ) -> None:
        self.name, self.parameters, self.iterations, self.of = name, parameters, iterations, of
        self.vectors = {name: _start(name, weight) for name, weight in parameters().items()}
        self.steps = 0

    def run(self, step: Step) -> None:
        import torch

        count = self.iterations + (0 if self.steps else FIRST)
        with torch.no_grad():
            for name, weight in self.parameters().items():
                vector = self.vectors[name]
                now = vector.to(weight.device)
                vector.copy_(power_iteration(as_matrix(weight), now, count, self.of))
        self.steps += 1

    def memory(self) -> int:
        """Return the bytes of the vectors."""
        return sum(vector.nbytes for vector in self.vectors.values())

    def state_dict(self) -> ActionState:
        return dict(self.vectors) if self.steps else {}

    def state_form(self) -> Form:
        return Record({name: Values.like(v, finite=True) for name, v in self.vectors.items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the vectors in place, because the loss term reads them; of none the iteration starts anew."""
        odd = sorted(set(state) ^ set(self.vectors))
        if state and odd:
            raise ValueError(
                f"{self.name}: the checkpoint has another selection of parameters; they differ in {', '.join(odd)}"
            )
        self.steps = int(bool(state))
        for name, vector in self.vectors.items():
            vector.copy_(state[name] if state else _start(name, self.parameters()[name]))


def _start(name: str, weight: Tensor) -> Tensor:
    """Return a random unit vector, the same for the same name."""
    import torch

    from trainc.runtime.storage.random_streams import derive_seed

    rows, columns = weight.shape[0], weight[0].numel()
    drawn = torch.Generator().manual_seed(derive_seed(0, f"power iteration of {name}"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    vector = torch.randn(min(rows, columns), generator=drawn, dtype=dtype)
    return torch.nn.functional.normalize(vector, dim=0).to(weight.device)


def only_matrices(bound: Targets) -> Iterable[Problem]:
    """Report selected parameters that are no matrices, and a selection in which all are frozen."""
    for entry in bound.parameters:
        if entry.ndim < 2 or not entry.numel or not entry.dtype.startswith(("float", "bfloat")):
            yield Problem(
                "wrong-target-kind",
                f"`{entry.name}` of shape {list(entry.shape)} has no singular values",
                help="select matrices and kernels only, such as `& ndim(2..)`",
            )
    if bound.parameters and not any(p.trainable for p in bound.parameters):
        message = f"all {len(bound.parameters)} selected parameters are frozen"
        yield Problem("selector-matches-frozen", message, help="select among `trainable`")


def trained_matrices(to: Lowering) -> list[str]:
    """Return the selected parameters that train; raises ValueError for one that is sharded, or no weight itself."""
    from trainc.compiler.structure.computed_weights import refuse_other_singular_values

    names = [entry.name for entry in to.parameters() if entry.trainable]
    for name in names:
        refuse_other_singular_values(to.model, name)
    to.refuse_shards(
        names,
        "its penalty is of whole matrices",
        "Use DistributedDataParallel, or remove the clause",
    )
    return names
