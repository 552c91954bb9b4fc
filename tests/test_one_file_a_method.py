"""A construct is known to its own file alone: nothing else imports it or writes its name.

The exceptions of today are listed by file. A list is compared as a whole, so that it can only shrink.
"""

import ast
import itertools
import re
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
ORDINARY = {"tokens", "text", "call", "local", "gradient_norm", "noise", "delta", "targets", "set"}
"""Names that are words of every other file, too: they count only behind their kind, as in `data text`."""

OTHER_MEANINGS = {
    # The library.
    "runtime/data/generators.py": {"torch"},
    "runtime/sources/adapt.py": {"torch"},
    # Measuring every parameter on a few examples.
    "runtime/noise_scale/action.py": {"calibration"},
    "runtime/noise_scale/resume.py": {"calibration"},
    # A parameter that a model itself puts in the sequence.
    "compiler/structure/roles.py": {"prompt"},
    # What to call for a loss.
    "compiler/program/step_totals.py": {"call"},
    "runtime/soundness/own_loop.py": {"call"},
    # What of a tensor is chosen as one.
    "runtime/mask/entry_choice.py": {"n_m"},
    "runtime/mask/structures.py": {"n_m"},
    # A distance of two views of an example.
    "kernels/loss/consistency.py": {"mse"},
    "kernels/loss/cross_entropy_consistency.py": {"mse"},
    "kernels/loss/linear_cross_entropy_consistency.py": {"mse"},
    "kernels/loss/row_losses.py": {"mse"},
    # Of a spectrum from that of random weights.
    "trainc/cli/spectrum.py": {"distance"},
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
}
"""Files that write one of these kinds as a string. `observe` and `perturb` are phases, too."""

PRIVATE_ROOMS = {"runtime/noise_scale/": "compiler/constructs/noise_scale/"}
"""Rooms that belong to the constructs of one kind: nobody else imports them."""
PRIVATE_WORDS = re.compile(r"noise[ _-]?scale|\bgns\b", re.IGNORECASE)
"""The words of these constructs, which no file outside constructs writes, neither in code nor in texts and comments."""
MAY_WRITE_THEM = {"dsl/text/vocabulary.py", "compiler/bind/binding.py"}  # as a kind of clause

CONCEPTS = re.compile(
    r"consistency|\bsift\b|spectr(?:um|a\b|al(?![_ ]norm))|teacher|distill|\blora\b|sharpness|\bema\b",
    re.IGNORECASE,
)
"""What methods are about, in words that no file outside constructs and kernels needs."""
NAME_AN_OPERATOR = {
    "compiler/plan/site_tables.py",
    "compiler/passes/fuse_head.py",
    "compiler/structure/matrices.py",
}
"""Files that write one of these words because an operator of `kernels` has it in its name."""
SHOW_SPECTRA = {
    "runtime/report/spectra.py",
    "trainc/cli/app.py",
    "trainc/cli/spectrum.py",
    "trainc/cli/weights.py",
}
"""The files of `trainc spectrum`, which measures weights of which no spec tells."""
READ_A_LIBRARY = {"compiler/bind/linear_outputs.py", "compiler/structure/computed_weights.py"}
"""The files that know the names by which peft holds the factors of its adapters, and torch what computes weights."""


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
    return {
        name
        for name, kind in NAMES.items()
        if (name in texts and name not in ORDINARY) or (kind, name) in pairs
    }


def imported(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in imports(node)}


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
    assert found == OTHER_MEANINGS


def test_no_construct_writes_the_name_of_another() -> None:
    allowed = {
        "regularize/outputs/pace.py": {"mse"},
        "regularize/outputs/_distances.py": {"mse"},
        "regularize/outputs/consistency.py": {"mse"},
        "optimizer/torch.py": {"torch"},
        "adapt/_peft.py": {"orthogonal"},
        "adapt/dora.py": {"magnitude"},
        "distribute/_outer.py": {"sgd"},
        "distribute/_average.py": {"distance"},
        "distribute/_effects.py": {"distance"},
        "distribute/_pictures.py": {"distance"},
        "distribute/local.py": {"distance"},
    }
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


def test_rooms_of_a_construct_are_imported_by_nobody_else() -> None:
    found = {
        file: {n for n in imported(file) if n.startswith(f"trainc.{room[:-1].replace('/', '.')}")}
        for room, own in PRIVATE_ROOMS.items()
        for file in FILES
        if not file.startswith((room, own))
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_words_of_a_construct_are_written_by_nobody_else() -> None:
    own = (*PRIVATE_ROOMS, *PRIVATE_ROOMS.values())
    found = {
        file: words
        for file in OUTSIDE
        if not file.startswith(own)
        if (words := PRIVATE_WORDS.findall((ROOT / file).read_text(encoding="utf-8")))
    }
    assert found.keys() == MAY_WRITE_THEM


def test_what_methods_are_about_is_written_by_nobody_else() -> None:
    own = (*PRIVATE_ROOMS, "kernels/", "trainc/functional")
    found = {
        file
        for file in OUTSIDE
        if not file.startswith(own)
        if CONCEPTS.search((ROOT / file).read_text(encoding="utf-8"))
    }
    assert found == NAME_AN_OPERATOR | SHOW_SPECTRA | READ_A_LIBRARY
