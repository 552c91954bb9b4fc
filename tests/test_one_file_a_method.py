"""A construct is known to its own file alone: nothing else imports it or writes its name.

The exceptions of today are listed by file. A list is compared as a whole, so that it can only shrink.
"""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import imports
from trainc.compiler.catalog import catalog
from trainc.dsl.reading.construct import KINDS

ROOT = Path(__file__).parents[1]
OWN = "compiler/constructs/"
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("dsl", "kernels", "runtime", "compiler", "trainc")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
OUTSIDE = [file for file in FILES if not file.startswith(OWN)]
NAMES = {name: kind for kind, name in catalog() if name not in KINDS}
"""The kind of each construct by name; `data`, `model` and `run` are words of the language as well."""

KNOW_A_NAME = {
    # The operator of loss and distance in one is for cross-entropy.
    "compiler/passes/pair_views.py": {"cross_entropy"},
    "compiler/plan/site_tables.py": {"cross_entropy"},
    "compiler/program/module_runner.py": {"cross_entropy"},
    # Help that names a construct to write.
    "compiler/driver/compile.py": {"adamw", "cross_entropy", "mse"},
    "dsl/resolve/checks.py": {"batch_scaling"},
    "dsl/text/language_rules.py": {"gns", "pace"},
}
"""Files that write the name of a construct: as a string, or after its kind in a message."""
OTHER_MEANINGS = {
    # A distance of two views of an example.
    "compiler/lower/lowering.py": {"mse"},
    "compiler/method/sites.py": {"mse"},
    "compiler/passes/pair_views.py": {"mse"},
    "kernels/loss/cross_entropy_consistency.py": {"mse"},
    "kernels/loss/linear_cross_entropy_consistency.py": {"mse"},
    "kernels/loss/row_losses.py": {"mse"},
    # An attribute of an optimizer action, and the library.
    "compiler/program/distributed.py": {"torch"},
}
"""Files that write a string which is the name of a construct and means something else there."""

METHOD_KINDS = {
    "regularize",
    "perturb",
    "normalize",
    "noise_scale",
    "adapt",
    "observe",
    "distribute",
}
"""The kinds whose constructs the compiler need not tell apart."""
KNOW_A_KIND = {
    "dsl/text/vocabulary.py": METHOD_KINDS,
    "compiler/bind/binding.py": METHOD_KINDS,  # the order in which clauses are lowered
    "compiler/bind/effects.py": {"noise_scale"},
    "compiler/driver/site_diagnostics.py": {"noise_scale", "regularize"},
    "runtime/noise_scale/history.py": {"noise_scale"},
    "trainc/functional.py": {"noise_scale"},  # the name of a function
}
"""Files that write one of these kinds as a string. `observe` and `perturb` are phases, too."""

NOISE_SCALE = "trainc.runtime.noise_scale"
KNOW_THE_NOISE_SCALE = {
    "runtime/report/calibration_plot.py",
    "runtime/report/layer_map.py",
    "runtime/report/noise_scale_plot.py",
    "runtime/report/run_records.py",
    "runtime/run/live_display.py",
    "trainc/cli/noise_tables.py",
    "trainc/cli/report.py",
    "trainc/functional.py",
}
"""Files that import the noise scale: display and reports do not know signals in general yet."""


def strings(tree: ast.Module) -> Iterator[str]:
    """Yield every string of a file but its docstrings."""
    documentation = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                documentation.add(id(statement.value))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documentation
        ):
            yield node.value


def written(file: str) -> list[str]:
    return list(strings(ast.parse((ROOT / file).read_text(encoding="utf-8"))))


def names_in(texts: list[str]) -> set[str]:
    """Return the names of constructs that are one of the strings, or stand behind their kind in one."""
    words = [text.replace("`", " ").split() for text in texts]
    pairs = {pair for line in words for pair in itertools.pairwise(line)}
    return {name for name, kind in NAMES.items() if name in texts or (kind, name) in pairs}


def imported(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in imports(node)}


def joined(*lists: dict[str, set[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for one in lists:
        for file, names in one.items():
            found[file] = found.get(file, set()) | names
    return found


def test_what_counts_is_found() -> None:
    code = 'def f(x):\n    """Use `noise_scale gns`."""\n    return x.name == "sift" or "add `lr batch_scaling`"'
    assert names_in(list(strings(ast.parse(code)))) == {"sift", "batch_scaling"}
    assert {"gns", "pace", "sift", "l2_sp", "adamw"} <= NAMES.keys()
    assert len(OUTSIDE) > 150


def test_no_file_outside_imports_a_construct() -> None:
    package = OWN.strip("/").replace("/", ".")
    found = {
        file: names
        for file in OUTSIDE
        if (names := {name for name in imported(file) if package in name})
    }
    assert found == {}


def test_no_construct_imports_one_of_another_kind() -> None:
    package = f"trainc.{OWN.replace('/', '.')}"
    for file in (file for file in FILES if file.startswith(OWN)):
        kind = file.removeprefix(OWN).partition("/")[0]
        others = {n for n in imported(file) if n.startswith(package)}
        assert {n for n in others if not n.startswith(f"{package}{kind}.")} == set(), file


def test_no_file_outside_writes_the_name_of_a_construct() -> None:
    found = {file: names for file in OUTSIDE if (names := names_in(written(file)))}
    assert found == joined(KNOW_A_NAME, OTHER_MEANINGS)


def test_no_construct_writes_the_name_of_another() -> None:
    allowed = {"regularize/pace.py": {"mse"}, "optimizer/torch.py": {"torch"}}
    for file in (file for file in FILES if file.startswith(OWN)):
        place = file.removeprefix(OWN)
        others = names_in(written(file)) - {Path(file).stem.strip("_")}
        own = {name for name in others if NAMES[name] == place.partition("/")[0]}
        assert others - own - allowed.get(place, set()) == set(), file


def test_no_file_outside_tells_kinds_of_methods_apart() -> None:
    phases = {"observe", "perturb"}
    found = {file: names for file in OUTSIDE if (names := METHOD_KINDS.intersection(written(file)))}
    only_phases = {file for file, names in found.items() if names <= phases}
    assert {f: n for f, n in found.items() if f not in only_phases} == KNOW_A_KIND


def test_display_and_reports_that_know_the_noise_scale_get_fewer() -> None:
    rooms = (OWN, "runtime/noise_scale/")
    found = {
        file
        for file in FILES
        if not file.startswith(rooms) and any(n.startswith(NOISE_SCALE) for n in imported(file))
    }
    assert found == KNOW_THE_NOISE_SCALE
