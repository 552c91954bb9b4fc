"""Operators on a torch without the private names that make their calls quick: same results by torch.library."""

import ast
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import Tensor

import trainc.kernels.operators  # noqa: F401
from tests.kernels.cases import CASES
from trainc.kernels.library import private_dispatch, public_dispatch, register


def everything() -> dict[str, list[Any]]:
    """Results of every operator on the same arguments, gradients and what it wrote to them."""
    found = {}
    for case in CASES:
        arguments = case.arguments()
        if case.reference is None:
            with torch.no_grad():
                results = case.op(*arguments)
        else:
            results = case.op(*arguments)
        results = list(results) if isinstance(results, tuple) else [results]
        wanted = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        if wanted:
            results += torch.autograd.grad([r.sum() for r in wanted], leaves, allow_unused=True)
        found[case.name] = [*results, *flat(arguments)]
    return found


def flat(arguments: Any) -> list[Any]:
    """Arguments, and what lists among them hold."""
    return [one for a in arguments for one in (a if isinstance(a, list) else [a])]


WITHOUT = f"""
import sys
from pkgutil import resolve_name

import torch

removed = []
for name in {register.PRIVATE_NAMES}:
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    owner = resolve_name(owner)
    removed.append((owner, attribute, getattr(owner, attribute)))
for owner, attribute, _ in removed:
    delattr(owner, attribute)
from trainc.kernels.library import register
for owner, attribute, value in removed:  # torch itself needs them
    setattr(owner, attribute, value)
assert register._dispatch.__name__.endswith("public_dispatch")
assert "trainc.kernels.library.private_dispatch" not in sys.modules

from tests.kernels.test_register import everything

torch.save(everything(), sys.argv[1])
"""


def test_results_are_the_same_without_the_private_names(tmp_path: Path) -> None:
    assert register._dispatch is private_dispatch
    path = tmp_path / "results.pt"
    subprocess.run([sys.executable, "-c", WITHOUT, path], check=True, cwd=Path(__file__).parents[2])
    got, want = torch.load(path, weights_only=False), everything()
    assert got.keys() == want.keys()
    for name, results in want.items():
        for mine, theirs in zip(got[name], results, strict=True):
            if isinstance(theirs, Tensor):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", register.PRIVATE_NAMES)
def test_a_missing_name_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    assert register.missing_names() == []
    with monkeypatch.context() as patch:
        patch.delattr(resolve_name(owner), attribute)
        missing = register.missing_names()
    assert name in missing
    assert all(one.startswith(name) for one in missing)


def private_names(module: Any) -> set[str]:
    """The private attributes and modules of others that a module's source names, without their owners."""
    tree, found = ast.parse(Path(module.__file__).read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(one.name for one in node.names)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_the_list_of_private_names_is_whole() -> None:
    listed = {part for name in register.PRIVATE_NAMES for part in name.replace(":", ".").split(".")}
    assert private_names(private_dispatch) - listed == set()
    assert private_names(public_dispatch) == set()
