"""The catalog: constructs of trainc and of installed packages."""

from importlib.metadata import EntryPoint

import pytest

from trainc.compiler.catalog import catalog_of


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "trainc.constructs")


def test_packages_bring_constructs() -> None:
    found = catalog_of({}, [entry("loss.squared", "trainc.compiler.constructs.loss.mse")])
    assert list(found) == [("loss", "squared")]
    assert ("loss", "squared") in found
    assert ("loss", "mse") not in found


def test_a_name_clash_names_both() -> None:
    with pytest.raises(ValueError, match=r"`loss mse`, `ours.mse` and `theirs.mse`"):
        catalog_of({("loss", "mse"): "ours.mse"}, [entry("loss.mse", "theirs.mse")])


def test_an_entry_point_needs_a_kind() -> None:
    with pytest.raises(ValueError, match=r"kind\.name"):
        catalog_of({}, [entry("squared", "theirs.mse")])
