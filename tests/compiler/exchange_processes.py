"""Processes that exchange: each runs every case once, in a world of two or of four."""

import contextlib
import copy
import faulthandler
import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.compiler.exchange_cases import (
    EVERY_3,
    LATE_OUTER,
    LEADERS,
    ONE_LEADER,
    OUTER,
    SGD,
    STATE_TOO,
    data,
    leader,
    net,
    on_machines,
    resumes,
    state,
    trains,
)
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError
from trainc.runtime.processes.replica_group import ReplicaGroup, ReplicaLost

LIMIT = 240
"""Seconds after which a process that waits for the others says where, and ends."""


# What a process does in each case; `rank` and `size` are of the world.


def accumulates(spec: str) -> Callable[[int, int], Any]:
    """A loop of one's own over two micro-batches, the losses scaled as a GradScaler does."""

    def run(rank: int, size: int) -> Any:
        program = trainc.compile(spec, net())
        weights = []
        for step in range(4):
            x, y = data(rank, step, 6)
            for rows in (slice(0, 4), slice(4, 6)):
                fraction = len(x[rows]) / len(x)
                program.loss((x[rows], y[rows]), loss_weight=fraction).backward()
            program.update()
            weights.append(state(program))
        return {"weights": weights}

    return run


def a_loss_that_is_nan(rank: int, size: int) -> Any:
    """Rank 1 skips the step of the turn, and takes part in the turn."""
    program = trainc.compile(SGD + "run { length = 9 steps, on_nan = skip } " + EVERY_3, net())
    weights, skipped = [], []
    for step in range(4):
        x, y = data(rank, step)
        metrics = program.step((x, y * math.nan if (rank, step) == (1, 2) else y))
        skipped.append("skipped" in metrics)
        weights.append(state(program))
    return {"weights": weights, "skipped": skipped}


def noise_of_two_views(rank: int, size: int) -> Any:
    """The same batch and weights on every replica: only the noise can tell them apart."""
    spec = SGD + EVERY_3 + " regularize pace on type(Linear) { sigma = 0.5, weight = 1 }"
    layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    for p in layers.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return trainc.compile(spec, layers).step(data(0, 0))["consistency"]


def measures(rank: int, size: int) -> Any:
    """The noise scale of a replica, beside that of a program that no other process knows."""
    clause = " noise_scale gns on type(LayerNorm) { smooth = 1 steps }"
    figures = []
    for text in (SGD + EVERY_3 + clause, SGD + clause):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
        program = trainc.compile(text, model)
        for step in range(2):
            program.step(data(rank, step))
        figures.append((program.signals["gns.signal"], program.signals["gns.noise"]))
    return figures


def wrapped(rank: int, size: int) -> Any:
    program = trainc.compile(SGD + EVERY_3, net())
    program.forward = DistributedDataParallel(program.module)
    program.step(data(rank, 0))


def compiled(rank: int, size: int) -> Any:
    program = trainc.compile(SGD + EVERY_3, net())
    program.forward = torch.compile(program.module, backend="eager")
    return program.step(data(rank, 0))["loss"]


def gradients_averaged(rank: int, size: int) -> Any:
    """Without an exchange `Step.replicas` are those of the wrapper."""
    program = trainc.compile(SGD, net())
    program.forward = DistributedDataParallel(program.module)
    program.step(data(rank, 0))
    replicas = program._runner.last.replicas  # type: ignore[union-attr]
    return replicas and replicas.size


def other_plan(rank: int, size: int) -> Any:
    every = 2 if rank else 3
    trainc.compile(SGD + f"distribute local every {every} steps", net()).step(data(rank, 0))


def other_weights(rank: int, size: int) -> Any:
    trainc.compile(SGD + EVERY_3, net(seed=rank)).step(data(rank, 0))


def other_step(rank: int, size: int) -> Any:
    """Rank 1 goes back to its start between two turns."""
    program = trainc.compile(SGD + EVERY_3, net())
    start = copy.deepcopy(program.state_dict())
    for step in range(6):
        if (rank, step) == (1, 3):
            program.load_state_dict(start)
        program.step(data(rank, step))


def other_checkpoint(rank: int, size: int) -> Any:
    program = trainc.compile(SGD + EVERY_3, net())
    saved = copy.deepcopy(program.state_dict())
    saved["clock"]["steps"] = 5 + rank
    program.load_state_dict(saved)
    program.step(data(rank, 0))


def other_batch(rank: int, size: int) -> Any:
    """A rule that reads an evaluation, which is of other data in each process."""
    text = f"""
    data "examples.data:stdlib" {{ batch = 4 samples, context = 8, limit_bytes = 30_000 }}
    loss mse optimizer sgd {{ lr = 0.1 }} {EVERY_3}
    when eval_loss > 0.5 {{ batch = 2 * batch }}
    """
    program = trainc.compile(text, net())
    for step in range(4):
        program.measured({"eval_loss": float(rank)})
        x, y = data(rank, step, 4)
        program.step([(x, y)])


