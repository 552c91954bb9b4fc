"""The action of `regularize l2_sp`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainc.compiler.constructs.regularize.l2_sp import L2Sp
from trainc.runtime.step.action import Action, ActionState, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Step


class Anchors(Action):
    """Phase 12: keeps the weights at the start in the checkpoint, and reports the distance from them."""

    phase = Phase.OBSERVE

    def __init__(
        self, label: str, parameters: Mapping[str, Tensor], starts: Mapping[str, Tensor]
    ) -> None:
        self.name = label
        self.parameters = dict(parameters)
        self.starts = dict(starts)

    def run(self, step: Step) -> None:
        """Do nothing: the action only holds state."""

    def state_dict(self) -> ActionState:
        return dict(self.starts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the start in place, because the loss term reads these tensors.

        The checkpoint of a run without this clause has none: its weights are then the start.
        """
        import torch

        odd = sorted(set(state) ^ set(self.starts))
        if state and odd:
            raise ValueError(
                f"{self.name}: the checkpoint has another selection, which differs in {', '.join(odd)}"
            )
        with torch.no_grad():
            for name, start in self.starts.items():
                start.copy_(state[name] if state else self.parameters[name])

    def summary(self) -> str | None:
        import torch

        with torch.no_grad():
            distance = float(L2Sp.reference(self.parameters, self.starts, 2.0)) ** 0.5
        where = "their start" if self.starts else "zero"
        return f"{self.name}: the weights ended {distance:.4g} from {where}"
