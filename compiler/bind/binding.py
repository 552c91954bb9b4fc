"""Bind a spec to one model: selectors become names, durations are checked, every parameter has one optimizer.

Reads no weight and no data. All mistakes are collected and raised once, as SpecError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainc.compiler.bind.bound_clause import BoundClause, Sizes, Targets
from trainc.compiler.bind.claims import frozen_by_fields, overlapping_claims
from trainc.compiler.bind.effects import changes_batch, conflicts, penalised_measurements
from trainc.compiler.bind.epochs import uncounted_epochs
from trainc.compiler.bind.report import Report
from trainc.compiler.bind.rule_selectors import rule_selector_problems
from trainc.compiler.bind.run_time import run_problems, steps_left
from trainc.compiler.bind.selection import check_fields, select_targets
from trainc.compiler.bind.signals import signal_problems
from trainc.compiler.model.factories import DataFacts, small_data
from trainc.compiler.model.inventory import Inventory
from trainc.dsl.reading.construct import Construct
from trainc.dsl.resolve.never_acts import RunTime
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import Duration
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion

ORDER = (
    "model", "data", "loss", "run", "distribute", "normalize", "adapt", "mask", "perturb", "regularize",
    "noise_scale", "lr", "optimizer", "observe",
)  # fmt: skip
"""The order in which clauses are lowered, and in which equal-phase actions that rewrite one resource run."""


@dataclass(frozen=True)
class Binding:
    """A spec bound to a model: the clauses in lowering order, the units of time, and the warnings."""

    spec: Spec
    inventory: Inventory
    clauses: tuple[BoundClause, ...]
    units: UnitConversion
    length: RunLength | None
    base: Inventory | None = None
    """The model as it was before a clause adapted it; None where none does."""
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def active(self) -> list[BoundClause]:
        """Return the clauses that are in the program, without those that were dropped."""
        return [clause for clause in self.clauses if clause.dropped is None]

    def one(self, kind: str) -> BoundClause | None:
        """Return the clause of a kind that occurs at most once."""
        return next((clause for clause in self.clauses if clause.kind == kind), None)


def bind(
    spec: Spec, inventory: Inventory, facts: DataFacts, base: Inventory | None = None
) -> Binding:
    """Return `spec` bound to the model that `inventory` describes; raises SpecError with all mistakes.

    The selectors of clauses that adapt the model are resolved in `base`, the model before it was adapted.
    """
    return _Binder(spec, inventory, facts, base).run()


def bind_adapters(spec: Spec, base: Inventory) -> list[BoundClause]:
    """Return the clauses that adapt a model, bound to it; raises SpecError with all mistakes in them."""
    return _Binder(spec, base, DataFacts(), base).adapters()


class _Binder:
    """Binds one spec; `report` collects the mistakes."""

    def __init__(
        self, spec: Spec, inventory: Inventory, facts: DataFacts, base: Inventory | None
    ) -> None:
        self.spec, self.inventory, self.base = spec, inventory, base
        self.report, self.facts = Report(), facts
        self.frozen: set[str] = set()
        data, run = self._construct("data"), self._construct("run")
        self.trial = RunTime.of(spec.clauses).trial
        self.units = UnitConversion(
            samples_per_step=float(data.start_size) if data else None,
            tokens_per_sample=_number(facts.tokens_per_sample),
            samples_per_epoch=_number(facts.samples),
            replicas=facts.replicas,
            changing=changes_batch(spec),
        )
        self.length = RunLength(run.length.amount, run.length.unit) if run else None
        changing = self.units.changing
        self.sizes = Sizes(data.micro_size, data.start_size, changing) if data else None

    def run(self) -> Binding:
        constructs = (clause.construct for clause in self.spec.clauses)
        self.frozen = frozen_by_fields(constructs, self.inventory)
        clauses = [self._bound(clause) for clause in self.spec.clauses]
        clauses.sort(key=lambda bound: ORDER.index(bound.kind))
        active = [clause for clause in clauses if clause.dropped is None]
        found = self.report.diagnostics
        found += overlapping_claims(active, self.inventory)
        found += conflicts(active)
        found += penalised_measurements(active, self.inventory)
        found += signal_problems(self.spec, clauses)
        found += rule_selector_problems(self.spec, self.inventory)
        found += small_data(self.spec, self.facts.samples)
        acting = {clause.label for clause in active}
        written = [clause for clause in self.spec.clauses if clause.name in acting]
        if not self.facts.samples:
            found += uncounted_epochs(written, self.spec.rules)
        found += run_problems(written, self.spec.rules, self.units)
        if any(diagnostic.severity == "error" for diagnostic in found):
            raise SpecError(found)
        return Binding(
            self.spec,
            self.inventory,
            tuple(clauses),
            self.units,
            self.length,
            self.base,
            tuple(found),
        )

    def adapters(self) -> list[BoundClause]:
        clauses = [self._bound(clause) for clause in self.spec.clauses if clause.construct.adapts]
        if any(diagnostic.severity == "error" for diagnostic in self.report.diagnostics):
            raise SpecError(self.report.diagnostics)
        return clauses

    def _construct(self, kind: str) -> Any:
        """Return the construct of a kind that occurs at most once; None without one."""
        clause = self.spec.one(kind)
        return clause.construct if clause else None

    def _bound(self, clause: Clause) -> BoundClause:
        construct = clause.construct
        targets: tuple[str, ...] = ()
        dropped: str | None = None
        inventory = self._inventory_of(construct)
        if construct.targets != "none":
            targets = select_targets(clause, construct.targets, inventory, self.report)
            if construct.kind == "lr":
                # A policy that compares parameters must not compare those that train at no time.
                targets = tuple(n for n in targets if n not in self.frozen) or targets
            if not targets and clause.optional:
                dropped = "its selector matches nothing, and the clause is `optional`"
        if dropped is None and (setting := construct.identity_setting(self._set_later(clause))):
            dropped = f"no effect: `{setting}`"
            message = f"`{construct.title}` has no effect, because `{setting}`"
            self.report.add("no-effect", message, clause, severity="warning")
        check_fields(clause, targets, inventory, self.report)
        bound = BoundClause(
            construct=construct,
            label=clause.name,
            targets=targets,
            start=self._duration(clause.start, clause, "from"),
            stop=self._duration(clause.stop, clause, "until"),
            every=self._duration(clause.every, clause, "every"),
            dropped=dropped,
            origin=clause.origin,
        )
        if dropped is None and (targets or construct.targets == "none"):
            for problem in construct.validate_targets(self._targets(clause, bound)):
                if problem.rule == "never-acts" and self.trial:
                    problem = problem.replace(severity="warning")
                self.report.add_problem(problem, clause)
        return bound

    def _set_later(self, clause: Clause) -> list[str]:
        """Return the fields of a clause that rules set."""
        names = (name.rpartition(".") for name in self.spec.fields_set)
        return [field for label, _, field in names if label == clause.name]

    def _inventory_of(self, construct: Construct) -> Inventory:
        """Return what the selectors of a construct's clauses are matched against."""
        return self.base if construct.adapts and self.base is not None else self.inventory

    def _targets(self, clause: Clause, bound: BoundClause) -> Targets:
        construct = clause.construct
        inventory = self._inventory_of(construct)
        return Targets(
            inventory,
            bound.modules(inventory) if construct.targets == "modules" else (),
            bound.parameters(inventory) if construct.targets == "parameters" else (),
            self.sizes,
            steps_left(clause, self.units, self.length),
        )

    def _duration(self, duration: Duration | None, clause: Clause, word: str) -> TimeSpan | None:
        """Return a duration as the clock counts it; a fraction of the run needs a run."""
        if duration is None:
            return None
        if duration.unit == "run" and self.length is None:
            self.report.add(
                "wrong-unit",
                f"`{word} {duration}` is a fraction of the run, but the spec has no `run` clause",
                clause,
                help=f"write `{word}` in steps, samples or tokens, or add `run {{ length = ... }}`",
            )
        return TimeSpan.of(duration)


def _number(value: int | None) -> float | None:
    return None if value is None else float(value)
