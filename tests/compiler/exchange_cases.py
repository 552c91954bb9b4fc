"""What processes do that exchange by any rule of `distribute local`: models, data, specs and runs."""

import copy
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.program.program import Program

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]
SGD = "loss mse optimizer sgd { lr = 0.1, momentum = 0.9 } "
ADAMW = "loss mse optimizer adamw { lr = 0.01, weight_decay = 0.1 } "
EVERY_3 = "distribute local every 3 steps"
STATE_TOO = ADAMW + EVERY_3 + " { optimizer_state = average }"
OUTER = SGD + EVERY_3 + " { rule = outer(sgd(lr = 0.7, momentum = 0.9, nesterov = true)) }"
LATE_OUTER = (
    "loss mse optimizer sgd { lr = 0.1 }"
    " distribute local from 1 steps every 2 steps { rule = outer(sgd(0.5, momentum = 0.9)) }"
)
LEADERS = SGD + (
    "distribute local every 2 steps { rule = leader, groups = 2, global_every = 2, pull = [0.2, 0.3],"
    " prox = [0.1, 0.4], score = mean(loss, 3 steps), buffers = local }"
)
ONE_LEADER = SGD + EVERY_3 + " { rule = leader, pull = 0.5, buffers = average }"


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def data(rank: int, step: int, rows: int = 5) -> Batch:
    g = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    return x + rank, torch.randn(rows, 3, generator=g, dtype=torch.float64)


def state(program: Program) -> Weights:
    return {name: t.detach().clone() for name, t in program.module.state_dict().items()}


def trains(spec: str, steps: int = 7, rows: int = 5) -> Callable[[int, int], Any]:
    """Return weights and buffers after every step, the metrics of the steps, and the summary."""

    def run(rank: int, size: int) -> Any:
        program = trainc.compile(spec, net())
        metrics, weights, series = [], [], []
        for step in range(steps):
            metrics.append(program.step(data(rank, step, rows)))
            weights.append(state(program))
            series.append(dict(program.report().series))
        return {
            "series": series,
            "weights": weights,
            "metrics": metrics,
            "signals": dict(program.signals),
            "summary": program.summary(),
        }

    return run


def resumes(spec: str) -> Callable[[int, int], Any]:
    """Save after step 4, between the turns after 3 and 6, and go on in a program on other weights."""

    def run(rank: int, size: int) -> Any:
        straight = trainc.compile(spec, net())
        for step in range(4):
            straight.step(data(rank, step))
        saved = copy.deepcopy(straight.state_dict())
        expected = [straight.step(data(rank, step)) for step in range(4, 8)]
        later = trainc.compile(spec, net(seed=9))
        later.load_state_dict(saved)
        found = [later.step(data(rank, step)) for step in range(4, 8)]
        same = all(torch.equal(a, b) for a, b in zip(*map(values, (straight, later)), strict=True))
        return found == expected, same, straight.summary()[1:] == later.summary()[1:], found[1]

    return run


def values(program: Program) -> list[Tensor]:
    return [*state(program).values()]


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.sin(1.7 * torch.arange(3, dtype=torch.float64) + 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def leader(rank: int, size: int) -> Any:
    """The quadratic of the reference: its gradient is a (w - c) + 0.1 sin(1.7 i + t + rank)."""
    fields = "rule = leader, groups = 2, global_every = 2, score = mean(loss, 1 steps)"
    clause = f"distribute local every 2 steps {{ {fields} }}"
    program = trainc.compile("loss mse optimizer sgd { lr = 0.05 } " + clause, Quadratic())
    a, i = torch.tensor([1, 0.5, 2.0]).double(), torch.arange(3).double()
    c = torch.tensor([1, -1, 0.5]).double() * (1 + 0.2 * rank)
    x = (1.5 * a).sqrt()
    for t in range(12):
        y = x * (c - 0.1 * torch.sin(1.7 * i + t + rank) / a)
        program.step((x[None], y[None]))
    return state(program)["w"], program.summary()


def on_machines(rank: int, size: int) -> Any:
    """The same leaders where the first three processes are on one machine, and the last alone on another."""
    kept = socket.gethostname
    try:
        socket.gethostname = lambda: "last" if rank == 3 else "first"
        return trains(LEADERS.replace("groups = 2", "groups = node"))(rank, size)
    finally:
        socket.gethostname = kept
