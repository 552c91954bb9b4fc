"""The rules that diagnostics name."""

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from trainc.cli.explain import explain_topic
from trainc.compiler.bind.report import Report
from trainc.compiler.catalog import Catalog, catalog
from trainc.dsl.reading.construct import Construct, Problem, RuleExplanation
from trainc.dsl.reading.construct_rules import check_rules, rules_of
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.machine_formats import render_sarif
from trainc.dsl.text.rules import RULES

ROOT = Path(__file__).parents[2]


def test_every_rule_in_the_source_is_explained() -> None:
    used = set()
    for folder in ("dsl", "compiler", "trainc"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r'(?:Diagnostic|Problem)\(\s*"([a-z-]+)"', path.read_text()))
    assert used <= rules_of(catalog()).keys()


@pytest.mark.parametrize("rule", rules_of(catalog()))
def test_rules_are_named_and_explained_in_sentences(rule: str) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule)
    about = rules_of(catalog())[rule]
    for text in (about.what, about.why, about.fix):
        assert text.endswith(".")


def test_an_unknown_rule_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="no-such-rule"):
        Diagnostic("no-such-rule", "nothing")


ABOUT = RuleExplanation("A thing is odd.", "Odd things break.", "Make it even.")


class Odd(Construct):
    """A construct with a rule of its own."""

    rules: ClassVar = {"odd-thing": ABOUT}


def test_a_construct_reports_rules_of_its_own() -> None:
    report = Report()
    report.add_problem(Problem("odd-thing", "odd"), Clause(Odd()))
    report.add_problem(Problem("no-effect", "nothing"), Clause(Odd()))
    found, known = report.diagnostics
    assert (found.rule, found.explanation) == ("odd-thing", ABOUT)
    assert known.explanation == RULES["no-effect"]
    (rule, _) = json.loads(render_sarif(report.diagnostics[::-1]))["runs"][0]["tool"]["driver"][
        "rules"
    ][::-1]
    assert rule == {
        "id": "odd-thing",
        "shortDescription": {"text": ABOUT.what},
        "help": {"text": ABOUT.fix},
    }


def test_a_construct_may_not_report_the_rule_of_another() -> None:
    assert "odd-thing" not in rules_of(catalog())
    with pytest.raises(
        TypeError, match="`layer-without-adapter`, which is not a rule of the language"
    ):
        Report().add_problem(Problem("layer-without-adapter", "no"), Clause(Odd()))


@pytest.mark.parametrize(
    ("name", "words"), [("no-effect", "a rule of the language"), ("NoEffect", "hyphens")]
)
def test_a_rule_of_a_construct_needs_a_name_of_its_own(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        type("Bad", (Construct,), {"rules": {name: ABOUT}, "__module__": "elsewhere"})


def test_two_constructs_explain_a_rule_alike_or_not_at_all() -> None:
    def made(about: RuleExplanation) -> type[Construct]:
        return type(
            "Other", (Construct,), {"rules": {"odd-thing": about}, "__module__": "elsewhere"}
        )

    check_rules(made(ABOUT), [Odd])
    with pytest.raises(ValueError, match=r"explain the rule `odd-thing` differently.*`elsewhere`"):
        check_rules(made(ABOUT.replace(what="Another thing.")), [Odd])


def test_the_catalog_refuses_two_meanings_of_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from typing import ClassVar
from trainc.dsl.reading.construct import Construct, RuleExplanation

class Rule(Construct):
    rules: ClassVar = {{"same-word": RuleExplanation("{0}.", "Why.", "Fix.")}}
"""
    (tmp_path / "first_meaning.py").write_text(code.format("First"))
    (tmp_path / "second_meaning.py").write_text(code.format("Second"))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Catalog({("lr", "one"): "first_meaning", ("lr", "two"): "second_meaning"})
    assert found["lr", "one"].rules
    with pytest.raises(
        ValueError, match="`lr one` and `lr two` explain the rule `same-word` differently"
    ):
        found["lr", "two"]


def test_rules_of_one_construct_are_not_the_languages() -> None:
    assert {"layer-without-adapter", "norm-mixes-examples", "nothing-to-measure"}.isdisjoint(RULES)
    for rule in ("layer-without-adapter", "norm-mixes-examples"):
        page = explain_topic([rule])
        assert page is not None
        assert page.startswith(f"# {rule}\n")
