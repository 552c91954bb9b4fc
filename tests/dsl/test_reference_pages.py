"""The reference pages of constructs and rules."""

import pytest

from trainc.compiler.catalog import catalog
from trainc.dsl.printing.reference_pages import construct_page, constructs_page, rules_page
from trainc.dsl.reading.construct_rules import rules_of


@pytest.mark.parametrize("key", catalog(), ids=" ".join)
def test_every_construct_has_a_page(key: tuple[str, str]) -> None:
    cls = catalog()[key]
    page = construct_page(cls)
    assert page.startswith(f"# {cls.heading()}\n")
    assert cls.usage.strip() in page
    assert all(
        f"`{name}`" in page for name in cls.model_fields if name not in ("path", "arguments")
    )


def test_a_page_prints_what_a_construct_declares_not_to_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls = catalog()["regularize", "pace"]
    monkeypatch.setattr(cls, "division", "views are paired in each micro-batch")
    monkeypatch.setattr(cls, "without_gradient", "a mask holds them")
    lines = construct_page(cls).splitlines()
    divided = "Depends on how a step is divided into micro-batches"
    assert f"{divided}: views are paired in each micro-batch." in lines
    assert "Leaves parameters without a gradient: a mask holds them." in lines


def test_the_reference_lists_everything() -> None:
    assert all(
        f"\n### {cls.heading()}\n" in constructs_page(catalog()) for cls in catalog().values()
    )
    assert all(f"\n## {rule}\n" in rules_page(catalog()) for rule in rules_of(catalog()))
