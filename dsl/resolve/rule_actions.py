"""What a `when` rule may do: its actions by name, and the fields of clauses that it may set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainc.dsl.reading.constants import Unreadable, describe
from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.fields import scheduled_fields
from trainc.dsl.reading.selectors import selector
from trainc.dsl.resolve.statements import Do
from trainc.dsl.syntax import ast
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import ASSIGNABLE, VERBS

Constructs = Mapping[str, Sequence[type[Construct]]]
"""The constructs that each label names; not one where a clause is wrong, or two have this name."""


def action_problems(action: Do, constructs: Constructs, span: Span | None) -> Iterator[Diagnostic]:
    """Yield the mistake in an action such as `stop`, `warn "text"` or `close pace`."""
    verb, argument = action.verb, action.argument
    if verb not in VERBS:
        known = f"actions are `name = value`, {', '.join(f'`{form(one)}`' for one in VERBS)}"
        message = f"there is no action `{verb}`"
        yield Diagnostic("unknown-action", message, _at(span), (known,), suggest(verb, VERBS))
    elif (VERBS[verb] is None) != (argument is None):
        message = (
            f"`{verb}` takes nothing" if VERBS[verb] is None else f"`{verb}` needs a {VERBS[verb]}"
        )
        yield Diagnostic("unknown-action", message, _at(span), (), f"write `{form(verb)}`")
    elif VERBS[verb] == "clause" and argument not in constructs:
        message = f"no clause is called `{argument}`"
        help = suggest(str(argument), constructs)
        yield Diagnostic("unknown-target", message, _at(span), (), help)


def form(verb: str) -> str:
    """Return how an action is written."""
    examples = {"text": ' "what happened"', "clause": " pace", "selector": ' "blocks.*"'}
    return verb + examples.get(VERBS[verb] or "", "")


def read_action(verb: str, node: ast.Node | None) -> Do:
    """Return an action with its argument; raises Unreadable for one of another kind than the verb takes."""
    wanted = VERBS.get(verb)
    if node is None or wanted is None:
        return Do(verb, None if node is None else describe(node))
    if wanted == "selector":
        return Do(verb, selector(node))
    if wanted == "clause" and isinstance(node, ast.Ident):
        return Do(verb, node.id)
    if wanted == "text" and isinstance(node, ast.Str):
        return Do(verb, node.value)
    example = f"expected a {wanted}, found {describe(node)}"
    raise Unreadable(node, example, "unknown-action", f"write `{form(verb)}`")


def target_problems(target: str, constructs: Constructs, span: Span | None) -> Iterator[Diagnostic]:
    """Yield the mistake on the left of `=` in a rule."""
    if target in ASSIGNABLE:
        return
    label, _, field = target.partition(".")
    if not field:
        yield _no_field(target, constructs, span)
    elif label not in constructs:
        message = f"no clause is called `{label}`"
        yield Diagnostic("unknown-target", message, _at(span), (), suggest(label, constructs))
    elif len(constructs[label]) == 1:
        yield from _field_problems(label, field, constructs[label][0], span)


def _field_problems(
    label: str, field: str, construct: type[Construct], span: Span | None
) -> Iterator[Diagnostic]:
    title, settable = construct.heading(), scheduled_fields(construct.model_fields)
    if field in settable:
        return
    names = ", ".join(f"`{label}.{name}`" for name in settable)
    note = f"a rule can set {names}" if settable else f"no field of `{title}` is a schedule"
    if field in construct.model_fields:
        message = f"a rule cannot set `{field}` of `{title}`: it sets schedules of one number"
        yield Diagnostic("unknown-target", message, _at(span), (note,))
        return
    message = f"`{title}` has no field `{field}`"
    yield Diagnostic("unknown-target", message, _at(span), (note,), suggest(field, settable))


def _no_field(target: str, constructs: Constructs, span: Span | None) -> Diagnostic:
    """Return the diagnostic for a name that is neither the batch nor a field with its clause's label."""
    fields = [
        f"{label}.{name}"
        for label, found in constructs.items()
        for construct in found
        for name in scheduled_fields(construct.model_fields)
    ]
    same = [name for name in fields if name.partition(".")[2] == target]
    own = [name for name in fields if name.partition(".")[0] == target]
    near = [f"`{name}`" for name in (same or own)]
    help = (
        f"name clause and field: {' or '.join(near)}"
        if near
        else suggest(target, [*ASSIGNABLE, *fields])
    )
    note = "rules set `batch`, or a scheduled field of a clause by its label, such as `adamw.lr`"
    return Diagnostic("unknown-target", f"a rule cannot set `{target}`", _at(span), (note,), help)


def _at(span: Span | None) -> tuple[Label, ...]:
    return (Label(span),) if span else ()
