"""A step machine with one observer of weights alone, and updates made by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.dsl.reading.construct import Construct
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Signals, Step


def machine(
    net: nn.Module,
    construct: Construct,
    label: str,
    every: int | None = None,
    start: int | None = None,
    only: str = "",
) -> StepMachine:
    """Return the machine of one clause on the parameters with `only` in their names."""
    inventory, lowered = build_inventory(net), LoweredMethod()
    clause = BoundClause(
        construct,
        label,
        tuple(p.name for p in inventory.parameters if only in p.name),
        start=TimeSpan(start, "steps") if start else None,
        every=TimeSpan(every, "steps") if every else None,
    )
    context = LoweringContext(net, inventory, UnitConversion(), None, Signals())
    construct.lower(Lowering(clause, context, lowered))
    return StepMachine(lowered.actions, Clock(), dict(net.named_parameters()))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def update(m: StepMachine, change: Any) -> Step:
    """Take a step whose update adds `change(parameter)` to each parameter."""
    m.begin()
    with torch.no_grad():
        for parameter in m.parameters.values():
            parameter.add_(change(parameter))
    return m.finish()


def weights(m: StepMachine) -> list[Tensor]:
    return [p.detach().clone() for p in m.parameters.values()]


def noise(parameter: Tensor) -> Tensor:
    return 0.1 * torch.randn_like(parameter)
