"""`trainc explain` knows every word of the language."""

from __future__ import annotations

import re

import pytest

from trainc.cli.explain import explain_topic
from trainc.compiler.catalog import catalog
from trainc.dsl.reading.fields import field_type
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.syntax import ast
from trainc.dsl.text.language_topics import GROUPS, SCHEDULES
from trainc.dsl.text.vocabulary import BUILT_IN, COUNTERS, KINDS, ROLES, SELECTOR_FUNCTIONS, VERBS
from trainc.dsl.values.functions import FUNCTIONS

POLICIES = [
    name
    for construct in catalog().values()
    for info in construct.model_fields.values()
    if (own := field_type(info)) is not None
    for name in own.functions
]
STATEMENTS = ("train", "let", "use", "when")
WORDS = dict.fromkeys(
    (*FUNCTIONS, *POLICIES, *STATEMENTS, *ast.PARTS, *VERBS, *SELECTOR_FUNCTIONS, *ROLES, *COUNTERS, *BUILT_IN,
     *KINDS, "epoch", "%", "then", "where", "expect", "for", "cooldown", "is", "all", "trainable", *GROUPS)
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_the_language_has_a_page(word: str) -> None:
    page = explain_topic([word])
    assert page is not None
    assert len(page) > 20


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_shown_with_all_its_arguments(name: str) -> None:
    form = SCHEDULES[name].form
    for argument in FUNCTIONS[name].arguments:
        assert re.search(rf"\b{argument}\b", form)
    assert SCHEDULES.keys() == {n for n, about in FUNCTIONS.items() if about.schedule}


def test_examples_are_right() -> None:
    for words in GROUPS.values():
        for topic in words.values():
            if topic.example and not topic.example.startswith(("use", "let")):
                assert load_spec(topic.example, catalog()).errors == ()


def test_a_word_that_is_none_is_answered_with_the_nearest() -> None:
    assert explain_topic(["cosin"]) is None
