"""Checks that need the whole spec: kinds used once, labels, names in rules, missing targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.reading.fields import field_type
from trainc.dsl.reading.names import Scope
from trainc.dsl.reading.signal import full_name
from trainc.dsl.resolve.rule_actions import action_problems, target_problems
from trainc.dsl.resolve.statements import Assign, Clause, Do, Rule
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import (
    BOOLEANS,
    BUILT_IN,
    EVALUATED,
    METRICS,
    SHAPES,
    STATES,
)
from trainc.dsl.values import value_json as v
from trainc.dsl.values.functions import CallOf, Function

ONCE = ("model", "data", "run")
_NONE: Mapping[str, Function] = {}


def spec_problems(clauses: Sequence[Clause], rules: Sequence[Rule]) -> list[Diagnostic]:
    """Return the mistakes that need clauses and rules together to be seen."""
    scope = Scope(_constructs(clauses))
    found = structure_problems(clauses)
    for clause in clauses:
        construct, head = clause.construct, clause.part_span("head")
        found += on_problems(type(construct), clause.on is not None, head, clause.part_span("on"))
        for name, info in type(construct).model_fields.items():
            value = getattr(construct, name)
            own = field_type(info)
            functions = own.functions if own else {}
            for expression in v.expressions_in(value):
                found += _expression(expression, scope, clause.part_span(name), functions)
    for rule in rules:
        found += _rule_problems(rule, clauses, scope.of_rules())
    found += [*_unevaluated(clauses, rules), *_nothing_to_go_back_to(clauses, rules)]
    found += _amounts_for_numbers(clauses, rules)
    return found


def structure_problems(clauses: Sequence[Clause]) -> list[Diagnostic]:
    """Return the mistakes in the clauses of a spec that do not depend on their fields."""
    found = [*_repeated(clauses), *_labels(clauses)]
    for clause in clauses:
        if clause.every is not None and clause.every.amount <= 0:
            label = _at(clause.part_span("every"), "expected a duration such as `200 steps`")
            found.append(Diagnostic("bad-value", "`every` must be longer than 0", label))
    return found


def _constructs(clauses: Iterable[Clause]) -> dict[str, list[type]]:
    out: dict[str, list[type]] = {}
    for clause in clauses:
        out.setdefault(clause.name, []).append(type(clause.construct))
    return out


def _at(span: Span | None, text: str = "") -> tuple[Label, ...]:
    return (Label(span, text),) if span else ()


def _repeated(clauses: Sequence[Clause]) -> Iterator[Diagnostic]:
    for kind in ONCE:
        found = [c for c in clauses if c.kind == kind]
        for other in found[1:]:
            labels = (*_head(other, "the second is here"), *_head(found[0], "the first is here"))
            yield Diagnostic("duplicate-clause", f"a spec can have only one `{kind}`", labels)


def _head(clause: Clause, text: str) -> tuple[Label, ...]:
    return _at(clause.part_span("head"), text)


def _labels(clauses: Sequence[Clause]) -> Iterator[Diagnostic]:
    seen: dict[str, Clause] = {}
    for clause in clauses:
        if clause.label in (*BUILT_IN, *METRICS):
            labels = _at(clause.part_span("as"))
            yield Diagnostic(
                "reserved-name",
                f"the name `{clause.label}` is reserved by the language: choose another name",
                labels,
            )
        first = seen.setdefault(clause.name, clause)
        once = clause.kind in ONCE and clause.kind == first.kind  # a second one is wrong already
        if first is not clause and not once:
            labels = (*_named(clause, "the second is here"), *_named(first, "the first is here"))
            help = f"name one of them: `{clause.construct.title} as other_{clause.name} ...`"
            message = f"two clauses are called `{clause.name}`"
            yield Diagnostic("duplicate-label", message, labels, (), help)


def _named(clause: Clause, text: str) -> tuple[Label, ...]:
    """Return a label at the name of a clause: at its `as`, or else at its construct."""
    return _at(clause.part_span("as" if clause.label else "head"), text)


def on_problems(
    cls: type[Construct], given: bool, head: Span | None, on: Span | None
) -> Iterator[Diagnostic]:
    """Yield the mistake if an `on` is not allowed, or is missing."""
    title = cls.heading()
    if cls.targets == "none" and given:
        labels = _at(on, "remove `on` and this selector")
        message = f"`{title}` takes no `on`: it does not act on modules or parameters"
        yield Diagnostic("unexpected-on", message, labels)
    elif cls.targets != "none" and not given and cls.default_on is None:
        help = f"write `{title} on` and a selector; `on all` selects all {cls.targets}"
        yield Diagnostic(
            "missing-on",
            f"`{title}` does not say which {cls.targets} it acts on",
            _at(head),
            (),
            help,
        )


def _expression(
    value: v.Expr, scope: Scope, span: Span | None, own: Mapping[str, Function] = _NONE
) -> Iterator[Diagnostic]:
    """Yield the names and functions of an expression that are not defined; it may be a call of one of `own`."""
    known = [*_own_calls(value, own)]
    for item in v.walk(value):
        if any(item is one for one in known):
            continue
        if isinstance(item, v.Binary) and item.op == "is":
            continue
        if isinstance(item, v.Name) and item.id not in _WORDS:
            problem = scope.problem(item.id, span)
            if problem:
                yield problem
        elif isinstance(item, v.Call) and item.function not in scope.functions:
            help = scope.help_for_function(item.function) or suggest(item.function, scope.functions)
            message = f"there is no function `{item.function}`"
            yield Diagnostic("unknown-function", message, _at(span), (), help)


def _own_calls(value: v.Expr, own: Mapping[str, Function]) -> Iterator[v.Expr]:
    """Yield a call of one of `own`, and the calls that its arguments are by its signature."""
    if not isinstance(value, v.Call) or value.function not in own:
        return
    yield value
    kinds = own[value.function].arguments
    given = dict(zip(kinds, value.args, strict=False)) | dict(value.kwargs)
    for name, argument in given.items():
        if isinstance(kind := kinds.get(name), CallOf):
            yield from _own_calls(argument, kind.functions)


_WORDS = {*STATES, *SHAPES, *BOOLEANS}  # names only in form


def _unevaluated(clauses: Sequence[Clause], rules: Sequence[Rule]) -> Iterator[Diagnostic]:
    """Yield an error for every rule that reads what evaluations measure, in a run that evaluates at its end only.

    A spec without data is for a loop of the user's own, which tells what its evaluations measured.
    """
    run = next((clause.construct for clause in clauses if clause.kind == "run"), None)
    own_loop = not any(clause.kind == "data" for clause in clauses)
    acts = (action for rule in rules for action in rule.actions)
    evaluates = any(isinstance(action, Do) and action.verb == "evaluate" for action in acts)
    if run is None or own_loop or getattr(run, "eval", None) is not None or evaluates:
        return
    for rule in rules:
        for part, value in rule.expressions():
            names = (x.id for x in v.walk(value) if isinstance(x, v.Name))
            name = next((name for name in names if name.startswith(EVALUATED)), None)
            if name is not None:
                message = (
                    f"`{name}` is measured at the end of the run only, when no rule looks at it"
                )
                help = "write `eval = 200 steps` in `run`, or let another rule `evaluate`"
                yield Diagnostic("unknown-signal", message, _at(rule.part_span(part)), (), help)


_OF_ONE_UNIT = ("<", "<=", ">", ">=", "==", "!=", "+", "-")


def _amounts_for_numbers(clauses: Sequence[Clause], rules: Sequence[Rule]) -> Iterator[Diagnostic]:
    """Yield an error where a rule compares a plain number with an amount: `loss > 3 steps` would be `loss > 3`."""
    plain = _plain_numbers(clauses)
    for rule in rules:
        for part, value in rule.expressions():
            for x in v.walk(value):
                if not isinstance(x, v.Binary) or x.op not in _OF_ONE_UNIT:
                    continue
                for number, other in ((x.left, x.right), (x.right, x.left)):
                    if not isinstance(other, v.Quantity) or other.duration.unit == "run":
                        continue
                    if _is_plain(number, plain):
                        amount = other.duration
                        message = f"`{number}` is a plain number, and `{other}` is an amount of {amount.unit}"
                        help = f"write `{amount.amount:g}` without a unit"
                        at = _at(rule.part_span(part))
                        yield Diagnostic("wrong-unit", message, at, (), help)


def _plain_numbers(clauses: Sequence[Clause]) -> set[str]:
    """Return the names of what is measured that count nothing."""
    return {"loss", "gradient_norm", "lr", "progress", "eval_loss"} | {
        full_name(clause.name, signal)
        for clause in clauses
        for signal in clause.construct.signals
        if clause.construct.unit_of(signal) is None
    }


def _is_plain(value: v.Expr, names: set[str]) -> bool:
    """Say whether an expression is made of such names and of numbers."""
    match value:
        case v.Name(id):
            return id in names
        case v.Unary("neg", inner):
            return _is_plain(inner, names)
        case v.Binary("+" | "-" | "*" | "/", left, right):
            parts = [x for x in (left, right) if not isinstance(x, v.Number)]
            return bool(parts) and all(_is_plain(x, names) for x in parts)
        case v.Call("min" | "max" | "abs" | "mean" | "best", (first, *_)):
            return _is_plain(first, names)
    return False


def _nothing_to_go_back_to(
    clauses: Sequence[Clause], rules: Sequence[Rule]
) -> Iterator[Diagnostic]:
    """Yield an error for every `rollback` in a run that saves at its end only, or that ends before the rule looks."""
    run = next((clause.construct for clause in clauses if clause.kind == "run"), None)
    own_loop = not any(clause.kind == "data" for clause in clauses)
    acts = [(r, i, a) for r in rules for i, a in enumerate(r.actions, 1) if isinstance(a, Do)]
    saves = any(action.verb == "save" for _, _, action in acts)
    for rule, i, action in acts:
        if action.verb != "rollback" or run is None or own_loop:
            continue
        at = _at(rule.part_span(f"action {i}"))
        if getattr(run, "checkpoint", None) is None and not saves:
            help = "write `checkpoint = 200 steps` in `run`, or let another rule `save`"
            yield Diagnostic(
                "never-acts", "`rollback` has no checkpoint to go back to", at, (), help
            )
        tests = (
            x
            for x in v.walk(rule.condition)
            if isinstance(x, v.Binary) and x.op == "is" and x.right != v.Name("finite")
        )
        unsound = [x for x in tests if x.left in (v.Name("loss"), v.Name("gradient_norm"))]
        if getattr(run, "on_nan", None) == "stop" and unsound and unsound == [rule.condition]:
            message = (
                f"`rollback` never acts: the run ends at a step of which `{rule.condition}` is true"
            )
            yield Diagnostic("never-acts", message, at, (), "write `on_nan = skip` in `run`")


def _rule_problems(rule: Rule, clauses: Sequence[Clause], scope: Scope) -> Iterator[Diagnostic]:
    """Yield the mistakes in a rule that its words alone show."""
    yield from _expression(rule.condition, scope, rule.part_span("condition"))
    for i, action in enumerate(rule.actions, 1):
        span = rule.part_span(f"action {i}")
        if isinstance(action, Do):
            yield from action_problems(action, scope.constructs, span)
            continue
        yield from target_problems(action.target, scope.constructs, span)
        yield from _expression(action.value, scope, span)
        yield from _set_twice(action, clauses, span)
    yield from _never_reached(rule)


def _never_reached(rule: Rule) -> Iterator[Diagnostic]:
    """Yield an error for every action that another one of the rule leaves no step or no turn for."""
    verbs = [(i, a.verb) for i, a in enumerate(rule.actions, 1) if isinstance(a, Do)]
    ends = [(i, verb) for i, verb in verbs if verb in ("stop", "rollback")]
    for i, verb in verbs:
        if ends and (i, verb) in ends[1:]:
            why = f"`{ends[0][1]}` of the same rule comes first"
        elif ends and ends[0][1] == "rollback" and verb in ("save", "evaluate"):
            why = "it acts after the step, and `rollback` goes back before it"
        else:
            continue
        at = _at(rule.part_span(f"action {i}"))
        yield Diagnostic("no-effect", f"`{verb}` never acts: {why}", at, (), "remove it")


def _set_twice(
    action: Assign, clauses: Sequence[Clause], span: Span | None
) -> Iterator[Diagnostic]:
    """Yield the mistake if a rule sets what a clause sets before every step."""
    target = action.target
    for clause in clauses:
        construct = clause.construct
        if any(target in e.writes for e in construct.effects if construct.performs(e)):
            labels = (
                *_at(span, "this rule sets it"),
                *_at(clause.part_span(target), "this sets it before every step"),
            )
            help = f"remove the rule, or give `{target}` of `{construct.title}` a fixed value"
            message = f"a rule and `{construct.title}` both set `{target}`"
            yield Diagnostic("conflicting-effects", message, labels, (), help)


def unknown_construct(kind: str, name: str, catalog: Catalog) -> Diagnostic:
    """Return the diagnostic for a construct that is not in the catalog."""
    names = sorted(n for k, n in catalog if k == kind)
    known = f"known constructs: {', '.join(f'`{n}`' for n in names) or 'none'}"
    message = f"`{kind}` has no construct `{name}`"
    return Diagnostic("unknown-construct", message, (), (known,), suggest(name, names))
