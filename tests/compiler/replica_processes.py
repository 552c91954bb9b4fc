"""The processes of `test_noise_scale_replicas.py`: four run every case once, in pairs or all together."""

import contextlib
import faulthandler
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_rank
from trainc.compiler.errors import SiteError
from trainc.runtime.noise_scale.action import NoiseScaleAction

Batch = tuple[Tensor, Tensor]
PROCESSES = 4
LIMIT = 240
"""Seconds after which a process that waits for the others says where, and ends."""
SPEC = "loss cross_entropy optimizer {optimizer} {{ lr = {lr} }} run {{ length = 9 steps, seed = 4{run} }}\n"
NORMS = "noise_scale gns on type(LayerNorm) { smooth = 1 steps }"
ALL = "noise_scale gns on all { smooth = 1 steps }"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)  # five entries: shards of different lengths
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Net(nn.Module):
    """Tokens in, tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(rank: int, rows: int = 3, equal: bool = True, step: int = 0) -> Batch:
    """Return a replica's batch; without `equal` its counted targets differ from row to row and rank to rank."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randint(7, (rows, 4), generator=generator)
    y = torch.randint(7, (rows, 4), generator=generator)
    if not equal:
        y[torch.rand(rows, 4, generator=generator) < 0.2 * (rank + 1)] = -100
        y[:, 0] = 1
    return x, y


def parts(given: Batch, sizes: Sequence[int]) -> list[Batch]:
    return list(zip(given[0].split(list(sizes)), given[1].split(list(sizes)), strict=True))


def unequal(rank: int, no_sync: bool) -> list[Batch]:
    """Return a replica's micro-batches: 3 or 4 rows, unequal token counts, and unequal in number where `no_sync`."""
    if rank % 2:
        return parts(batch(rank, 4, equal=False), (3, 1))
    return parts(batch(rank, 3, equal=False), (1, 1, 1) if no_sync else (1, 2))


# What one process of a pair, or of all four, does.


class World:
    """One process: its rank among `ranks`, and how it wraps a model."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.group = mesh.get_group() if mesh.ndim == 1 else None
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def shard(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)

    def program(
        self, wrapper: str, clause: str, *, dtype: torch.dtype = torch.float64, **spec: str
    ) -> Any:
        """Return a program on a fresh model under `ddp`, `fsdp`, or `fsdp late`: sharded after compiling."""
        model = net(dtype)
        if wrapper == "fsdp":
            self.shard(model)
        text = SPEC.format_map({"optimizer": "sgd", "lr": "0", "run": "", **spec}) + clause
        program = trainc.compile(text, model)
        if wrapper == "ddp":
            program.forward = DistributedDataParallel(model, process_group=self.group)
        if wrapper == "fsdp late":
            self.shard(model)
        return program


def signals(program: Any) -> dict[str, float]:
    return {name: float(value) for name, value in program.signals.items()}


def accumulates(wrapper: str, clause: str) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        program = world.program(wrapper, clause)
        metrics = program.step(unequal(world.rank, wrapper == "ddp"))
        return signals(program) | {"samples": metrics["batch"], "loss": metrics["loss"]}

    return run


def own_loop(wrapper: str, clause: str, no_sync: bool) -> Callable[[World], Any]:
    """The user's loop: accumulation in two, the loss scaled as a GradScaler does."""

    def run(world: World) -> Any:
        program = world.program(wrapper, clause)
        micros = unequal(world.rank, no_sync)
        counts = [int((y >= 0).sum()) for _, y in micros]
        rows = sum(len(y) for _, y in micros)
        for i, (micro, count) in enumerate(zip(micros, counts, strict=True)):
            unsynchronised = no_sync and i < len(micros) - 1
            with program.forward.no_sync() if unsynchronised else contextlib.nullcontext():
                loss = program.loss(
                    micro, loss_weight=count / sum(counts), example_fraction=len(micro[1]) / rows
                )
                (loss * 1024).backward()
        for p in program.module.parameters():
            p.grad.div_(1024)
        program.update()
        return signals(program)

    return run


def trains(
    wrapper: str, clause: str, optimizer: str = "sgd", lr: str = "0.1"
) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        program = world.program(wrapper, clause, optimizer=optimizer, lr=lr)
        found = []
        for step in range(3):
            program.step(batch(world.rank, 4, step=step))
            found.append(signals(program))
        state = program.module.state_dict()
        weights = {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in state.items()}
        return found, {n: w.detach().clone() for n, w in weights.items()}

    return run


