"""Mistakes in factors on the options of optimizers and in decay, which only the lowered method shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.runtime.step.action import Action
from trainc.runtime.step.batch_policy import Seesaw
from trainc.runtime.step.gradients import GradientTransform

Clauses = Mapping[str, BoundClause]


def factor_problems(
    clauses: Sequence[BoundClause], by_label: Mapping[str, list[Action]], method: LoweredMethod
) -> Iterator[Diagnostic]:
    """Yield an error for factors on what is not there, for two that follow the batch, for one that never
    moves, and for decay that is clipped.
    """
    named = {clause.label: clause for clause in clauses}
    yield from _half_lives(named, method)
    yield from _undecayed(named, method)
    yield from _scaled_twice(named, method)
    yield from _never_falls(named, by_label, method)
    yield from _clipped_decay(clauses, by_label, method)


def _half_lives(by_label: Clauses, method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for every clause that holds the half-life of an optimizer without one."""
    owners = {name: part for part in method.optimizers for name in part.targets}
    told: set[str] = set()
    for name, factors in method.option_factors.items():
        part = owners.get(name)
        for factor in factors:
            if part is None or factor.of != "half_life" or "betas" in part.options[name]:
                continue
            if factor.policy not in told:
                told.add(factor.policy)
                clause, own = by_label[factor.policy], by_label[part.label]
                yield Diagnostic(
                    "conflicting-effects",
                    f"`{clause.title}` holds the half-life of Adam's second moment, and `{own.title}`, which trains"
                    f" `{name}`, has none",
                    labels((clause.span, ""), (own.span, "has no second moment that is known")),
                    help="select parameters that Adam trains, or leave the half-life as it is",
                )


def _undecayed(by_label: Clauses, method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for every clause with factors on weight decay that selects nothing that decays."""
    owners = {name: part for part in method.optimizers for name in part.targets}
    decaying: dict[str, bool] = {}
    for name, factors in method.option_factors.items():
        decays = name in owners and owners[name].decays(name)
        for factor in factors:
            if factor.of == "weight_decay":
                decaying[factor.policy] = decaying.get(factor.policy, False) or decays
    for clause in (by_label[label] for label, decays in decaying.items() if not decays):
        yield Diagnostic(
            "no-effect",
            f"`{clause.title}` scales weight decay, and none of the parameters that it selects decays",
            labels((clause.span, "")),
            help="write `weight_decay` in the optimizer, or select parameters that it decays",
        )


def _scaled_twice(by_label: Clauses, method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for every two clauses that both scale the rate of a parameter with the batch."""
    told: set[str] = set()
    for name, factors in method.lr_factors.items():
        following = [one.policy for one in factors if one.of_batch is not None]
        if len(following) > 1 and following[1] not in told:
            told.add(following[1])
            second, first = (by_label[label] for label in (following[1], following[0]))
            yield Diagnostic(
                "conflicting-effects",
                f"`{first.title}` and `{second.title}` both scale the learning rate of `{name}` with the batch",
                labels((second.span, "scales it again here"), (first.span, "scales it here")),
                help="let one of the two leave the rates, or remove it",
            )


def _never_falls(
    by_label: Clauses, actions: Mapping[str, list[Action]], method: LoweredMethod
) -> Iterator[Diagnostic]:
    """Yield an error for a batch that grows where the rate falls, and rates that are constant."""
    constant = method.optimizers and all(part.steady for part in method.optimizers)
    for label, found in actions.items():
        if constant and any(isinstance(action, Seesaw) for action in found):
            clause, part = by_label[label], method.optimizers[0]
            yield Diagnostic(
                "no-effect",
                f"the batch of `{clause.title}` grows where the learning rate falls, which is constant",
                labels(
                    (clause.part_span("batch"), "stays at its first size"),
                    (by_label[part.label].part_span("lr"), "constant"),
                ),
                help="write a schedule that falls, such as `lr = 1e-3 * cosine()`, or a fixed `batch`",
            )


def _clipped_decay(
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
) -> Iterator[Diagnostic]:
    """Yield an error where gradients are clipped that a clause changed together with the decay of their weights."""
    for clause in clauses:
        coupled = (
            action
            for action in by_label.get(clause.label, ())
            if isinstance(action, GradientTransform) and action.coupled
        )
        decayed = {name for action in coupled for name in action.parameters}
        for part in method.optimizers:
            limit = method.clip if part.construct.clip is None else part.construct.clip
            if limit is None or not any(map(part.decays, decayed)):
                continue
            whose = "run" if part.construct.clip is None else part.label
            at = next((one for one in clauses if whose in (one.label, one.kind)), clause)
            yield Diagnostic(
                "conflicting-effects",
                f"`{clause.title}` scales gradients together with the weight decay of `{part.label}`, so the gradients"
                f" that are clipped to {limit:g} would hold a part of the decay",
                labels(
                    (at.part_span("clip"), "clips the gradients"),
                    (clause.span, "scales gradients and decay"),
                ),
                help="remove `clip`, or the weight decay of what the clause selects",
            )
