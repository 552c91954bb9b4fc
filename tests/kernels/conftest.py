"""Fixtures shared by the tests of the kernels."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import CASES, SMOOTH, UPDATES

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Any:
    """Every operator, in every variant."""
    return request.param


@pytest.fixture(params=SMOOTH, ids=[case.name for case in SMOOTH])
def smooth(request: pytest.FixtureRequest) -> Any:
    """Every operator that has gradients."""
    return request.param


@pytest.fixture(params=UPDATES, ids=[case.name for case in UPDATES])
def update(request: pytest.FixtureRequest) -> Any:
    """Every operator that has none."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep to one core: the workers share the machine."""
    torch.set_num_threads(1)


@functools.cache
def _load(name: str) -> Any:
    return json.loads((REFERENCE / f"{name}.json").read_text())


@pytest.fixture
def stored() -> Callable[[str], Any]:
    """Read tests/reference/<name>.json."""
    return _load


def _generate(description: dict[str, Any]) -> Tensor:
    """The stored cases' inputs: the generator is described in the file's `meta`."""
    count = 1
    for extent in description["shape"]:
        count *= extent
    state, values = description["seed"] & 0x7FFFFFFF, []
    for _ in range(count + 8):
        state = (1103515245 * state + 12345) & 0x7FFFFFFF
        values.append(description["scale"] * (2 * (state >> 8) / 2**23 - 1))
    flat = torch.tensor(values[8:], dtype=torch.float64) + description.get("plus", 0.0)
    shaped: Tensor = flat.view(description["shape"])
    return shaped


@pytest.fixture
def lcg() -> Callable[[dict[str, Any]], Tensor]:
    """Make the input of a stored case from its description."""
    return _generate
