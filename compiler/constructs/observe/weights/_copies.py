"""Copies of parameters, each in its own dtype, and sums over parameters and their changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.step.record import Step


def sums(weights: Sequence[Tensor], changes: Sequence[Tensor] | None = None) -> Tensor:
    """Return what `multi_norm` does; of sharded parameters each process has the sums of its shards, which are added."""
    from trainc.kernels.parameter.multi_norm import multi_norm
    from trainc.runtime.processes.sharded import local, sum_over_shards

    rows = multi_norm([*map(local, weights)], None if changes is None else [*map(local, changes)])
    sum_over_shards(rows, weights)
    return rows


def note_non_finite(step: Step, name: str, broken: Sequence[str]) -> None:
    """Say which parameters have entries that are not finite, where some have."""
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        step.notes.append(f"{name}: entries that are not finite in `{broken[0]}`{more}")


def record(step: Step, name: str, found: Mapping[str, float]) -> None:
    """Set signals of a clause, and keep them with the step."""
    named = {f"{name}.{measure}": value for measure, value in found.items()}
    step.metrics.update(named)
    step.signals.update(named)


class Copies(Action):
    """An action that keeps a copy of its parameters, each in its own dtype."""

    reads_shards = True

    def __init__(self, name: str, parameters: Iterable[ParameterEntry]) -> None:
        self.name = name
        parameters = tuple(parameters)
        self.sizes = {entry.name: entry.bytes for entry in parameters}
        self.forms = {entry.name: (entry.shape, entry.dtype) for entry in parameters}
        self.copies: dict[str, Tensor] = {}

    def memory(self) -> int:
        """Return the bytes of the copies."""
        return sum(self.sizes.values())

    def keep(self, step: Step) -> None:
        """Copy the parameters as they are now."""
        for name in self.sizes:
            now = step.parameters[name].detach()
            if name in self.copies:
                self.copies[name].copy_(now)
            else:
                self.copies[name] = now.clone()

    def state_dict(self) -> ActionState:
        return {f"previous/{name}": tensor for name, tensor in self.copies.items()}

    def state_form(self) -> Form:
        return Record(self.copied_forms())

    def copied_forms(self) -> dict[str, Form]:
        """Return the forms of the copies in a checkpoint."""
        return {f"previous/{n}": Values(s, d) for n, (s, d) in self.forms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = {key.partition("/")[2]: key for key in state if key.startswith("previous/")}
        if found and found.keys() != self.sizes.keys():
            names = ", ".join(sorted(found.keys() ^ self.sizes.keys()))
            raise ValueError(
                f"{self.name}: the checkpoint has another selection of parameters; they differ in {names}"
            )
        self.copies = {name: state[found[name]].clone() for name in self.sizes if found}


class Start(Copies):
    """Phase 2: copy the parameters the first time, before that step's update."""

    phase = Phase.RATES

    def __init__(self, name: str, parameters: Iterable[ParameterEntry]) -> None:
        super().__init__(name, parameters)
        self.updates = 0
        """How many updates there were before."""

    def run(self, step: Step) -> None:
        if not self.copies:
            self.updates = step.clock.steps
            self.keep(step)

    def state_dict(self) -> ActionState:
        found = super().state_dict()
        return {**found, "updates": self.updates} if found else found

    def state_form(self) -> Form:
        return Record({**self.copied_forms(), "updates": Count()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates = int(state.get("updates", 0))
