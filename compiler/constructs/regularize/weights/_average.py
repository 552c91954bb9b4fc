"""An average of the weights beside the model, with which evaluation and saving go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, Record

if TYPE_CHECKING:
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.step.record import Step


class Average(Action):
    """Phase 12, when masks have set zeros and replicas have exchanged: updates the average, e <- d e + (1 - d) w.

    `decay_at(step, n)` is d of update n; update 0 copies.
    """

    phase = Phase.OBSERVE

    def __init__(
        self,
        label: str,
        held: Companion,
        decay_at: Callable[[Step, int], float],
        *,
        copies_buffers: bool,
    ) -> None:
        self.name, self.held, self.decay_at = label, held, decay_at
        self.copies_buffers = copies_buffers
        self.updates = 0

    def is_due(self, step: Step) -> bool:
        """Return whether the gate fires at the clock that counts this step."""
        return self.gate is None or self.gate.fires(step.clock_after())

    def run(self, step: Step) -> None:
        if not self.held.made:
            self.updates = 0
        decay = self.decay_at(step, self.updates)
        if self.held.made:
            own = self.held.values.keys() - self.held.parameters
            self.held.follow(decay, copied=own if self.copies_buffers else ())
        else:
            self.held.copy()
        self.held.estimated = False
        self.updates += 1
        step.metrics[f"{self.name}.decay"] = decay

    def state_dict(self) -> ActionState:
        return {"updates": self.updates} if self.updates else {}

    def state_form(self) -> Form:
        return Record({"updates": Count(1)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state.get("updates", 0))

    def summary(self) -> str | None:
        if not self.updates:
            return f"{self.name}: no average was made, so evaluation used the trained weights"
        from trainc.kernels.parameter.multi_norm import multi_norm

        apart = size = 0.0
        for name, (average, now) in self.held.pairs().items():
            if name in self.held.parameters:
                # One at a time: the differences of all take as much memory as the model.
                apart += float(multi_norm([average - now.to(average.dtype)])[0, 0])
                size += float(multi_norm([now])[0, 0])
        distance, norm = apart**0.5, size**0.5
        part = f" ({distance / norm:.2g} of their norm)" if norm else ""
        updates = f"{self.updates} update{'s' * (self.updates > 1)}"
        return (
            f"{self.name}: evaluation and saving use the average of {updates}, {distance:.4g} from the trained weights"
            f"{part}"
        )
