"""Steps of chosen entries of many weights, which an operator of the optimizer's own updates where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

TOGETHER_ON_CPU, TOGETHER = 1 << 16, 1 << 22
"""Entries that step together, as each takes some 10 bytes meanwhile: as many as make the cost of a call small, which on
a GPU is that of its launches. A weight that has more steps alone."""


@dataclass(slots=True)
class Chosen:
    """Entries of a weight before their step: the weight, their gradient (k,), their flat positions (k,).

    `master` (k,) is updated in the place of the weight, which then gets it rounded; None where that is the weight.
    `state` is what torch's optimizer keeps of them, empty before their first step.
    """

    weight: Tensor
    grad: Tensor
    index: Tensor
    master: Tensor | None
    state: dict[str, Any]


class EntryMask(Protocol):
    """The mask of a parameter of which chosen entries train, `values` (k,)."""

    values: Parameter

    def open_update(self, state: dict[str, Any]) -> Chosen | None:
        """Return the entries before their step; None where there are none, or they have no gradient."""

    def close_update(self, chosen: Chosen) -> None:
        """Note what the step has moved, and free the gradient."""


Update = Callable[[Mapping[str, Any], Sequence[Chosen]], None]
"""Given the options of a group, as torch has them, takes one step of entries of some of its parameters."""


class EntryUpdates:
    """Steps entries of parameters, by name, in place of the torch optimizer, and frees their gradients."""

    def __init__(self, masks: Mapping[str, EntryMask], update: Update) -> None:
        self._masks, self._update = masks, update

    def __contains__(self, name: str) -> bool:
        return name in self._masks

    def step(self, options: Mapping[str, Any], states: Mapping[str, dict[str, Any]]) -> None:
        """Step parameters of one group, given its options, and the state of each by name, as torch has both."""
        opened: list[tuple[EntryMask, Chosen]] = []
        held = 0
        for name, state in states.items():
            mask = self._masks[name]
            count, on_cpu = mask.values.numel(), mask.values.device.type == "cpu"
            if opened and held + count > (TOGETHER_ON_CPU if on_cpu else TOGETHER):
                self._close(options, opened)
                opened, held = [], 0
            if (chosen := mask.open_update(state)) is not None:
                opened.append((mask, chosen))
                held += count
        if opened:
            self._close(options, opened)

    def _close(
        self, options: Mapping[str, Any], opened: Sequence[tuple[EntryMask, Chosen]]
    ) -> None:
        self._update(options, [chosen for _, chosen in opened])
        for mask, chosen in opened:
            mask.close_update(chosen)
