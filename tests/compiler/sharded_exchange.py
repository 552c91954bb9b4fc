"""Processes that exchange as replicas sharded over two of them each: every case runs once, in a world of 4 or 8."""

import copy
import faulthandler
import functools
import math
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import trainc
from tests.compiler.exchange_cases import (
    EVERY_3,
    LEADERS,
    ONE_LEADER,
    OUTER,
    SGD,
    data,
)
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError
from trainc.compiler.program.program import Program
from trainc.dsl.text.errors import SpecError
from trainc.runtime.processes.sharded import full, local, whole

LIMIT = 240
"""Seconds after which a process that waits for the others says where, and ends."""
AVERAGED = SGD + EVERY_3
# Before a batch norm a bias has no gradient but rounding, which a small `eps` would not leave small.
STATE_TOO = (
    "loss mse optimizer adamw { lr = 0.01, weight_decay = 0.1, eps = 0.01 } "
    + EVERY_3
    + " { optimizer_state = average }"
)
NOISE = " regularize pace on type(Linear) { sigma = 0.5, weight = 1 }"
CLASSES = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps } " + EVERY_3
OTHERS = " perturb sam { rho = 0.05 } lr trust_ratio on ndim(2) observe norm_growth on ndim(2) every 1 steps"


def net(seed: int = 0) -> nn.Sequential:
    """Return layers of which no part divides by 2: the slope of PReLU is on the first of two processes alone."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.PReLU(), nn.LayerNorm(5), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


@functools.cache
def mesh() -> Any:
    """Return the rows of two processes each."""
    names = ("replicate", "shard")
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=names)


def sharded(seed: int = 0, of: Any = None) -> nn.Module:
    model, rows = net(seed), mesh()["shard"] if of is None else of
    fully_shard(model[0], mesh=rows)
    fully_shard(model, mesh=rows)
    return model


def state(program: Program) -> dict[str, Tensor]:
    return {name: full(t).detach().clone() for name, t in program.module.state_dict().items()}


Make = Callable[[], nn.Module]


def run(program: Program, steps: range, rank: int, rows: int = 5) -> Any:
    """Return weights and buffers after every step, the metrics of the steps, notes and the summary."""
    metrics, weights = [], []
    notes: list[str] = []
    for step in steps:
        metrics.append(program.step(data(rank, step, rows)))
        notes += program.report().notes
        weights.append(state(program))
    return {
        "weights": weights, "metrics": metrics, "notes": notes, "summary": program.summary()
    }  # fmt: skip


def trains(spec: str, make: Make = sharded) -> Callable[[int], Any]:
    return lambda rank: run(trainc.compile(spec, make()), range(7), rank)


def resumes(spec: str) -> Callable[[int], Any]:
    """Save after step 4, between two turns, and go on in a program that is sharded after it was compiled."""

    def on(rank: int) -> Any:
        straight = trainc.compile(spec, sharded())
        run(straight, range(4), rank)
        saved = copy.deepcopy(straight.state_dict())
        model = net(seed=9)
        later = trainc.compile(spec, model)
        fully_shard(model, mesh=mesh()["shard"])
        later.load_state_dict(saved)
        found = [run(program, range(4, 8), rank) for program in (straight, later)]
        states = [whole(program.state_dict()["actions"]) for program in (straight, later)]
        same = [found[0]["metrics"] == found[1]["metrics"], equal(*states)]
        pairs = zip(*(one["weights"] for one in found), strict=True)
        return [*same, all(equal(*pair) for pair in pairs), _parts(straight)]

    return on


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _parts(program: Program) -> bool:
    """Say whether what the clause keeps is of the shapes of shards, and counted as it is here."""
    action = next(one for one in program._machine.actions if one.name == "local")
    kept: dict[str, Any] = action.state_dict()
    shards = {name: local(p).shape for name, p in program.module.named_parameters()}
    of = {key: local(one) for key, one in kept.items() if "/" in key}
    right = all(one.shape == shards[key.partition("/")[2]] for key, one in of.items())
    return right and action.memory() == sum(one.nbytes for one in of.values())


def compiled_first(rank: int) -> Any:
    model = net()
    program = trainc.compile(OUTER, model)
    fully_shard(model, mesh=mesh()["shard"])
    return run(program, range(7), rank)


def skips(rank: int) -> Any:
    """Replica 1 skips the step of the turn, and takes part in the turn."""
    spec = SGD + "run { length = 9 steps, on_nan = skip } " + EVERY_3
    program = trainc.compile(spec, sharded())
    weights, skipped = [], []
    for step in range(4):
        x, y = data(rank, step)
        metrics = program.step((x, y * math.nan if (rank, step) == (3, 2) else y))
        skipped.append("skipped" in metrics)
        weights.append(state(program))
    return {"weights": weights, "skipped": skipped}


def noise(rank: int) -> Any:
    """The same batches in each replica: only the noise can tell them apart."""
    model = net()
    model[1] = nn.Identity()
    fully_shard(model, mesh=mesh()["shard"])
    return trainc.compile(AVERAGED + NOISE, model).step(data(rank % 2, 0))["consistency"]


def observed(rank: int) -> Any:
    program = trainc.compile(CLASSES + " observe calibration { of = training }", sharded())
    x, y = data(rank, 0)
    metrics = program.step((x, y.argmax(1)))
    return {name: value for name, value in metrics.items() if "calibration" in name}


def saved(rank: int) -> Any:
    """Each replica saves a folder of its own, which a plain model loads."""
    program = trainc.compile(AVERAGED, sharded())
    for step in range(4):
        program.step(data(rank, step))
    with tempfile.TemporaryDirectory() as own:
        folders: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(folders, own)
        if rank >= 2:  # the replicas need not save together
            folder = program.save(Path(folders[2]) / "saved")
            found = trainc.load(folder, net(seed=9)).module.state_dict()
        dist.barrier()
    if rank < 2:
        return True
    return all(equal(found[name], full(p)) for name, p in program.module.named_parameters())


def one_replica(rank: int) -> Any:
    """Shard over all processes: nothing is exchanged."""
    every = init_device_mesh("cpu", (dist.get_world_size(),))
    with_it, without = (
        run(trainc.compile(spec, sharded(of=every)), range(4), rank)
        for spec in (OUTER, SGD)
    )  # fmt: skip
    same = equal(dict(enumerate(with_it["weights"])), dict(enumerate(without["weights"])))
    return same, with_it["notes"], with_it["summary"], with_it["metrics"][2]["local.bytes"]


def one_process_each(rank: int) -> Any:
    """Replicas of one process, whose parameters are DTensors all the same."""
    names = ("replicate", "shard")
    rows = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names)
    return run(trainc.compile(OUTER, sharded(of=rows["shard"])), range(7), rank)


# what is refused


def replicated(rank: int) -> Any:
    trains(AVERAGED, lambda: sharded(of=mesh()))(rank)


def uneven(rank: int) -> Any:
    part = DeviceMesh("cpu", [0, 1, 2])
    model = net() if rank == 3 else sharded(of=part)
    trainc.compile(AVERAGED, model).step(data(rank, 0))


def crossed(rank: int) -> Any:
    rows = DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("replicate", "shard"))
    trainc.compile(AVERAGED, sharded(of=rows["shard"])).step(data(rank, 0))


def two_divisions(rank: int) -> Any:
    """One layer is sharded over the columns of the mesh, the rest over its rows."""
    model = net()
    fully_shard(model[0], mesh=mesh()["replicate"])
    fully_shard(model, mesh=mesh()["shard"])
    trainc.compile(AVERAGED, model).step(data(rank, 0))


def other_weights(rank: int) -> Any:
    trainc.compile(AVERAGED, sharded(seed=rank // 2)).step(data(rank, 0))


def other_step(rank: int) -> Any:
    """Replica 1 goes back to its start between two turns."""
    program = trainc.compile(AVERAGED, sharded())
    start = copy.deepcopy(program.state_dict())
    for step in range(6):
        if rank // 2 == 1 and step == 3:
            program.load_state_dict(start)
        program.step(data(rank, step))


def masked(rank: int) -> Any:
    trainc.compile(AVERAGED + " mask sift on ndim(2) { density = 50% }", sharded())


def on_machines(rank: int) -> Any:
    """Replica 3 has a process on each of two machines, the others are on the first."""
    kept = socket.gethostname
    try:
        socket.gethostname = lambda: "last" if rank == 7 else "first"
        return trains(LEADERS.replace("groups = 2", "groups = node"))(rank)
    finally:
        socket.gethostname = kept


CASES: dict[str, Callable[[int], Any]] = {
    "averaged": trains(AVERAGED),
    "state too": trains(STATE_TOO),
    "outer": trains(OUTER),
    "one leader": trains(ONE_LEADER),
    "with others": trains(AVERAGED + OTHERS),
    "compiled first": compiled_first,
    "resumes": resumes(STATE_TOO),
    "outer resumes": resumes(OUTER),
    "leader resumes": resumes(ONE_LEADER),
    "skips": skips,
    "noise": noise,
    "observed": observed,
    "saved": saved,
    "one replica": one_replica,
    "one process each": one_process_each,
    "replicated": replicated,
    "uneven": uneven,
    "crossed": crossed,
    "two divisions": two_divisions,
    "other weights": other_weights,
    "other step": other_step,
    "groups of three": trains(LEADERS.replace("groups = 2", "groups = 3")),
    "masked": masked,
    "leaders": trains(LEADERS),
    "leaders resume": resumes(LEADERS),
    "on machines": on_machines,
}
OF_EIGHT = ("leaders", "leaders resume", "on machines")


def cases(size: int) -> Iterator[str]:
    return (name for name in CASES if (name in OF_EIGHT) == (size == 8))


def process(rank: int) -> Any:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    found = {}
    for name in cases(dist.get_world_size()):
        try:
            found[name] = CASES[name](rank)
        except (ValueError, SiteError, SpecError) as error:
            at = f" (at {getattr(error, 'clause', None)})"
            found[name] = f"{type(error).__name__}: {error}{at}"
    return found


@functools.cache
def found(size: int) -> list[dict[str, Any]]:
    """Return what each of `size` processes found, by case; they run once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return run_processes(__file__, size, Path(folder), timeout=LIMIT + 60, weights_only=False)


def of(name: str, size: int = 4) -> list[Any]:
    """Return the results of one case, by rank."""
    return [one[name] for one in found(size)]


if __name__ == "__main__":
    run_rank(process)
