"""Changes of what an optimizer adds to the weights, made before it is added."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Step


@dataclass(slots=True)
class Update:
    """What the optimizer adds to one parameter in a step.

    `before` are the weights before the step, to be read only; where a mask selects entries, those entries (k,), and
    `index` (k,) says where they are among all, in order.
    `change`, of the same shape and dtype, is what will be added to them: transforms change it in place. `lr` is the
    learning rate of the step, with all of its factors.
    """

    name: str
    before: Tensor
    change: Tensor
    lr: float
    index: Tensor | None = None


class UpdateTransform(Action):
    """Phase 10, first: changes the updates of some parameters. Subclasses write `change`.

    The compiler sets `parameters`, names, and `held`, the updates of the step by name.
    """

    phase = Phase.DELTAS
    parameters: tuple[str, ...] = ()
    of_rate: bool = False
    """Whether what it does is a part of the learning rate: then it runs after all that changes updates."""
    held: Mapping[str, Update]

    @abstractmethod
    def change(self, updates: Sequence[Update], step: Step) -> None:
        """Change each `update.change` in place; only parameters with a gradient in this step are among them."""

    def run(self, step: Step) -> None:
        if found := [self.held[name] for name in self.parameters if name in self.held]:
            self.change(found, step)
