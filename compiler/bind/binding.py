"""Bind: a spec against one model. Selectors become names, durations are checked, claims are proved exact.

Reads no weight and no data; everything wrong is collected and raised once as SpecError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainc.compiler.bind.bound_clause import BoundClause, Sizes, Targets
from trainc.compiler.bind.claims import overlapping_claims
from trainc.compiler.bind.effects import conflicts, penalised_measurements
from trainc.compiler.bind.signals import signal_problems
from trainc.compiler.constructs.data._batch_policy import changes, inconsistencies
from trainc.compiler.errors import name_root_module
from trainc.compiler.model.facts import Facts
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import Target, expectations, select
from trainc.compiler.model.suggestions import suggestion, unknown_classes
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import Duration, Scoped, Selector
from trainc.runtime.schedule.clock import Duration as ClockDuration
from trainc.runtime.schedule.clock import RunLength, UnitConversion

if TYPE_CHECKING:
    from trainc.dsl.reading.construct import Construct, Problem
    from trainc.dsl.resolve.spec import Spec
    from trainc.dsl.resolve.statements import Clause
    from trainc.dsl.text.source import Span

ORDER = (
    "model", "data", "loss", "run", "distribute", "normalize", "adapt", "mask", "perturb", "regularize",
    "noise_scale", "lr", "optimizer", "observe",
)  # fmt: skip
"""The order in which clauses are lowered, and in which equal-phase actions that rewrite one resource run."""

_SEVERAL = "a spec for several models selects by roles, as `role(norm)` does, or makes the clause `optional`"


@dataclass(frozen=True)
class Binding:
    """A spec bound to a model: the clauses in lowering order, the units of time, and what to warn of."""

    spec: Spec
    inventory: Inventory
    clauses: tuple[BoundClause, ...]
    units: UnitConversion
    length: RunLength | None
    warnings: tuple[Diagnostic, ...] = ()

    def one(self, kind: str) -> BoundClause | None:
        """Return the clause of a kind that occurs at most once."""
        return next((clause for clause in self.clauses if clause.kind == kind), None)


def bind(spec: Spec, inventory: Inventory, facts: Facts) -> Binding:
    """Return `spec` bound to the model behind `inventory`; raises SpecError with every mistake found."""
    return _Binder(spec, inventory, facts).run()


@dataclass
class _Binder:
    spec: Spec
    inventory: Inventory
    facts: Facts
    found: list[Diagnostic] = field(default_factory=list)

    def run(self) -> Binding:
        self.units, self.length = self._time()
        clauses = [self._clause(clause) for clause in self.spec.clauses]
        clauses.sort(key=lambda bound: ORDER.index(bound.kind))
        active = [clause for clause in clauses if clause.dropped is None]
        self.found += [
            *overlapping_claims(active, self.inventory),
            *conflicts(active),
            *penalised_measurements(active, self.inventory),
            *inconsistencies(self.spec),
            *signal_problems(self.spec, clauses),
        ]
        errors = [d for d in self.found if d.severity == "error"]
        if errors:
            raise SpecError(self.found)
        return Binding(
            self.spec, self.inventory, tuple(clauses), self.units, self.length, tuple(self.found)
        )

    # time

    def _time(self) -> tuple[UnitConversion, RunLength | None]:
        data, run = self._construct("data"), self._construct("run")
        units = UnitConversion(
            samples_per_step=float(data.start_size) if data else None,  # type: ignore[attr-defined]
            tokens_per_sample=_number(self.facts.tokens_per_sample),
            samples_per_epoch=_number(self.facts.samples),
            changing=changes(self.spec),
        )
        length = RunLength(run.length.amount, run.length.unit) if run else None  # type: ignore[attr-defined]
        return units, length

    def _construct(self, kind: str) -> Construct | None:
        return next((c.construct for c in self.spec.clauses if c.construct.kind == kind), None)

    def _duration(
        self, duration: Duration | None, clause: Clause, what: str
    ) -> dict[str, Any] | None:
        if duration is None:
            return None
        if duration.unit == "run" and self.length is None:
            self._say(
                "wrong-unit",
                f"`{what} {duration}` is a part of the run, and this spec has no `run` clause",
                clause,
            )
        return ClockDuration(duration.amount, duration.unit).to_json()

    # clauses

    def _clause(self, clause: Clause) -> BoundClause:
        construct = clause.construct
        targets: tuple[str, ...] = ()
        dropped: str | None = None
        for name, selector in _selectors(construct):
            if not clause.optional:
                self._unknown_classes(clause, name, selector)
        if construct.targets != "none":
            targets = self._targets(clause, construct.targets)
            if not targets and clause.optional:
                dropped = "its selector matches nothing, and it is optional"
        if dropped is None and construct.is_identity():
            dropped = "it is written so that it does nothing"
            self._say(
                "no-effect",
                f"`{construct.title}` is written so that it does nothing",
                clause,
                severity="warning",
            )
        bound = BoundClause(
            construct=construct,
            label=clause.name,
            targets=targets,
            start=self._duration(clause.start, clause, "from"),
            stop=self._duration(clause.stop, clause, "until"),
            every=self._duration(clause.every, clause, "every"),
            dropped=dropped,
            span=clause.span,
        )
        if dropped is None and (targets or construct.targets == "none"):
            for problem in construct.validate_targets(self._view(bound)):
                self._problem(problem, clause)
        return bound

    def _view(self, bound: BoundClause) -> Targets:
        modules = bound.construct.targets == "modules"
        return Targets(
            self.inventory,
            bound.modules(self.inventory) if modules else (),
            bound.parameters(self.inventory) if bound.construct.targets == "parameters" else (),
            self._sizes(),
        )

    def _sizes(self) -> Sizes | None:
        data: Any = self._construct("data")
        if data is None:
            return None
        return Sizes(data.micro_size, data.start_size, changes(self.spec))

    def _targets(self, clause: Clause, target: Target) -> tuple[str, ...]:
        selector = clause.selection
        if selector is None:
            self._say("missing-field", f"`{clause.construct.title}` needs `on SELECTOR`", clause)
            return ()
        for expect, count in expectations(selector, self.inventory, target):
            if expect.count != count:
                self._say(
                    "selector-count",
                    f"the selector matches {count} {target}, not {expect.count}",
                    clause,
                    on=True,
                )
        try:
            names = select(selector, self.inventory, target)
        except ValueError as error:
            self._say("bad-value", str(error), clause, on=True)
            return ()
        if not names and not clause.optional:
            self._matches_nothing(clause, selector, target)
        elif not clause.optional:
            self._unknown_classes(clause, "on", selector)
        if target == "parameters" and clause.construct.kind in ("optimizer", "lr", "mask"):
            names = self._trainable(names, clause)
        return names

    def _unknown_classes(self, clause: Clause, part: str, selector: Selector) -> None:
        """Say which classes in a selector there are not, each at its name where it is written there."""
        for name, help_ in unknown_classes(selector, self.inventory).items():
            whole = clause.part_span(part)
            word = re.search(rf"\b{re.escape(name)}\b", whole.text) if whole else None
            self._say(
                "unknown-class",
                f"there is no class `{name}` in `{self.inventory.model}`, nor in torch.nn",
                clause,
                span=whole.part(*word.span()) if whole and word else whole,
                help=help_
                or "leave it out, or mark the clause `optional` where another model has it",
            )

    def _trainable(self, names: Sequence[str], clause: Clause) -> tuple[str, ...]:
        frozen = [name for name in names if not self.inventory.parameter[name].trainable]
        if frozen and len(frozen) == len(names):
            self._say(
                "selector-matches-frozen",
                f"all {len(frozen)} selected parameters are frozen",
                clause,
                on=True,
                help="set requires_grad on them, or select others",
            )
        return tuple(name for name in names if name not in set(frozen))

    def _matches_nothing(self, clause: Clause, selector: Selector, target: Target) -> None:
        entries = self.inventory.modules if target == "modules" else self.inventory.parameters
        help_ = suggestion(selector, self.inventory, target)
        self._say(
            "selector-matches-nothing",
            f"nothing in `{self.inventory.model}` is selected",
            clause,
            on=True,
            label=f"0 of {len(entries)} {target}",
            help=help_,
        )

    # saying it

    def _problem(self, problem: Problem, clause: Clause) -> None:
        span = clause.part_span(problem.field) if problem.field else None
        self._say(
            problem.rule,
            name_root_module(problem.message),
            clause,
            on=problem.field is None,
            span=span,
            notes=problem.notes,
            help=problem.help,
            severity=problem.severity,
        )

    def _say(
        self,
        rule: str,
        message: str,
        clause: Clause,
        *,
        on: bool = False,
        span: Span | None = None,
        label: str = "",
        notes: Iterable[str] = (),
        help: str | None = None,
        severity: Any = "error",
    ) -> None:
        at = span or clause.part_span("on" if on else "")
        labels = (Label(at, label),) if at else ()
        self.found.append(Diagnostic(rule, message, labels, tuple(notes), help, severity))


def _selectors(construct: Construct) -> Iterator[tuple[str, Selector]]:
    """Yield the selectors in a construct's fields, with the field's name."""
    for name in type(construct).model_fields:
        value = getattr(construct, name)
        for item in value if isinstance(value, tuple | list) else (value,):
            part = item.on if isinstance(item, Scoped) else item
            if isinstance(part, Selector):
                yield name, part


def _number(value: int | None) -> float | None:
    return None if value is None else float(value)
