"""What all clauses of one program share while they are lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from trainc.compiler.model.inventory import Inventory
    from trainc.runtime.schedule.clock import RunLength, Unit, UnitConversion
    from trainc.runtime.step.record import Signals


@dataclass(frozen=True, slots=True)
class LoweringContext:
    """What all clauses of one program share: the model, its inventory, and the units of time."""

    model: nn.Module
    inventory: Inventory
    units: UnitConversion
    length: RunLength | None
    signals: Signals
    signal_units: Mapping[str, Unit] = field(default_factory=dict)
    """What the signals of clauses count, beside those that every run has; the others are plain numbers."""
