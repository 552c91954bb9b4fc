"""Every closed set of words is one list; whoever makes something of the words is held to it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import trainc
from trainc.compiler.bind import binding, effects
from trainc.compiler.catalog import catalog
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.model.select import select
from trainc.dsl.reading.constants import constant
from trainc.dsl.reading.selectors import selector
from trainc.dsl.syntax.grammar import GRAMMAR
from trainc.dsl.syntax.parser import parse_expression
from trainc.dsl.text.language_topics import UNITS as UNIT_TOPICS
from trainc.dsl.text.source import Source
from trainc.dsl.text.vocabulary import (
    ASSIGNABLE,
    BUILT_IN,
    COUNTERS,
    KINDS,
    PHASES,
    RESOURCES,
    ROLES,
    SELECTOR_FUNCTIONS,
    SELECTOR_WORDS,
    SHAPES,
    SIGNALS,
    STATES,
    TIMES,
    WHERE_NAMES,
)
from trainc.dsl.text.vocabulary import UNITS as WRITTEN_UNITS
from trainc.dsl.values.durations import UNITS, Duration
from trainc.dsl.values.functions import FUNCTIONS
from trainc.runtime.schedule import clock, expressions, functions, operations, time_span
from trainc.runtime.step.action import Phase

ROOT = Path(__file__).parents[2]


def words_of(terminal: str) -> list[str]:
    """Return the words a terminal of the grammar stands for: `/(model|data|...)(?!...)/`."""
    grammar = GRAMMAR.read_text(encoding="utf-8")
    (pattern,) = re.findall(rf"^{terminal}(?:\.\d+)?: /\(?([\w|]+)\)?", grammar, re.M)
    return str(pattern).split("|")


def test_the_grammar_knows_the_kinds_and_the_units() -> None:
    assert sorted(words_of("KIND") + words_of("RUN")) == sorted(KINDS)
    assert [f"{word}s" for word in words_of("UNIT")] == list(WRITTEN_UNITS)


def test_the_grammar_is_short_and_knows_no_construct() -> None:
    grammar = GRAMMAR.read_text(encoding="utf-8")
    assert len(grammar.splitlines()) < 120
    words = set(re.findall(r"\w+", grammar))
    of_the_language = {*KINDS, "torch", "call", "step"}
    assert not words & {name for _, name in catalog()} - of_the_language


def test_every_kind_has_a_folder_and_a_place_in_the_order_of_lowering() -> None:
    folders = [p.name for p in (ROOT / "compiler/constructs").iterdir() if p.name[0] not in "_."]
    assert sorted(folders) == sorted(KINDS)
    assert sorted(binding.ORDER) == sorted(KINDS)


def test_what_one_clause_alone_may_write_is_a_resource() -> None:
    assert set(effects.SINGLE) <= RESOURCES


def test_the_phases_are_those_of_the_step() -> None:
    assert [phase.name.lower() for phase in sorted(Phase)] == list(PHASES)


def test_the_clock_counts_what_durations_are_in() -> None:
    assert clock.COUNTERS == COUNTERS
    assert time_span.UNITS == UNITS == (*COUNTERS, "run")
    assert clock.Clock().counters().keys() == set(COUNTERS)


def test_every_unit_has_a_singular_and_a_page_and_times_are_seconds() -> None:
    assert UNIT_TOPICS.keys() == {*WRITTEN_UNITS, "%"}
    for unit in WRITTEN_UNITS:
        counted = Duration(3 * TIMES[unit], "seconds") if unit in TIMES else Duration(3, unit)  # type: ignore[arg-type]
        for word in (unit, unit[:-1]):
            node, problems = parse_expression(Source("", f"3 {word}"))
            assert node is not None
            assert constant(node) == counted
            assert not problems


def test_the_functions_are_those_of_the_runtime() -> None:
    schedules = {name: f for name, f in FUNCTIONS.items() if f.schedule}
    assert schedules.keys() == functions.SCHEDULE_FUNCTIONS.keys()
    for name, function in schedules.items():
        piece = functions.SCHEDULE_FUNCTIONS[name]
        assert dict(function.arguments) == dict(piece.arguments), name
        assert function.positional == piece.positional, name
        assert list(function.arguments)[: function.required] == list(piece.required), name
    assert FUNCTIONS.keys() - schedules.keys() == operations.MATHS.keys()


def test_shapes_states_and_signals_are_those_of_the_runtime() -> None:
    assert set(SHAPES) == set(functions.SHAPES)
    assert set(STATES) == set(operations.STATES)
    assert set(expressions.SIGNAL_UNITS) <= set(SIGNALS)
    assert set(ASSIGNABLE) <= set(SIGNALS)


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.Linear(4, 4)
        self.mlp = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mlp(self.attention(self.embedding(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "text",
    [
        *(f"all where {name} >= 0" for name in WHERE_NAMES),
        *(f"role({role})" for role in ROLES),
        "type(Linear)",
        "ndim(2)",
        "depth(0..1)",
        *SELECTOR_WORDS,
    ],
)
def test_selections_know_every_name_role_and_function(text: str) -> None:
    node, _ = parse_expression(Source("<text>", text))
    assert node is not None
    model = _Gpt()
    trainc.compile(
        "loss cross_entropy optimizer sgd { lr = 0.1 } adapt lora on type(Linear) { rank = 2, alpha = 2 }",
        model,
    )
    assert select(selector(node), build_inventory(model), "parameters")


def test_every_selector_function_is_tried() -> None:
    assert set(SELECTOR_FUNCTIONS) == {"type", "ndim", "role", "depth"}
    assert len(BUILT_IN) == len(set(BUILT_IN))
