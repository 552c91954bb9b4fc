"""L2-SP: a penalty on the distance from the weights that training starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward


class L2Sp(Construct):
    """Adds `weight / 2 * sum ||w - w0||^2` to the loss, where w0 are the weights at the start.

    w0 are the weights with which the program was first built, also after a resume; with `to = zero`
    they are 0. Unlike decoupled weight decay, the penalty is part of the gradient, and so of the
    optimizer's moments.
    """

    cite: ClassVar = (
        "Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with "
        "Convolutional Networks, ICML 2018, arXiv:1802.01483"
    )
    usage: ClassVar = "regularize l2_sp on ndim(2) { weight = 0.01 }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("forward", "add the penalty", ("params", "clock"), ("loss",)),
        Effect("observe", "keep the weights at the start", ("params",)),
    )

    weight: Schedule = Field(description="coefficient of half the squared distance")
    to: Literal["start", "zero"] = Field(
        default="start",
        description="what the distance is taken from: the weights at the start, or zero",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report a selection in which all parameters are frozen."""
        if bound.parameters and not any(p.trainable for p in bound.parameters):
            message = f"all {len(bound.parameters)} selected parameters are frozen"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")

    def lower(self, to: Lowering) -> None:
        """Add the penalty on the selected parameters that train, and keep their start in the program's state."""
        from trainc.runtime.companion.start import Anchors

        names = [entry.name for entry in to.parameters() if entry.trainable]
        starts: dict[str, Tensor] = {}
        if self.to == "start":
            starts = {name: to.tensor(name).detach().clone() for name in names}
        keys = {name: f"{to.label}:start:{name}" for name in starts}
        coefficient = f"{to.label}:weight"
        weight = to.schedule(self.weight)

        def value(forward: Forward) -> Tensor:
            anchors = {name: forward.tensors[key] for name, key in keys.items()}
            parameters = {name: forward.parameters[name] for name in names}
            return self.reference(parameters, anchors, forward.tensors[coefficient])

        tensors = {keys[name]: tensor for name, tensor in starts.items()}
        to.term(value, over="parameters", scalars={coefficient: weight}, tensors=tensors)

        def now() -> dict[str, Tensor]:
            return {name: to.tensor(name) for name in names}  # sharding puts others in their place

        to.action(Anchors(to.label, now, starts))

    @staticmethod
    def reference(
        parameters: Mapping[str, Tensor], anchors: Mapping[str, Tensor], weight: Tensor | float
    ) -> Tensor:
        """Return the penalty, 0-d, float32 at least; a parameter without an anchor has its distance from zero."""
        from trainc.runtime.companion.start import squared_distance

        return weight / 2 * squared_distance(parameters, anchors)
