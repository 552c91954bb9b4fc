"""L2-SP: a penalty on the distance from the weights that training starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward
    from trainc.runtime.step.record import Step


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
        import torch

        from trainc.runtime.processes.sharded import is_sharded, shard_like

        total = None
        for name, parameter in parameters.items():
            start = shard_like(anchors[name], parameter) if name in anchors else None
            if (
                start is None
                or parameter.is_complex()
                or is_sharded(parameter)
                or parameter.itemsize < 4
            ):
                apart = parameter if start is None else parameter - start
                if apart.is_complex():
                    apart = torch.view_as_real(apart)
                wide = apart.to(torch.promote_types(apart.dtype, torch.float32))
                square = wide.square().sum()
            else:  # its backward pass takes the difference again, so that no copy of the weights is kept
                square = torch.nn.functional.mse_loss(parameter, start, reduction="sum")
            total = square if total is None else total + square
        assert total is not None
        return weight / 2 * total


@dataclass(eq=False)
class Anchors(Action):
    """Phase 12: keeps the weights at the start in the checkpoint, and reports the distance from them."""

    phase = Phase.OBSERVE
    name: str
    parameters: Callable[[], Mapping[str, Tensor]]
    starts: Mapping[str, Tensor]

    def run(self, step: Step) -> None:
        """Do nothing: this action only holds state."""

    def state_dict(self) -> ActionState:
        return dict(self.starts)

    def state_form(self) -> Form:
        return Record(
            {name: Values.like(start, finite=True) for name, start in self.starts.items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the start in place, because the loss term reads these tensors.

        The checkpoint of a run without this clause has none: its weights are then the start.
        """
        import torch

        from trainc.runtime.processes.sharded import full, is_sharded, shard_like

        odd = sorted(set(state) ^ set(self.starts))
        if state and odd:
            raise ValueError(
                f"{self.name}: the checkpoint has another selection of parameters; they differ in {', '.join(odd)}"
            )
        with torch.no_grad():
            for name, found in (state or self.parameters()).items():
                if (start := self.starts.get(name)) is not None:
                    start.copy_(shard_like(found, start) if is_sharded(start) else full(found))

    def summary(self) -> str | None:
        import torch

        from trainc.runtime.processes.sharded import is_sharded

        now = self.parameters()
        if any(
            map(is_sharded, now.values())
        ):  # to add up the shards all processes would have to ask
            return None
        with torch.no_grad():
            distance = float(L2Sp.reference(now, self.starts, 2.0)) ** 0.5
        where = "their start" if self.starts else "zero"
        return f"{self.name}: the weights ended {distance:.4g} from {where}"
