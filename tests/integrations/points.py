"""A small problem that each framework trains, and the plain loop of its spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc

ADAMW = "optimizer adamw { lr = 1e-3, weight_decay = 0 }"
GNS = "noise_scale gns on role(norm) { smooth = 1 steps }"
METHOD = """
run { length = 4 steps, clip = 0.5 }
optimizer sgd { lr = 0.5 * linear(to = 10%), weight_decay = 0.1 on matrices }
noise_scale gns on role(norm) { smooth = 1 steps }
regularize l2_sp on all { weight = 0.3 }
"""


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def points(number: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(5).double(), torch.randint(0, 3, ())) for _ in range(number)]


def batches(number: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the points in order, in batches of `size`, the last one smaller."""
    found = points(number)
    parts = [found[i : i + size] for i in range(0, number, size)]
    return [(torch.stack([x for x, _ in p]), torch.stack([y for _, y in p])) for p in parts]


def loader(data: Any, size: int | None) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=size)


def plain_loop(
    spec: str, steps: Sequence[Sequence[tuple[Tensor, Tensor]]]
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return the model and the metrics of `program.step` on the micro-batches of each step."""
    model = network()
    program = trainc.compile(f"loss cross_entropy {spec}", model, executor="module")
    return model, [program.step(list(parts)) for parts in steps]


def equal(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def near(one: nn.Module, other: nn.Module, rtol: float = 1e-9) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol)


def same_metrics(found: dict[str, Any], expected: dict[str, float], *without: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in without:
            assert found[name] == pytest.approx(value, rel=1e-7, abs=1e-9, nan_ok=True), name
