"""What is built, the disk, typings/ and the front door agree about what the package is."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import trainc

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
FOLDERS = {"trainc": "trainc"} | {
    f"trainc.{folder}": folder for folder in ("compiler", "dsl", "kernels", "runtime")
}
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "setup.py")


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


USE = """
import sys, trainc
from pathlib import Path
from trainc.compiler.catalog import catalog
from trainc.kernels import operators

assert Path(trainc.__file__).is_relative_to(sys.prefix), trainc.__file__
assert trainc.check(Path("spec.train").read_text()).spec
assert all([cls.__doc__ for cls in catalog().values()])
"""
SPEC = """train 1
model "tiny:model"
data  "tiny:data" { batch = 4 samples }
loss  cross_entropy
run   { length = 2 steps }
optimizer sgd { lr = 1e-2 }
"""
TINY = """
import torch

def model():
    return torch.nn.Linear(3, 2)

class Split:
    def __len__(self):
        return 8

    def batch(self, indices):
        return torch.ones(len(indices), 3), torch.zeros(len(indices), dtype=torch.long)

class data:
    train = evaluation = Split()
    tokens_per_sample = 1
"""
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def python(*command: str | Path, cwd: Path) -> str:
    """Return what a Python process prints; it must succeed."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(kind: str, out: Path) -> Path:
    """Build a wheel or an sdist from a copy of the sources, and return the archive."""
    sources = out / "sources"
    for name in (*FOLDERS.values(), *SOURCES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name)
        else:
            shutil.copy(ROOT / name, sources)
    lines = python(sys.executable, "-P", "-c", BUILD, f"build_{kind}", out, cwd=sources)
    return out / lines.splitlines()[-1]


def contents(archive: Path) -> set[str]:
    """Return the files of an archive; an sdist's without the folder that holds them all."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    return {name.partition("/")[2] for name in tarfile.open(archive).getnames()}


def clean_environment(folder: Path) -> Path:
    """Make an environment that has what trainc depends on, but not this checkout; return its Python."""
    python(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    found = folder / "bin/python"
    home = python(found, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    # Folders named in a .pth file are searched, but the .pth files in them, an editable install's, are not run.
    others = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    (Path(home.strip()) / "dependencies.pth").write_text(others)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_has_every_file_and_works_elsewhere(kind: str, tmp_path: Path) -> None:
    archive = built(kind, tmp_path)
    prefixes = {folder: package.replace(".", "/") for package, folder in FOLDERS.items()}
    sources = {
        str(Path(prefixes[folder] if kind == "wheel" else folder, *file.relative_to(ROOT / folder).parts))
        for folder in FOLDERS.values()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }  # fmt: skip
    assert sources - contents(archive) == set()

    found = clean_environment(tmp_path / "environment")
    pip = (sys.executable, "-m", "pip", "--python", found, "-q", "--disable-pip-version-check")
    install = ("install", "--no-deps", "--no-index", "--no-build-isolation", archive)
    python(*pip, *install, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "spec.train").write_text(SPEC)
    (elsewhere / "tiny.py").write_text(TINY)
    python(found, "-c", USE, cwd=elsewhere)
    trainc_command = found.with_name("trainc")
    assert "5 clauses" in python(trainc_command, "check", "spec.train", cwd=elsewhere)
    python(trainc_command, "run", "spec.train", "--out", "run", cwd=elsewhere)
    assert (elsewhere / "run").is_dir()


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
