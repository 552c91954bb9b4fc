"""pyproject.toml, the disk, typings/ and the front door agree about what the package is."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import trainc

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
FOLDERS = {"trainc": "trainc"} | {
    f"trainc.{folder}": folder for folder in ("compiler", "dsl", "kernels", "runtime")
}


def packages_on_disk(root: Path, folders: dict[str, str]) -> set[str]:
    return {
        ".".join((package, *init.parent.relative_to(root / folder).parts))
        for package, folder in folders.items()
        for init in (root / folder).rglob("__init__.py")
    }


def unshipped_files(root: Path, folders: dict[str, str], data: dict[str, list[str]]) -> list[Path]:
    return [
        file
        for package, folder in folders.items()
        for file in (root / folder).rglob("*")
        if file.is_file()
        and file.suffix not in {".py", ".pyc"}
        and not any(
            file.match(pattern)
            for pattern in data.get(
                ".".join((package, *file.parent.relative_to(root / folder).parts)), []
            )
        )
    ]


def test_every_folder_with_sources_is_a_package() -> None:
    for folder in FOLDERS.values():
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file.relative_to(ROOT)


def test_every_data_file_is_shipped() -> None:
    assert unshipped_files(ROOT, FOLDERS, SETUP["package-data"]) == []


def test_a_forgotten_package_or_file_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "dsl" / "extra").mkdir(parents=True)
    (tmp_path / "dsl" / "extra" / "__init__.py").touch()
    (tmp_path / "dsl" / "extra" / "table.json").touch()
    assert packages_on_disk(tmp_path, {"trainc.dsl": "dsl"}) == {"trainc.dsl.extra"}
    found = unshipped_files(tmp_path, {"trainc.dsl": "dsl"}, SETUP["package-data"])
    assert found == [tmp_path / "dsl" / "extra" / "table.json"]


def test_typings_link_to_the_sources() -> None:
    if not (ROOT / "typings/trainc/dsl").is_symlink():
        pytest.skip("this copy of the repository has no links; only type checkers need them")
    for package, folder in FOLDERS.items():
        link = ROOT / "typings" / package.replace(".", "/")
        assert (link / "__init__.py").resolve() == (ROOT / folder / "__init__.py").resolve()
    for file in (ROOT / "trainc").iterdir():
        if file.name != "__pycache__":
            assert (ROOT / "typings/trainc" / file.name).resolve() == file.resolve()


def test_the_checkout_shadows_nobody() -> None:
    for name in ("dsl", "compiler", "runtime", "kernels"):
        spec = importlib.util.find_spec(name)
        assert spec is None or Path(spec.origin or "").parent != ROOT / name


def test_type_checkers_and_python_see_the_same_front_door() -> None:
    block = next(
        node
        for node in ast.parse((ROOT / "trainc/__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    aliases = [
        (alias, node.module if isinstance(node, ast.ImportFrom) else None)
        for node in block.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert all(alias.asname == alias.name.rpartition(".")[2] for alias, _ in aliases)
    assert {alias.asname for alias, _ in aliases} == set(trainc.__all__)
    homes = {alias.asname: module for alias, module in aliases if module not in {None, "trainc"}}
    assert homes == trainc._HOME
    assert set(trainc.__all__) <= set(dir(trainc))


def test_the_version_is_the_one_in_the_changelog() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == trainc.__version__ == PROJECT["project"]["version"]
