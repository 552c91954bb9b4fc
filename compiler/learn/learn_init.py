"""Learn where to start: by steps towards where tasks lead, or as the best of several random starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainc.compiler.learn.tasks import Tasks, Weights, moved

Keep = Callable[[Weights, int], None]
"""Called with the start so far and the number of tasks that it is of."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A task is done: its number, of how many, and its losses before and after its steps."""

    done: int
    of: int
    before: float
    after: float


def learn_start(
    spec: str | Path,
    *,
    tasks: int,
    inner: int,
    rate: float,
    overrides: dict[str, str] | None = None,
    begin: tuple[Weights, int] | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
    stopped: Callable[[], bool] = lambda: False,
    keep: Keep = lambda weights, done: None,
) -> tuple[Weights, int]:
    """Return the start that Reptile learns, and of how many tasks: theta <- theta + e (phi - theta), task by task.

    phi is where `inner` steps on the task lead from theta, by the spec's own optimizer, losses and regularizers; the
    fraction e goes from `rate` linearly to 0. Task i is the spec's data with `task = i`. `begin` is what an interrupted
    run returned: going on from it gives the same numbers. Raises SpecError for a spec that has no tasks. (Nichol,
    Achiam and Schulman, On First-Order Meta-Learning Algorithms, 2018, arXiv:1803.02999.)
    """
    learned = Tasks(spec, overrides)
    start, done = (learned.start(), 0) if begin is None else begin
    while done < tasks and not stopped():
        end, before, after = learned.train(done, start, inner)
        _require_finite(end, done)
        start = moved(start, end, rate * (1 - done / tasks))
        done += 1
        told(Progress(done, tasks, before, after))
        keep(start, done)
    return start, done


def choose_start(
    spec: str | Path,
    *,
    starts: int,
    tasks: int,
    inner: int,
    overrides: dict[str, str] | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Weights, list[float]]:
    """Return the random start with the least mean loss after short runs on each task, and the means of all.

    It is the loss on the task's held-out samples, or on those that train where there are no others. A mean that is not
    finite is never the least; ValueError where none is finite, and where all starts are the same.
    """
    found: list[Weights] = []
    means: list[float] = []
    for number in range(starts):
        learned = Tasks(spec, overrides, number)
        start, values = learned.start(), []
        if found and all(torch.equal(value, found[0][name]) for name, value in start.items()):
            raise ValueError(
                "random starts are compared, and the model has the same weights for every seed: let it draw them, and"
                " remove `init` of `model` or `start` of `run`"
            )
        for task in range(tasks):
            if stopped():
                break
            _, before, after = learned.train(task, start, inner)
            values.append(learned.value(task))
            told(Progress(number * tasks + task + 1, starts * tasks, before, after))
        if len(values) < tasks:
            break
        means.append(sum(values) / len(values))
        found.append(start)
    if not found:
        raise ValueError("no start was tried to its end: there is nothing to choose from")
    return found[least(means)], means


def least(values: Sequence[float]) -> int:
    """Return the place of the least finite value; raises ValueError where none is finite."""
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        raise ValueError(
            f"after the steps on the tasks no loss of {len(values)} starts is finite: use a lower learning rate, or"
            " fewer steps"
        )
    return min(finite, key=values.__getitem__)


def _require_finite(weights: Weights, task: int) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"`{name}` is not finite after the steps of task {task}: use a lower learning rate, or fewer steps"
            )
