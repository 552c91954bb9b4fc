"""Summary lines that belong to no action: losses, constant rate factors, memory, and what did not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.plan.plan import Row
from trainc.compiler.program.step_totals import TermHistory
from trainc.runtime.memory.needs import format_bytes
from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep

Terms = Mapping[str, float]


def summary_lines(
    method: LoweredMethod,
    clauses: Iterable[Row],
    history: TermHistory,
    machine: StepMachine,
    reasons: Iterable[str],
) -> Iterator[str]:
    """Yield lines of text: what the loss and each clause of the spec did in a run up to now."""
    clock = machine.clock
    found = (action.summary_after(clock.steps) for action in machine.actions)
    yield from loss_lines(method, history.first, history.last, clock.steps)
    yield from history.skipped.lines(clock.steps)
    yield from factor_lines(method, clock.before)
    yield from (line for line in found if line is not None)
    yield from memory_lines(machine.actions, machine.parameters.values())
    yield from executor_lines(reasons, clauses)


def loss_lines(method: LoweredMethod, first: Terms, last: Terms, steps: int) -> Iterator[str]:
    """Yield the loss and its terms at the first and at the last step."""
    if "loss" not in first or "loss" not in last:
        return
    yield f"loss: {first['loss']:.4g} -> {last['loss']:.4g} in {steps} steps"
    for label in (part.label for part in method.loss_parts if method.losses.is_sum):
        if label in first and label in last:
            yield f"{label}: mean loss {first[label]:.4g} -> {last[label]:.4g}"
    for label, term in method.rewrite.terms.items():
        if term.what is not None and label in first and label in last:
            yield f"{term.clause or label}: {term.what} {first[label]:.4g} -> {last[label]:.4g}"


def executor_lines(reasons: Iterable[str], clauses: Iterable[Row]) -> Iterator[str]:
    """Yield why no graph ran, and the clauses that are not in the program."""
    for reason in reasons:
        yield f"the bound modules ran instead of a graph: {reason}"
    for c in clauses:
        if c["dropped"]:
            yield f"{c['kind']} {c['construct']}: not in the program: {c['dropped']}"


def memory_lines(actions: Iterable[Action], parameters: Iterable[Tensor]) -> Iterator[str]:
    """Yield what optimizers hold where not all of a model trains, as measured, beside what all of it would take.

    That is computed from the state of an entry that has one. Counters, which are 0-d, are not counted.
    """
    steps = [one for one in actions if isinstance(one, OptimizerStep)]
    if not any(one.started for one in steps):
        return
    # Of an optimizer without state, a resumed run does not know that it began.
    slots = [(one, slot) for one in steps for slot in one.slots]
    whole = [*parameters]
    if not slots or any(map(is_sharded, whole)):
        return
    state = {s.name: one.named.nbytes(s.name) for one, s in slots}
    trained = sum(slot.tensor.numel() for _, slot in slots)
    kept = sum(slot.tensor.numel() for _, slot in slots if state[slot.name])
    every, held = sum(p.numel() for p in whole), sum(state.values())
    if min(trained, kept or trained) >= every:
        return
    gradients = sum(slot.tensor.nbytes for _, slot in slots)
    own, other = format_bytes(gradients), format_bytes(sum(p.nbytes for p in whole))
    if held:
        own += f" and the optimizer's state {format_bytes(held)}"
        other += f" and {format_bytes(held * every / kept)}"
    yield f"memory: gradients of the {trained} entries that train take {own}; of all {every} they would take {other}"


def factor_lines(method: LoweredMethod, clock: Clock | None) -> Iterator[str]:
    """Yield the factors of learning rate policies without an action; of those that move, what they were at a clock."""
    with_action = {action.name for action in method.actions}
    factors: dict[str, list[float]] = {}
    moving = set[str]()
    for lr_factors in method.lr_factors.values():
        for one in lr_factors:
            if one.policy in with_action:
                continue
            if one.schedule is None:
                factors.setdefault(one.policy, []).append(one.factor)
            elif clock is not None:
                moving.add(one.policy)
                factors.setdefault(one.policy, []).append(one.schedule(clock))
    for policy, values in factors.items():
        when = " in the last step" if policy in moving else ""
        span = f"{min(values):.3g} to {max(values):.3g}"
        yield f"{policy}: factors {span}{when} on {len(values)} parameters"
