"""Summary lines that belong to no action: losses, constant rate factors, and what did not run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.plan.plan import Row
from trainc.compiler.program.step_totals import TermHistory
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action

Terms = Mapping[str, float]


def summary_lines(
    method: LoweredMethod,
    clauses: Iterable[Row],
    history: TermHistory,
    actions: Iterable[Action],
    reasons: Iterable[str],
    clock: Clock,
) -> Iterator[str]:
    """Yield lines of text: what the loss and each clause of the spec did in a run up to now."""
    yield from loss_lines(method, history.first, history.last, clock.steps)
    yield from history.skipped.lines(clock.steps)
    yield from factor_lines(method, clock.before)
    yield from (line for action in actions if (line := action.summary()) is not None)
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
