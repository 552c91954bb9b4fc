"""What a `when` rule may do: its actions by name, and the fields of clauses that it may set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.fields import scheduled_fields
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import ASSIGNABLE

VERBS = {"stop": False, "save": False, "warn": True}
Constructs = Mapping[str, Sequence[type[Construct]]]
"""The constructs that each label names; not one where a clause is wrong, or two have this name."""


def verb_problems(verb: str, has_argument: bool, span: Span | None) -> Iterator[Diagnostic]:
    """Yield the mistake in an action such as `stop` or `warn`."""
    if verb not in VERBS:
        known = 'actions are `name = value`, `stop`, `save` and `warn "text"`'
        message = f"there is no action `{verb}`"
        yield Diagnostic("unknown-action", message, _at(span), (known,), suggest(verb, VERBS))
    elif VERBS[verb] != has_argument:
        message = f"`{verb}` {'needs a text' if VERBS[verb] else 'takes no text'}"
        help = 'write `warn "what happened"`' if VERBS[verb] else None
        yield Diagnostic("unknown-action", message, _at(span), (), help)


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
