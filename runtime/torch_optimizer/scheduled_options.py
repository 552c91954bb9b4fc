"""The options of a torch optimizer's groups that a spec sets in each step, beside an optimizer that may set its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from trainc.runtime.schedule.clock import Clock
from trainc.runtime.torch_optimizer.named_state import NamedState, Options
from trainc.runtime.torch_optimizer.problem import OptimizerProblem
from trainc.runtime.torch_optimizer.slots import Group, ParamSlot


def set_rate(named: NamedState, number: int, options: Options, rate: float) -> float:
    """Set the rate of a group to the schedule's, where that has changed, and return the rate in force.

    Raises OptimizerProblem where the optimizer has set another one since.
    """
    before = named.scheduled[number].get("lr")
    if rate != before:
        if before is not None and float(options["lr"]) != before:
            raise OptimizerProblem(
                named.label,
                f"`{named.label}` ({named.kind}) set its learning rate to {float(options['lr']):g} by itself,"
                f" and the spec changes it from {before:g} to {rate:g}: only one of them can. {_ONE_RATE}",
                "lr",
            )
        options["lr"] = named.scheduled[number]["lr"] = rate
    return float(options["lr"])


def put_rates(named: NamedState, rates: Mapping[str, float], groups: Iterable[Group]) -> None:
    """Put rates in force, by parameter, in the groups in which no schedule has set one."""
    for number, options, slots in groups:
        rate = next((rates[slot.name] for slot in slots if slot.name in rates), None)
        if rate is not None and "lr" not in named.scheduled[number]:
            options["lr"] = rate


def set_others(
    named: NamedState, number: int, options: Options, slot: ParamSlot, clock: Clock
) -> Iterator[tuple[str, float]]:
    """Set what schedules and factors say of other options of a group; yield their numbers by name, as `beta2`.

    Raises OptimizerProblem where the optimizer has no such option, or has set another value since.
    """
    scheduled = named.scheduled[number]
    for name, value in slot.moving(clock):
        if name not in named.optimizer.defaults:
            message = f"`{named.label}` ({named.kind}) has no `{name}` that a spec could change"
            raise OptimizerProblem(named.label, message, name)
        if name in scheduled and options[name] != scheduled[name]:
            raise OptimizerProblem(
                named.label,
                f"`{named.label}` ({named.kind}) set its `{name}` to {options[name]} by itself, and the spec changes it"
                f" to {value} in this step: only one of them can. Write a constant in the spec, or turn off what sets"
                " it in the optimizer's own arguments",
                name,
            )
        options[name] = scheduled[name] = value
        if isinstance(value, tuple):
            yield from ((f"{name.removesuffix('s')}{i}", x) for i, x in enumerate(value, 1))
        else:
            yield name, value


def own_rate(
    named: NamedState, number: int, options: Options, slots: Sequence[ParamSlot], *, steady: bool
) -> str | None:
    """Return what to say of a rate that the optimizer has set itself; None where it has set none.

    `steady`: the schedule of the rate is one number. Raises OptimizerProblem where the spec would undo the rate.
    """
    rate = named.scheduled[number].get("lr")
    if rate is None or options["lr"] == rate:
        return None
    factors = sorted({factor.policy for slot in slots for factor in slot.lr_factors})
    if factors or not steady:
        others = f"the factors of `{factors[0]}`" if factors else "the schedule in `lr`"
        raise OptimizerProblem(
            named.label,
            f"`{named.label}` ({named.kind}) sets its learning rate by itself, from {rate:g} to"
            f" {float(options['lr']):g} in this step, which undoes {others}. {_ONE_RATE}",
            "lr",
        )
    return (
        f"{named.label}: the optimizer sets its learning rate by itself, from {rate:g} to"
        f" {float(options['lr']):g} in this step: `lr` is where it began"
    )


_ONE_RATE = (
    "Write a constant `lr`, from which the optimizer begins, and remove clauses and rules that change rates; or turn"
    " off what sets the rate in the optimizer's own arguments"
)
