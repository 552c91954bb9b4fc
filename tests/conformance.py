"""What the conformance suite trains a construct on, and what it reads of a program's steps.

A construct whose example does not fit the small language model brings its own in its test module: `conformance()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.execution.execution import Executor
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.runtime.data.batch import Batch, map_tensors
from trainc.runtime.step.optimizer import OptimizerStep


def tiny_gpt() -> nn.Module:
    """Return a language model of two blocks."""
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24)


def tokens(seed: int) -> Batch:
    """Return six sequences; some of the targets do not count, another number in each sequence."""
    ids = torch.randint(0, 24, (6, 9), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    for row, ignored in enumerate((0, 3, 1, 0, 5, 2)):
        targets[row, :ignored] = -100
    return ids[:, :-1], targets


@dataclass(frozen=True)
class Setup:
    """A model, its batches by seed (six examples each), and what a spec needs besides the construct's own clause."""

    model: Callable[[], nn.Module] = tiny_gpt
    batch: Callable[[int], Batch] = tokens
    rest: str = (
        "loss cross_entropy optimizer adamw { lr = 1e-2, weight_decay = 0.1 }"
        " run { length = 400 steps, seed = 3 }"
    )
    usage: str | None = None
    """The clause, where the construct's example does not fit."""


def in_double(batch: Batch) -> Batch:
    """Return a batch with floating-point numbers in float64."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return map_tensors(convert, batch[0]), convert(batch[1])


def divided(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Return micro-batches of these numbers of examples."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [(map_tensors(itemgetter(part), batch[0]), batch[1][part]) for part in rows]


def run_step(program: Program, batch: Batch, sizes: Sequence[int] = ()) -> dict[str, float]:
    """Run a step, in micro-batches of these sizes if there are any; who reads sample ids is given 0, 1, 2, ..."""
    given: Any = {}
    ids = torch.arange(len(batch[1]))
    if program.reads_sample_ids:
        given = {"sample_ids": list(ids.split(list(sizes))) if sizes else ids}
    return program.step(divided(batch, sizes) if sizes else batch, **given)


@dataclass
class Trained:
    """A program, and of each of its steps the metrics and what the optimizers were given, by parameter."""

    program: Program
    metrics: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]


def train_double(
    spec: Spec,
    setup: Setup,
    steps: int = 4,
    sizes: Sequence[int] = (),
    executor: Executor = "auto",
) -> Trained:
    """Train in float64, in micro-batches of these sizes if there are any."""
    program = trainc.compile(spec, setup.model().double(), executor=executor)
    given: dict[str, Tensor] = {}
    for action in program.execution.method.actions:
        if isinstance(action, OptimizerStep):
            action.torch.register_step_pre_hook(_reader(action, given))
    found = Trained(program, [], [])
    for seed in range(steps):
        batch = in_double(setup.batch(seed))
        found.metrics.append(run_step(program, batch, sizes))
        found.gradients.append(dict(given))
        given.clear()
    return found


def _reader(action: OptimizerStep, given: dict[str, Tensor]) -> Callable[..., None]:
    """Return a hook that keeps the gradients an optimizer is given."""

    def read(*_: Any) -> None:
        for slot in action.slots:
            if slot.tensor.grad is not None:
                given[slot.name] = slot.tensor.grad.clone()

    return read


def assert_close_steps(one: Trained, two: Trained, metrics: bool = True) -> None:
    """Compare losses, other metrics, gradients and weights of two programs, step by step, to 1e-10."""
    for got, want in zip(one.metrics, two.metrics, strict=True):
        if metrics:
            assert got.keys() == want.keys()
        _close(
            {
                n: torch.tensor(v, dtype=torch.float64)
                for n, v in got.items()
                if metrics or n == "loss"
            },
            {n: torch.tensor(v, dtype=torch.float64) for n, v in want.items()},
        )
    for mine, theirs in zip(one.gradients, two.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        _close(mine, theirs)
    _close(*(dict(t.program.module.state_dict()) for t in (one, two)))


def _close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    for name, value in got.items():
        try:
            torch.testing.assert_close(value, want[name], rtol=1e-10, atol=1e-10, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"`{name}`: {error}") from None
