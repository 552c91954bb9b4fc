"""The longest that the weights have been."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import Action, ActionState, Phase

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class Length(Construct):
    """Reports the largest norm that the selected weights have had so far."""

    cite: ClassVar = "nobody"
    usage: ClassVar = "observe length on ndim(2) every 2 steps"
    targets: ClassVar = "parameters"
    signals: ClassVar = {"most": Signal("largest norm so far", title="at most")}
    effects: ClassVar = (Effect("observe", "measure", ("params",), ("metrics", "signal:most")),)

    def lower(self, to: Lowering) -> None:
        """Measure at the end of a step."""
        to.action(Longest(to.label, [entry.name for entry in to.parameters()]))


@dataclass(eq=False)
class Longest(Action):
    """Phase 12: measure; the state is the largest norm."""

    phase = Phase.OBSERVE
    name: str
    names: Sequence[str]
    most: float = 0.0

    def run(self, step: Step) -> None:
        """Set the signal."""
        norms = [float(step.parameters[name].detach().norm()) for name in self.names]
        self.most = max([self.most, *norms])
        step.metrics[f"{self.name}.most"] = step.signals[f"{self.name}.most"] = self.most

    def state_dict(self) -> ActionState:
        """Return the largest norm."""
        return {"most": self.most}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.most = float(state.get("most", 0.0))

    def summary(self) -> str | None:
        """Say what was found."""
        return f"{self.name}: at most {self.most:.4g}"
