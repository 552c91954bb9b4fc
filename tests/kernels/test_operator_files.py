"""Operators are found on disk: what importing them all finds, and what importing one alone costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainc import functional
from trainc.kernels import operators

KERNELS = Path(__file__).parents[2] / "kernels"

DROPPED = '''
import torch
from torch import Tensor

from trainc.kernels.library.register import register

__all__ = ["twice"]


def twice(x: Tensor) -> Tensor:
    """Double x."""
    return torch.ops.trainc.twice(x)


def eager(x: Tensor) -> Tensor:
    return x + x


register("twice", cpu=eager, cuda=eager, fake=lambda x: x.new_empty(x.shape))
'''

FIND = """
import sys

import torch

from trainc.kernels import norm

norm.__path__.append(sys.argv[1])
from trainc import functional

assert "twice" in functional.__all__
assert functional.twice(torch.ones(2)).tolist() == [2.0, 2.0]
"""

ALONE = """
import sys
from importlib import import_module

import_module(sys.argv[1])
print(*(name for name in sys.modules if name.startswith(("trainc.", "triton"))))
"""


def run(script: str, argument: str) -> str:
    """What a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, argument], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_an_operator_file_dropped_in_a_room_is_found(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(DROPPED)
    (tmp_path / "triton_twice.py").write_text("raise AssertionError('only a launch imports this')")
    run(FIND, str(tmp_path))


def test_every_public_function_is_of_the_file_that_names_it() -> None:
    found = {name: function.__module__ for name, function in operators.FUNCTIONS.items()}
    for name, module in found.items():
        assert getattr(functional, name).__module__ == module
        assert module.startswith("trainc.kernels.")
    named = [
        name
        for file in KERNELS.rglob("*.py")
        for name in getattr(sys.modules.get(f"trainc.{dotted(file)}"), "__all__", ())
    ]
    assert sorted(named) == sorted(found), "two files name one function"


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(KERNELS.parent).with_suffix("").parts)


@pytest.mark.parametrize("name", ["norm.layer_norm", "parameter.masked_update"])
def test_one_operator_imports_its_room_and_the_library_alone(name: str) -> None:
    loaded = run(ALONE, f"trainc.kernels.{name}").split()
    room = name.partition(".")[0]
    allowed = ("trainc.kernels.library", f"trainc.kernels.{room}")
    assert f"trainc.kernels.{name}" in loaded
    assert [one for one in loaded if not one.startswith((*allowed, "trainc.kernels"))] == []
    assert [one for one in loaded if one.count(".") > 2 and not one.startswith(allowed)] == []