def autocast(world: World) -> Any:
    program = world.program("ddp", NORMS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = program.loss(batch(world.rank))
    (loss * 1024).backward()
    for p in program.module.parameters():
        p.grad.div_(1024)
    program.update()
    return signals(program)


def calibrates(world: World) -> Any:
    clause = "noise_scale gns on type(LayerNorm) { calibrate = 5 steps, calibrate_examples = 2 }"
    program = world.program("ddp", clause)
    program.step(batch(world.rank, equal=False))
    (measure,) = [a for a in program._machine.actions if isinstance(a, NoiseScaleAction)]
    assert measure.calibration is not None
    return measure.calibration.whole_model.estimate, measure.calibration.measured.estimate


def a_loss_that_is_nan(wrapper: str) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        program = world.program(wrapper, NORMS, lr="0.1", run=", on_nan = skip")
        before = {n: _local(p).clone() for n, p in program.module.named_parameters()}
        if world.rank == 1:
            program.module.head.register_forward_hook(lambda m, i, out: out * math.nan)
        metrics = program.step(batch(world.rank))
        same = [torch.equal(_local(p), before[n]) for n, p in program.module.named_parameters()]
        return metrics["skipped"], all(same)

    return run


def a_gradient_that_is_infinite(wrapper: str) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        program = world.program(wrapper, NORMS, run=", on_nan = continue")
        loss = program.loss(batch(world.rank))
        (loss * math.inf if world.rank == 1 else loss).backward()
        program.update()
        return signals(program), program.summary()

    return run


def _local(p: Any) -> Tensor:
    return (p.to_local() if hasattr(p, "to_local") else p).detach()  # type: ignore[no-any-return]


def other_clause(world: World) -> Any:
    program = world.program("ddp", ALL if world.rank else NORMS)
    program.step(batch(world.rank))


JACKKNIFE = "noise_scale gns on type(LayerNorm) { interval = jackknife, smooth = 1 steps }"
ADAM = "noise_scale gns on type(LayerNorm) { geometry = adam, smooth = 1 steps }"
GHOST = "noise_scale gns on all { method = ghost, group = 2, smooth = 1 steps }"
MICRO = "noise_scale gns on all { method = micro_batch, smooth = 1 steps }"
REPLICA = "noise_scale gns on all { method = replica, smooth = 1 steps }"
CALIBRATE = "noise_scale gns on type(LayerNorm) { calibrate = 2 steps }"
RULE = NORMS + "\nwhen gns.noise > 0 { batch = 2 * batch }"
PAIRS: dict[str, Callable[[World], Any]] = {
    "ddp all": accumulates("ddp", ALL),
    "fsdp all": accumulates("fsdp", ALL),
    "fsdp late all": accumulates("fsdp late", ALL),
    "ddp micro": accumulates("ddp", MICRO),
    "ddp replica": accumulates("ddp", REPLICA),
    "ddp loop all": own_loop("ddp", ALL, no_sync=True),
    "ddp loop synchronised all": own_loop("ddp", ALL, no_sync=False),
    "fsdp loop all": own_loop("fsdp", ALL, no_sync=False),
    "ddp loop micro": own_loop("ddp", MICRO, no_sync=True),
    "ddp loop synchronised micro": own_loop("ddp", MICRO, no_sync=False),
    "ddp loop replica": own_loop("ddp", REPLICA, no_sync=True),
    "refused replica": own_loop("ddp", REPLICA, no_sync=False),
    "ddp trains": trains("ddp", RULE),
    "fsdp trains": trains("fsdp", RULE),
    "fsdp late trains": trains("fsdp late", RULE),
    "ddp jackknife": trains("ddp", JACKKNIFE),
    "fsdp jackknife": trains("fsdp", JACKKNIFE),
    "fsdp adam": trains("fsdp", ADAM, "adamw", "0.01"),
    "ddp ghost": trains("ddp", GHOST),
    "autocast": autocast,
    "calibrates": calibrates,
    "ddp nan": a_loss_that_is_nan("ddp"),
    "fsdp nan": a_loss_that_is_nan("fsdp"),
    "ddp infinite": a_gradient_that_is_infinite("ddp"),
    "fsdp infinite": a_gradient_that_is_infinite("fsdp"),
    "refused other": other_clause,
    "refused fsdp micro": accumulates("fsdp", MICRO),
    "refused fsdp replica": accumulates("fsdp", REPLICA),
    "refused fsdp calibrate": accumulates("fsdp", CALIBRATE),
}
FOURS: dict[str, Callable[[World], Any]] = {
    "ddp all": accumulates("ddp", ALL),
    "fsdp all": accumulates("fsdp", ALL),
    "ddp replica": accumulates("ddp", REPLICA),
}


def process(rank: int) -> Any:
    """Run every case; a pair shares them with the other pair."""
    from torch.distributed.device_mesh import init_device_mesh

    faulthandler.dump_traceback_later(LIMIT, exit=True)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "within"))
    pair, found = World(grid["within"]), {}
    for i, (name, case) in enumerate(PAIRS.items()):
        if i % 2 == rank // 2:
            found[name] = outcome(case, pair)
    flat, square = World(init_device_mesh("cpu", (PROCESSES,))), World(grid)
    for name, case in FOURS.items():
        found[f"four {name}"] = outcome(case, flat)
    found["four square all"] = outcome(FOURS["fsdp all"], square)
    return found


def outcome(case: Callable[[World], Any], world: World) -> Any:
    """Return the result of a case, or its error as text."""
    try:
        return case(world)
    except (ValueError, SiteError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    run_rank(process)
