"""Check the names that an expression uses, and suggest the right one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy

from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.reading.expressions import Names
from trainc.dsl.reading.fields import field_type, scheduled_fields
from trainc.dsl.reading.signal import full_name
from trainc.dsl.syntax import ast
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.nearest import nearest, suggest
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import BUILT_IN, PLACES
from trainc.dsl.values.functions import FUNCTIONS, REMEMBERING, example_call


class Scope(Names):
    """The names a spec defines: labels of clauses, and the signals behind them."""

    def __init__(
        self,
        constructs: Mapping[str, Iterable[type[Construct]]],
        lets: Iterable[str] = (),
        lost: Iterable[str] = (),
        catalog: Catalog | None = None,
    ) -> None:
        self.constructs = {label: tuple(found) for label, found in constructs.items()}
        self.lets = tuple(lets)
        self.lost = frozenset(lost)
        self.catalog = catalog or {}
        self.found: list[Diagnostic] = []
        self.used: set[str] = set()
        self.reads_fields = False
        """Whether a name may be a scheduled field of a clause."""
        self.functions = FUNCTIONS

    def of_rules(self) -> Scope:
        """Return this scope for expressions in rules, which may also read fields of clauses, and what was before."""
        made = copy(self)
        made.reads_fields, made.functions = True, FUNCTIONS | REMEMBERING
        return made

    def check(self, name: ast.Ident) -> None:
        problem = self.problem(name.id, name.span)
        if problem:
            self.found.append(problem)

    def problem(self, name: str, span: Span | None) -> Diagnostic | None:
        """Return what is wrong with a name in an expression, or None."""
        label, _, signal = name.partition(".")
        labels = (Label(span),) if span else ()
        if name in BUILT_IN or name in self.evaluated() or label in self.lost or "*" in self.lost:
            return None
        if label not in self.constructs:
            options = [*BUILT_IN, *self.evaluated(), *self.lets, *self.signals()]
            note = f"known names: {', '.join(f'`{n}`' for n in options if n not in PLACES)}"
            help = self._meant(name, options)
            message = f"the name `{name}` is not defined"
            return Diagnostic("unknown-name", message, labels, (note,), help)
        self.used.add(label)
        found = self.constructs[label]
        if len(found) != 1:  # a clause is wrong, or two have this name: that is reported already
            return None
        signals, fields = found[0].signals, scheduled_fields(found[0].model_fields)
        if signal in fields and signal not in signals:
            return None if self.reads_fields else _field_outside_of_rule(name, labels)
        if not signals:
            message = f"`{found[0].heading()}` measures nothing, so `{label}` has no value"
            return Diagnostic("unknown-signal", message, labels)
        if signal not in signals:
            known = f"known signals: {', '.join(f'`{full_name(label, s)}`' for s in signals)}"
            message = f"`{found[0].heading()}` has no signal `{signal}`"
            if not signal:
                message = f"`{found[0].heading()}` measures nothing that is called `{label}` alone"
            return Diagnostic("unknown-signal", message, labels, (known,), suggest(signal, signals))
        return None

    def help_for_function(self, function: str) -> str | None:
        if function in REMEMBERING:
            return f"only `when` rules call `{function}`"
        for cls in self.catalog.values():
            for field, info in cls.model_fields.items():
                own = field_type(info)
                if own and function in own.functions:
                    place = f"{cls.heading()} ... {{ {field} = {function}(...) }}"
                    return f"only `{field}` of `{cls.heading()}` takes `{function}`: `{place}`"
        return None

    def _meant(self, name: str, options: Iterable[str]) -> str | None:
        """Return a suggestion for a name that is not defined, or None."""
        if name in self.functions:
            return f"write a call: `{example_call(name)}`"
        label = name.partition(".")[0]
        for key in self.catalog:
            if key[1] == label and (construct := self.catalog[key]).signals:
                return f"no clause measures `{label}`: add `{construct.usage}`"
        near = nearest(name, self.functions)
        return suggest(name, options) or (f"did you mean `{example_call(near)}`?" if near else None)

    def evaluated(self) -> list[str]:
        """Return the names of what evaluations report of the losses, besides `eval_loss`."""
        losses = {n: c[0] for n, c in self.constructs.items() if c and c[0].kind == "loss"}
        if len(losses) == 1:
            return [f"eval_{metric}" for one in losses.values() for metric in one.evaluated]
        found = [[label, *(f"{label}_{m}" for m in one.evaluated)] for label, one in losses.items()]
        return [f"eval_{name}" for names in found for name in names]

    def signals(self) -> list[str]:
        """Return the names of all signals, such as `label` and `label.low`."""
        return [
            full_name(label, signal)
            for label, found in self.constructs.items()
            for construct in found
            for signal in construct.signals
        ]


def _field_outside_of_rule(name: str, labels: tuple[Label, ...]) -> Diagnostic:
    message = f"`{name}` is a field of another clause, which only `when` rules read"
    help = "write its number here as well; a `let` gives both the same"
    return Diagnostic("unknown-signal", message, labels, (), help)
