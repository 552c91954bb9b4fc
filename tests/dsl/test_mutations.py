"""A text that is nearly a spec gets located diagnostics; corrections come to an end; formatting keeps the meaning."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings

from tests.dsl.spec_mutations import mutations
from trainc.compiler.catalog import catalog
from trainc.dsl.printing.formatter import format_source
from trainc.dsl.resolve.fixes import fix_file
from trainc.dsl.resolve.resolver import Checked, load_spec
from trainc.dsl.syntax.parser import parse
from trainc.dsl.text.machine_formats import render_github, render_json, render_sarif
from trainc.dsl.text.render import render_text
from trainc.dsl.text.source import Source


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder) / "spec.train"


def check(text: str) -> Checked:
    return load_spec(Source("spec.train", text), catalog())


@settings(max_examples=150)
@given(mutations())
def test_every_diagnostic_is_at_a_place_in_the_text(text: str) -> None:
    checked = check(text)
    assert (checked.spec is None) == bool(checked.errors)
    for found in checked.diagnostics:
        assert found.labels, found
        for span in [label.span for label in found.labels] + (
            [found.edit.span] if found.edit else []
        ):
            assert span.source.text == text
            assert 0 <= span.start <= span.end <= len(text), found
    for render in (render_text, render_json, render_sarif, render_github):
        render(checked.diagnostics).encode()


@settings(max_examples=60)
@given(mutations(1))
def test_corrections_come_to_an_end_and_make_no_mistakes(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    before = load_spec(file, catalog())
    made = fix_file(file, catalog())
    fixed = file.read_bytes()
    after = load_spec(file, catalog())
    assert not fix_file(file, catalog()), "a second time there is nothing left to correct"
    assert file.read_bytes() == fixed
    assert len(after.errors) <= len(before.errors), (made, after.errors)
    assert made or fixed == text.encode()


@settings(max_examples=150)
@given(mutations())
def test_formatting_is_idempotent_and_keeps_the_meaning(text: str) -> None:
    source = Source("spec.train", text)
    if parse(source).found:
        return
    once = Source("spec.train", format_source(source))
    assert format_source(once) == once.text
    assert parse(once).tree == parse(source).tree
    before, after = check(text), check(once.text)
    assert before.spec == after.spec
    said = [sorted((d.rule, d.message) for d in c.diagnostics) for c in (before, after)]
    assert said[0] == said[1]
