"""Every field and every part of every construct: a value that makes no sense is a located error, before anything runs.

Nothing here names a construct but `SIGNED`: a new one is held to the same by its fields' types alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest

import trainc
from tests.conformance import Setup
from tests.test_constructs import companion
from trainc.compiler.catalog import catalog
from trainc.dsl.printing.canonical import format_statement
from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.field_types import (
    FRACTION,
    MODULE_SELECTOR,
    PERIOD,
    PROBABILITY,
    PROPORTION,
    RANGE,
    SCHEDULE,
    SCOPED_DECAY_RATES,
    SCOPED_NUMBERS,
    SCOPED_SCHEDULES,
    SELECTOR,
    SHRINKING_FACTOR,
    FieldType,
)
from trainc.dsl.reading.fields import field_type
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.parser import parse
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.source import Source

OF_INDICES = ("cross_entropy", "focal", "ranked", "dpo", "model", "call")
SIGNED = {("loss", name, "ignore_index") for name in OF_INDICES}
"""The fields whose numbers may be negative."""
CONSTRUCTS = list(catalog().items())
HIDDEN = ("path", "arguments")
SCOPED = (SCOPED_NUMBERS, SCOPED_SCHEDULES, SCOPED_DECAY_RATES)
LENGTH = 40


def numeric(info: Any) -> bool:
    """Say whether a field takes plain numbers, alone or in a list."""
    todo = [info.annotation]
    while todo:
        one = todo.pop()
        if one in (int, float):
            return True
        todo += get_args(one)
    return False


def fields(*wanted: FieldType | str) -> list[Any]:
    """Return a test case for each field of one of some types; `numbers` are plain ones."""
    found = []
    for key, construct in CONSTRUCTS:
        for name, info in construct.model_fields.items():
            own = field_type(info)
            kind = own if own is not None else "numbers" if numeric(info) else None
            if kind in wanted and name not in HIDDEN and (*key, name) not in SIGNED:
                found.append(pytest.param(construct, name, id=f"{' '.join(key)}: {name}"))
    return found


def selecting(construct: type[Construct], name: str, selector: str) -> str:
    """Return a value of a field with a selector: with a number, or in a list, where the field takes such."""
    info = construct.model_fields[name]
    if (own := field_type(info)) in SCOPED:
        return f"[0.1, 0.2] on {selector}" if own is SCOPED_DECAY_RATES else f"0.1 on {selector}"
    return f"[{selector}]" if "tuple" in str(info.annotation) else selector


def setup_of(construct: type[Construct]) -> Setup:
    if construct.kind in ("model", "data", "run"):
        return Setup()
    setup: Setup = getattr(companion(construct), "conformance", Setup)()
    return setup


def example(construct: type[Construct], setup: Setup) -> ast.ClauseTree:
    """Return the tree of the clause that a setup trains."""
    source = Source("example", setup.usage or construct.usage)
    trees = [t for t in parse(source).tree.statements if isinstance(t, ast.ClauseTree)]
    (tree,) = [t for t in trees if t.kind.id == construct.kind]
    return tree


def node(text: str) -> ast.Node:
    (let,) = parse(Source("value", f"let value = {text}")).tree.statements
    assert isinstance(let, ast.Let)
    return let.value


def with_field(tree: ast.ClauseTree, name: str, value: str) -> ast.ClauseTree:
    kept = [field for field in tree.fields or () if field.name.id != name]
    return tree.replace(fields=(*kept, ast.Field(ast.Ident(name), node(value))))


def with_part(tree: ast.ClauseTree, word: str, value: str) -> ast.ClauseTree:
    kept = [part for part in tree.parts if part.word != word]
    return tree.replace(parts=(*kept, ast.Part(word, node(value))))


def spec_text(tree: ast.ClauseTree, setup: Setup) -> str:
    """Return a spec with a clause, and the rest of what a program needs."""
    rest = parse(Source("rest", setup.rest)).tree.statements
    kept = [s for s in rest if isinstance(s, ast.ClauseTree) and s.kind.id != tree.kind.id]
    return "\n".join(format_statement(s) for s in (*kept, tree))


def problems(
    construct: type[Construct], tree: ast.ClauseTree, setup: Setup
) -> Sequence[Diagnostic]:
    """Return what check says of a spec with a clause, or else what the plan says."""
    checked = load_spec(Source("spec.train", spec_text(tree, setup)), catalog())
    if checked.spec is None or checked.diagnostics:
        return checked.diagnostics
    try:
        return trainc.plan(checked.spec, setup.model()).warnings
    except trainc.SpecError as error:
        return error.diagnostics


def at(found: Sequence[Diagnostic], text: str, rules: Sequence[str] = ()) -> bool:
    """Say whether a diagnostic is placed at a text, or around it, and of one of some rules."""
    places = (d for d in found if d.span is not None and (not rules or d.rule in rules))
    return any(text in d.span.text for d in places if d.span is not None)


@pytest.mark.parametrize(("construct", "name"), fields(SELECTOR, MODULE_SELECTOR, *SCOPED))
def test_a_selector_that_matches_nothing(construct: type[Construct], name: str) -> None:
    setup = setup_of(construct)
    value = selecting(construct, name, '"no.such.name"')
    found = problems(construct, with_field(example(construct, setup), name, value), setup)
    assert at(found, '"no.such.name"', ["selector-matches-nothing"]), found


@pytest.mark.parametrize(("construct", "name"), fields(SELECTOR, MODULE_SELECTOR, *SCOPED))
def test_an_expect_that_fails(construct: type[Construct], name: str) -> None:
    setup = setup_of(construct)
    value = selecting(construct, name, "ndim(1) expect 999")
    found = problems(construct, with_field(example(construct, setup), name, value), setup)
    assert at(found, "expect 999", ["selector-count"]), found


@pytest.mark.parametrize(
    ("construct", "name"),
    fields("numbers", FRACTION, SCHEDULE, SHRINKING_FACTOR, PROBABILITY, PROPORTION, *SCOPED),
)
def test_a_negative_number(construct: type[Construct], name: str) -> None:
    setup = setup_of(construct)
    info = construct.model_fields[name]
    pair = field_type(info) is SCOPED_DECAY_RATES or str(info.annotation).startswith(
        "tuple[typing.Ann"
    )
    value = "[-1, -1]" if pair else "-1"
    found = problems(construct, with_field(example(construct, setup), name, value), setup)
    assert at(found, "-1"), found
    assert any(d.severity == "error" for d in found)


@pytest.mark.parametrize(("construct", "name"), fields(RANGE))
def test_a_range_below_zero(construct: type[Construct], name: str) -> None:
    setup = setup_of(construct)
    found = problems(construct, with_field(example(construct, setup), name, "-2..-1"), setup)
    assert at(found, "-2..-1", ["bad-value"]), found


def durations() -> Iterator[Any]:
    for key, construct in CONSTRUCTS:
        for name, info in construct.model_fields.items():
            if (own := field_type(info)) is not None and own.title.startswith(
                ("duration", "samples")
            ):
                yield pytest.param(construct, name, id=f"{' '.join(key)}: {name}")


@pytest.mark.parametrize(("construct", "name"), list(durations()))
@pytest.mark.parametrize("value", ["-1 samples", "-5%", "200%", "1"])
def test_a_duration_that_is_none(construct: type[Construct], name: str, value: str) -> None:
    setup = setup_of(construct)
    found = problems(construct, with_field(example(construct, setup), name, value), setup)
    assert at(found, value, ["bad-value", "wrong-unit"]), found


@pytest.mark.parametrize(("construct", "name"), fields(PERIOD))
def test_a_period_longer_than_the_run(construct: type[Construct], name: str) -> None:
    setup = setup_of(construct)
    found = problems(construct, with_field(example(construct, setup), name, "1M steps"), setup)
    assert at(found, "1M steps", ["never-acts"]), found


SELECTING = [pytest.param(c, id=" ".join(k)) for k, c in CONSTRUCTS if c.targets != "none"]
TIMED = [pytest.param(c, id=" ".join(k)) for k, c in CONSTRUCTS if k[0] != "model"]


@pytest.mark.parametrize("construct", SELECTING)
def test_an_on_that_matches_nothing_or_another_number(construct: type[Construct]) -> None:
    setup = setup_of(construct)
    tree = example(construct, setup)
    found = problems(construct, with_part(tree, "on", '"no.such.name"'), setup)
    assert at(found, '"no.such.name"', ["selector-matches-nothing"]), found
    found = problems(construct, with_part(tree, "on", "trainable expect 999"), setup)
    assert at(found, "expect 999", ["selector-count"]), found


@pytest.mark.parametrize("construct", TIMED)
@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("from", "1M steps"),
        ("from", "100%"),
        ("every", "1M steps"),
        ("until", "0 steps"),
        ("from", "-1 steps"),
    ],
)
def test_times_at_which_nothing_can_happen(
    construct: type[Construct], word: str, value: str
) -> None:
    setup = setup_of(construct)
    tree = with_part(example(construct, setup), word, value)
    if construct.kind == "run":
        tree = with_field(tree, "length", f"{LENGTH} steps")
    found = problems(construct, tree, setup)
    assert at(found, value), found
    assert any(d.severity == "error" for d in found)


def test_the_examples_are_right_without_such_a_value() -> None:
    for _, construct in CONSTRUCTS:
        setup = setup_of(construct)
        found = problems(construct, example(construct, setup), setup)
        assert [d for d in found if d.severity == "error"] == [], construct.heading()
