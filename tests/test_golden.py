"""Every `train` block in tests/golden/**/*.md is checked against the `diagnostics` block after it.

Those in golden/bound are also planned on the model they name. A block's first line may carry
settings: ```train --set width=3. `pytest --update-golden` rewrites.
"""

import re
from pathlib import Path

import pytest

import trainc
from trainc.compiler.catalog import catalog
from trainc.dsl.reading.construct_rules import rules_of
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.render import render_text
from trainc.dsl.text.source import Source

CASE = re.compile(
    r"^## (?P<title>[^\n]+)$(?:(?!^## ).)*?"
    r"^```train(?P<settings>[^\n]*)\n(?P<spec>.*?)^```\n(?:(?!^## ).)*?"
    r"^```diagnostics\n(?P<expected>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
CASES = [
    pytest.param(path, match["title"], id=f"{path.stem}: {match['title']}")
    for path in sorted(Path(__file__).parent.glob("golden/**/*.md"))
    for match in CASE.finditer(path.read_text())
]


def planned(spec: Spec) -> tuple[Diagnostic, ...]:
    """Return what planning has to say: its errors, or else the plan's warnings."""
    try:
        return trainc.plan(spec).warnings
    except trainc.SpecError as error:
        return error.diagnostics


@pytest.mark.parametrize(("path", "title"), CASES)
def test_golden(path: Path, title: str, request: pytest.FixtureRequest) -> None:
    text = path.read_text()
    case = next(m for m in CASE.finditer(text) if m["title"] == title)
    settings = re.findall(r"--set (\S+)", case["settings"])
    checked = load_spec(Source("spec.train", case["spec"]), catalog(), settings)
    found = checked.diagnostics
    if path.parent.name == "bound" and checked.spec is not None:
        found = planned(checked.spec)
    got = render_text(found).rstrip("\n")
    got = got + "\n" if got else ""
    if request.config.getoption("--update-golden"):
        path.write_text(text[: case.start("expected")] + got + text[case.end("expected") :])
    else:
        assert got == case["expected"]


def test_titles_are_unique() -> None:
    ids = [str(case.id) for case in CASES]
    assert len(ids) == len(set(ids))
    assert len(ids) >= 30


def test_every_rule_is_one_that_something_raises() -> None:
    folders = ("dsl", "compiler", "trainc", "runtime")
    files = [p for f in folders for p in (Path(__file__).parents[1] / f).rglob("*.py")]
    text = re.sub(r'"[a-z-]+": RuleExplanation', "", "".join(p.read_text() for p in files))
    assert [rule for rule in rules_of(catalog()) if f'"{rule}"' not in text] == []
