"""The weights that training starts from, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Step


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
        """Restore the start in place, because terms and hooks read these tensors.

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
            distance = float(squared_distance(now, self.starts)) ** 0.5
        where = "their start" if self.starts else "zero"
        return f"{self.name}: the weights ended {distance:.4g} from {where}"


def squared_distance(parameters: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of squared distances, 0-d, float32 at least; a parameter without an anchor has that from zero."""
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
    return total
