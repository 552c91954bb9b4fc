"""What lies between files of the front end: tables, functions, rules, catalog, pages."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from trainc.compiler.catalog import catalog, gather
from trainc.dsl.printing.reference_pages import construct_page, constructs_page, rules_page
from trainc.dsl.reading.construct import Construct
from trainc.dsl.syntax.grammar import GRAMMAR
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.rules import RULES
from trainc.dsl.values import value_json as v
from trainc.dsl.values.functions import FUNCTIONS

ROOT = Path(__file__).parents[2]


def test_the_grammar_is_short_and_knows_no_construct() -> None:
    grammar = GRAMMAR.read_text(encoding="utf-8")
    assert len(grammar.splitlines()) < 120
    words = set(re.findall(r"\w+", grammar))
    assert not words & {name for kind, name in catalog() if name not in (kind, "torch")} - {"step"}


def test_every_policy_of_the_batch_is_one_that_the_compiler_reads() -> None:
    from trainc.compiler.constructs.data._batch_policy import POLICIES, read

    for name, function in POLICIES.items():
        given: dict[str, v.Expr] = {
            "samples": v.Quantity(v.Duration(8, "samples")),
            "duration": v.Quantity(v.Duration(100, "tokens")),
            "amount": v.Name("gns"),
            "plain": v.Number(0.5),
            "switch": v.Name("true"),
        }
        kwargs = {key: given[kind] for key, kind in function.arguments.items()}
        if name == "ramp":
            kwargs["to"] = v.Quantity(v.Duration(16, "samples"))
        assert read(v.called(name, **kwargs), None).name == name
        assert not set(function.arguments) - set(kwargs)
    assert not FUNCTIONS.keys() & POLICIES.keys()


def test_every_rule_in_the_source_is_explained() -> None:
    used = set()
    for folder in ("dsl", "compiler", "trainc"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r'(?:Diagnostic|Problem)\(\s*"([a-z-]+)"', path.read_text()))
    assert used <= RULES.keys()


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_named_and_told_in_sentences(rule: str) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule)
    for text in (RULES[rule].what, RULES[rule].why, RULES[rule].fix):
        assert text.endswith(".")


def test_an_unknown_rule_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="no-such-rule"):
        Diagnostic("no-such-rule", "nothing")


@pytest.mark.parametrize("key", catalog(), ids=" ".join)
def test_every_construct_has_a_page(key: tuple[str, str]) -> None:
    cls = catalog()[key]
    page = construct_page(cls)
    assert page.startswith(f"# {cls.heading()}\n")
    assert cls.usage.strip() in page
    assert all(
        f"`{name}`" in page for name in cls.model_fields if name not in ("path", "arguments")
    )


def test_the_reference_lists_everything() -> None:
    assert all(
        f"\n### {cls.heading()}\n" in constructs_page(catalog()) for cls in catalog().values()
    )
    assert all(f"\n## {rule}\n" in rules_page() for rule in RULES)


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "trainc.constructs")


def test_packages_bring_constructs() -> None:
    found = gather({}, [entry("loss.squared", "trainc.compiler.constructs.loss.mse")])
    assert list(found) == [("loss", "squared")]
    assert ("loss", "squared") in found
    assert ("loss", "mse") not in found


def test_a_name_clash_names_both() -> None:
    with pytest.raises(ValueError, match=r"`loss mse`: `ours.mse` and `theirs.mse`"):
        gather({("loss", "mse"): "ours.mse"}, [entry("loss.mse", "theirs.mse")])


def test_an_entry_point_needs_a_kind() -> None:
    with pytest.raises(ValueError, match=r"kind\.name"):
        gather({}, [entry("squared", "theirs.mse")])


def test_a_construct_knows_its_name_from_its_file() -> None:
    from trainc.compiler.constructs.loss.mse import MeanSquaredError

    assert (MeanSquaredError.kind, MeanSquaredError.name) == ("loss", "mse")
    assert issubclass(MeanSquaredError, Construct)


def test_a_field_that_pydantic_would_read_by_its_own_rules_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`over` .* is annotated with the class `Duration`"):
        type(
            "Wrong",
            (Construct,),
            {"__module__": __name__, "__annotations__": {"over": v.Duration | None}},
        )
