"""Gradients at shifted weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect
from trainc.runtime.step.around import Around, KeptWeights

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.around import Gradients
    from trainc.runtime.step.record import Step


class Shifted(Construct):
    """Runs the passes of a step at weights that `by` was added to."""

    cite: ClassVar = "nobody"
    usage: ClassVar = "perturb shifted on ndim(2) from 2 steps { by = 0.25 }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"by": "0"}
    effects: ClassVar = (Effect("perturb", "shift the weights", ("params",), ("params",)),)

    by: float = Field(description="what is added to each weight")

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step."""
        to.around(Shift(to.label, [entry.name for entry in to.parameters()], self.by))


class Shift(Around):
    """Holds the weights at w + by."""

    def __init__(self, name: str, names: Sequence[str], by: float) -> None:
        self.name, self.names, self.by = name, names, by

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Shift, and give the weights their values back."""
        weights = [step.parameters[name].detach() for name in self.names]
        with KeptWeights(weights):
            for weight in weights:
                weight.add_(self.by)
            yield