def other_tensors(rank: int, size: int) -> Any:
    program = trainc.compile(SGD + EVERY_3, net())
    for step in range(3):
        program.module[4].bias.requires_grad_(rank == 0)  # type: ignore[index]
        program.step(data(rank, step))


def collectives(rank: int, size: int) -> Any:
    """Every method of a group on small numbers."""
    group = ReplicaGroup()
    found: dict[str, Any] = {}
    half = torch.tensor([1.0, 1.0 + 2**-7 * rank]).bfloat16()
    thirds = [torch.full((2, 3), float(rank)), torch.tensor(0.1).double() / 3, torch.empty(0)]
    group.mean_in_place([half, *thirds])
    found["mean"] = [half, *thirds]
    found["sent by means"] = group.sent
    rows = group.gather_rows([rank, 0.5])
    copied = [torch.full((2,), rank), torch.full((3, 2), float(rank)).t()]
    group.copy_from(1, copied)
    found |= {"rows": rows, "copied": copied, "total": group.total(rank + 1)}
    with contextlib.suppress(ValueError):
        found["wrong split"] = group.split(3)
    part = group.split(2)
    found["part"] = (part.rank, part.size, part.total(rank))
    found["sent"] = group.sent == part.sent
    return found


def alone_at_the_turn(rank: int, size: int) -> Any:
    """The last case: every other process ends before the turn."""
    program = trainc.compile(SGD + EVERY_3, net())
    for step in range(3 if rank == 0 else 2):
        program.step(data(rank, step))


AVERAGED = SGD + EVERY_3
OWN_BUFFERS = AVERAGED + " { buffers = local }"
HEAD_ONLY = SGD + 'distribute local on "4.**" every 3 steps'
LATE = SGD + "distribute local from 2 steps until 6 steps every 2 steps"
WITH_OTHERS = " perturb sam { rho = 0.05 } lr trust_ratio on ndim(2) observe norm_growth on ndim(2) every 1 steps"
EVERY_STEP = "loss mse optimizer sgd { lr = 0.1 } distribute local { buffers = local }"
CASES: dict[str, Callable[[int, int], Any]] = {
    "averaged": trains(AVERAGED),
    "state too": trains(STATE_TOO),
    "own buffers": trains(OWN_BUFFERS),
    "head only": trains(HEAD_ONLY),
    "late": trains(LATE),
    "every step": trains(EVERY_STEP),
    "with others": trains(AVERAGED + WITH_OTHERS),
    "accumulates": accumulates(AVERAGED),
    "resumes": resumes(STATE_TOO),
    "outer resumes": resumes(OUTER),
    "leader resumes": resumes(LEADERS),
    "nan": a_loss_that_is_nan,
    "noise": noise_of_two_views,
    "measures": measures,
    "compiled": compiled,
    "gradients averaged": gradients_averaged,
    "outer": trains(OUTER),
    "late outer": trains(LATE_OUTER),
    "leaders": trains(LEADERS),
    "one group": trains(LEADERS),
    "one leader": trains(ONE_LEADER),
    "on machines": on_machines,
    "groups of three": trains(LEADERS.replace("groups = 2", "groups = 3")),
    "collectives": collectives,
    "refused wrapper": wrapped,
    "other plan": other_plan,
    "other weights": other_weights,
    "other step": other_step,
    "other checkpoint": other_checkpoint,
    "other batch": other_batch,
    "other tensors": other_tensors,
    "leader": leader,
    "lost": alone_at_the_turn,
}
ONLY_TWO = ("state too", "own buffers", "head only", "late", "with others", "accumulates", "nan", "noise", "measures",
            "compiled", "lost", "one group", "late outer")  # fmt: skip
ONLY_FOUR = ("leader", "leaders", "on machines", "one leader")


def cases(size: int) -> Iterator[str]:
    skipped = ONLY_FOUR if size == 2 else ONLY_TWO
    yield from (name for name in CASES if name not in skipped)


def process(rank: int) -> Any:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    found, size = {}, dist.get_world_size()
    for name in cases(size):
        try:
            found[name] = CASES[name](rank, size)
        except (ValueError, SiteError, ReplicaLost) as error:
            field = getattr(error, "field", "")
            found[name] = f"{type(error).__name__}: {error}" + f" ({field})" * bool(field)
    return found


@functools.cache
def found(size: int) -> list[dict[str, Any]]:
    """Return what each of `size` processes found, by case; they run once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return run_processes(__file__, size, Path(folder), timeout=LIMIT + 60, weights_only=False)


def of(name: str, size: int) -> list[Any]:
    """Return the results of one case, by rank."""
    return [one[name] for one in found(size)]


if __name__ == "__main__":
    # Of two, the last case leaves rank 0 alone.
    run_rank(process, leaving={1} if sys.argv[2] == "2" else ())
