"""Text and a catalog to a checked spec, or to all of its mistakes at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from trainc.dsl.reading.constants import Unreadable, duration
from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.reading.expressions import condition, expression
from trainc.dsl.reading.names import Scope
from trainc.dsl.resolve.checks import structure_problems
from trainc.dsl.resolve.clause import ClauseResolver, construct_name
from trainc.dsl.resolve.clause_fields import unreadable_problem, with_use
from trainc.dsl.resolve.includes import CollectedStatements, read_source
from trainc.dsl.resolve.lets import Lets
from trainc.dsl.resolve.nested import UnnestedClauses
from trainc.dsl.resolve.never_acts import RunTime, never_acting
from trainc.dsl.resolve.origin import Origin
from trainc.dsl.resolve.rule_actions import action_problems, read_action, target_problems
from trainc.dsl.resolve.spec import VERSION, Spec
from trainc.dsl.resolve.statements import Action, Assign, Clause, Do, Rule
from trainc.dsl.syntax import ast
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.record import Record
from trainc.dsl.text.source import Source, printable
from trainc.dsl.text.vocabulary import VERBS
from trainc.dsl.values.durations import Duration

MAX_DIAGNOSTICS = 100


class Checked(Record):
    """The result of a check: the spec, or None where it has errors, and all diagnostics."""

    spec: Spec | None
    diagnostics: tuple[Diagnostic, ...]

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """Return the errors, without the warnings."""
        return tuple(d for d in self.diagnostics if d.severity == "error")

    def unwrap(self) -> Spec:
        """Return the spec, or raise SpecError with all errors."""
        if self.spec is None:
            raise SpecError(self.errors)
        return self.spec


def load_spec(
    text: Source | Path | str, catalog: Catalog, overrides: Iterable[str] = ()
) -> Checked:
    """Check a source, a file or a text; `overrides` are `name=value` for its lets."""
    path = text if isinstance(text, Path) else None
    found: list[Diagnostic] = []
    if isinstance(text, Path):
        source, found = read_source(text)
        if found:
            return Checked(None, tuple(found))
    else:
        source = text if isinstance(text, Source) else Source("<text>", text)
        try:
            source.text.encode()
        except UnicodeEncodeError as error:
            label = Label(source.span(error.start, error.start + 1), "half of a surrogate pair")
            return Checked(
                None, (Diagnostic("not-text", "this text is not valid Unicode", (label,)),)
            )
    return Resolver(source, path, catalog, tuple(overrides)).checked()


class Resolver:
    """Resolves one spec; each part collects its diagnostics and continues."""

    def __init__(
        self, source: Source, path: Path | None, catalog: Catalog, overrides: Sequence[str]
    ) -> None:
        self.source = source
        self.catalog = catalog
        gathered = CollectedStatements(source, path)
        unnested = UnnestedClauses(gathered.statements, catalog)
        self.placed = unnested.statements
        self.unread = bool(gathered.found)
        self.found = gathered.found
        self.found += unnested.found
        self.lets = Lets()
        for item in self.placed:
            if isinstance(item.statement, ast.Let):
                self.lets.define(item.statement)
        self.lets.override(overrides, gathered.lost)
        self.lets.check_definitions()
        lost = gathered.lost | self.lets.broken | self.lets.refused
        self.scope = Scope(self._labels(), self.lets.values, lost, catalog)
        self.rule_scope = self.scope.of_rules()

    def checked(self) -> Checked:
        """Return the spec and all diagnostics."""
        self._versions()
        resolver = ClauseResolver(self.catalog, self.lets, self.scope)
        clauses: list[Clause] = []
        rules: list[Rule] = []
        for item in self.placed:
            if isinstance(item.statement, ast.ClauseTree):
                clause = resolver.resolve(item.statement, item)
                clauses += [clause] if clause else []
            elif isinstance(item.statement, ast.When):
                rule = self._rule(item.statement)
                rules += [rule] if rule else []
        self._unused()
        found = [*self.found, *self.lets.found, *resolver.found, *self.scope.found]
        spec: Spec | None = None
        if any(d.severity == "error" for d in found):
            found += structure_problems(clauses)
        else:
            try:
                spec = Spec(tuple(clauses), tuple(rules))
                found += never_acting(clauses, rules, RunTime.of(clauses))
            except SpecError as error:
                found += error.diagnostics
        if any(d.severity == "error" for d in found):
            spec = None
        return Checked(spec, _ordered(found)[:MAX_DIAGNOSTICS])

    def _labels(self) -> dict[str, list[type[Construct]]]:
        """Return the constructs that each label names; none for a clause whose construct is unknown."""
        out: dict[str, list[type[Construct]]] = {}
        for item in self.placed:
            if isinstance(item.statement, ast.ClauseTree):
                name = construct_name(item.statement, self.catalog)
                given = [p.value for p in item.statement.parts if p.word == "as"]
                label = given[0].id if given and isinstance(given[0], ast.Ident) else name
                construct = self.catalog.get((item.statement.kind.id, name or ""))
                if label:
                    out.setdefault(label, []).extend([construct] if construct else [])
        return out

    def _versions(self) -> None:
        files: dict[int, int] = {}
        for item in self.placed:
            statement = item.statement
            rank = files[id(statement.span.source)] = files.get(id(statement.span.source), 0) + 1
            if not isinstance(statement, ast.Version):
                continue
            if rank > 1:
                message = "`train N` must be the first statement of its file"
                self.found.report("misplaced-version", message, Label(statement.span))
            if statement.number.text != str(VERSION):
                label = Label(statement.number.span)
                message = f"there is no version {printable(statement.number.text)} of the language"
                help = f"this trainc reads version {VERSION}"
                self.found.report("unknown-version", message, label, help=help)

    def _rule(self, when: ast.When) -> Rule | None:
        """Return a rule, or None where a part of it cannot be read."""
        before = len(self.found) + len(self.scope.found)
        test = self._try(condition, when.condition, "invalid condition of a `when` rule")
        hold = self._wait(when.hold, "`for` takes a duration")
        cooldown = self._wait(when.cooldown, "`cooldown` takes a duration")
        actions = [action for tree in when.actions if (action := self._action(tree))]
        if not when.actions:
            message, help = (
                "this rule has no actions",
                "write an action between the braces: `{ stop }`",
            )
            self.found.report("no-action", message, Label(when.span), help=help)
        if test is None or len(self.found) + len(self.scope.found) > before:
            return None
        return Rule(test, tuple(actions), hold, cooldown, origin=_origin(when))

    def _wait(self, node: ast.Node | None, message: str) -> Duration | None:
        """Return a rule's `for` or `cooldown`; None where it has none, or it cannot be read."""
        if node is None:
            return None
        value: Duration | None = self._try(duration, node, message, scoped=False)
        return value

    def _action(self, tree: ast.Action) -> Action | None:
        if not tree.assigns:
            return self._verb(tree)
        label = tree.target.id.partition(".")[0]
        if label not in self.scope.lost and "*" not in self.scope.lost:
            self.found += target_problems(tree.target.id, self.scope.constructs, tree.target.span)
        assert tree.value is not None
        value = self._try(
            expression, tree.value, f"invalid value for `{printable(tree.target.id)}`"
        )
        return None if value is None else Assign(tree.target.id, value)

    def _verb(self, tree: ast.Action) -> Do | None:
        """Return an action that is no assignment, or None where its argument cannot be read."""
        verb, node = tree.target.id, tree.value
        try:
            if node is not None and VERBS.get(verb) == "selector":
                node = self.lets.expand(node)
            action = read_action(verb, node)
        except Unreadable as error:
            at = tree.span if node is None else node.span
            self.found.append(unreadable_problem(error, at, f"invalid action `{verb}`", self.lets))
            return None
        lost = self.scope.lost
        if VERBS.get(verb) != "clause" or not ({"*", action.argument} & lost):
            self.found += action_problems(action, self.scope.constructs, tree.span)
        return action

    def _try(self, read, node: ast.Node, message: str, scoped: bool = True):  # type: ignore[no-untyped-def]
        """Read a node; report it and return None where it cannot be read."""
        count = len(self.scope.found)
        try:
            value = read(self.lets.expand(node), *([self.rule_scope] if scoped else []))
        except Unreadable as error:
            self.found.append(unreadable_problem(error, node.span, message, self.lets))
            return None
        self.scope.found[count:] = [with_use(d, node.span) for d in self.scope.found[count:]]
        return value

    def _unused(self) -> None:
        """Warn of lets that nothing uses, if every statement could be read."""
        if self.unread:
            return
        for item in self.placed:
            for node in ast.nodes_of(item.statement):
                self.lets.used |= self.lets.names_in(node)
        for item in self.placed:
            if not isinstance(item.statement, ast.Let) or item.via:
                continue
            name = item.statement.name
            first = self.lets.names.get(name.id) is name
            if first and name.id not in self.lets.used | self.lets.broken:
                message = f"`{name.id}` is never used"
                self.found.report("unused-let", message, Label(name.span), severity="warning")


def _origin(when: ast.When) -> Origin:
    """Return where a rule and its parts were written."""
    parts = {"condition": when.condition, "for": when.hold, "cooldown": when.cooldown}
    spans = {word: node.span for word, node in parts.items() if node}
    spans |= {f"action {i}": action.span for i, action in enumerate(when.actions, 1)}
    return Origin(when.span, {}, spans)


def _ordered(found: Sequence[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Return diagnostics by file and place, without those that a syntax error causes."""
    rank: dict[int, int] = {}
    for d in found:
        if d.span:
            rank.setdefault(id(d.span.source), len(rank))
    broken = [d.span for d in found if d.rule == "syntax" and d.span]

    def follows(d: Diagnostic) -> bool:
        span = d.span
        return (
            d.rule != "syntax" and span is not None and any(b in span or span in b for b in broken)
        )

    def order(d: Diagnostic) -> tuple[int, int]:
        return (rank[id(d.span.source)], d.span.start) if d.span else (len(rank), 0)

    once: dict[tuple[object, ...], Diagnostic] = {}
    for d in found:
        if not follows(d):
            once.setdefault((d.rule, d.message, d.labels[:1]), d)
    return tuple(sorted(once.values(), key=order))
