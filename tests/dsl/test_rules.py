"""The rules that diagnostics name."""

import re
from pathlib import Path

import pytest

from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.rules import RULES

ROOT = Path(__file__).parents[2]


def test_every_rule_in_the_source_is_explained() -> None:
    used = set()
    for folder in ("dsl", "compiler", "trainc"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r'(?:Diagnostic|Problem)\(\s*"([a-z-]+)"', path.read_text()))
    assert used <= RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_named_and_explained_in_sentences(rule: str) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule)
    for text in (RULES[rule].what, RULES[rule].why, RULES[rule].fix):
        assert text.endswith(".")


def test_an_unknown_rule_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="no-such-rule"):
        Diagnostic("no-such-rule", "nothing")
