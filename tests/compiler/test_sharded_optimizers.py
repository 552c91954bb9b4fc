"""Optimizers on parameters that FSDP2 shards: what they keep is sharded with them, evaluated, and resumed."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.compiler.test_foreign_optimizers import OURS, batch, net, spec
from tests.processes import run_processes, run_rank

FIELDS = {
    f"{OURS}Averaged": "lr = 0.1, weight_decay = 0.1 on ndim(2)",
    f"{OURS}Swapping": "lr = 0.1",
    "Adam": "lr = 0.01, amsgrad = true",
}
HISTORY = "regularize pace on type(Linear) { sigma = 0.4, weight = 0.5, mode = history }"
MIXUP = "regularize mixup { alpha = 0.7 }"
"""Each process mixes its own examples, so that shards are compared with replicas."""


def whole(state: Any) -> dict[str, Any]:
    from trainc.runtime.processes.sharded import full

    return {name: full(tensor).detach().clone() for name, tensor in state.items()}


def trained(name: str, model: nn.Module, steps: range, state: Any = None) -> tuple[Any, Any, Any]:
    """Return weights, evaluated weights and the state after these steps, with an evaluation after each."""
    program = trainc.compile(spec(name, FIELDS[name]), model)
    if state is not None:
        program.load_state_dict(state)
    for step in steps:
        program.step(batch(step))
        program.evaluate(*batch(50))
    with program.evaluation_weights():
        evaluated = whole(model.state_dict())
    return whole(model.state_dict()), evaluated, copy.deepcopy(program.state_dict())


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    return model


def process(rank: int) -> Any:
    found: dict[str, Any] = {}
    for name in FIELDS:
        straight = trained(name, sharded(), range(5))
        state = trained(name, sharded(), range(3))[2]
        resumed = trained(name, sharded(), range(3, 5), state)
        found[name] = straight[:2], resumed[:2]
    found["changed"] = changed(sharded())
    rows = slice(3 * rank, 3 * rank + 3)
    found["apart"] = {
        (clause, by): apart(clause, by, rows)
        for clause in (HISTORY, MIXUP)
        for by in ("shards", "replicas")
    }
    return found


def changed(model: nn.Module) -> dict[str, Any]:
    """Return weights after steps in which layers compute with changed ones."""
    clauses = "regularize drop_connect on ndim(2) { p = 0.3 } perturb noise on all { sigma = 0.1, scale = row_norm }"
    program = trainc.compile(
        "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps } " + clauses, model
    )
    for step in range(3):
        program.step(batch(step))
    return whole(model.state_dict())


def apart(clause: str, by: str, rows: slice) -> dict[str, Any]:
    """Return weights after steps of which each process has some examples."""
    model = sharded() if by == "shards" else net()
    text = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps } " + clause
    program = trainc.compile(text, model)
    if by == "replicas":
        program.forward = DistributedDataParallel(model)
    for step in range(4):
        x, y = batch(step)
        ids = torch.arange(len(y)).roll(step)[rows] if program.reads_sample_ids else None
        program.step((x[rows], y[rows]), sample_ids=ids)
    return whole(model.state_dict())


def test_sharded_training_is_that_of_whole_parameters(tmp_path: Path) -> None:
    one, two = run_processes(__file__, 2, tmp_path)
    for parameter, weight in changed(net()).items():
        for found in (one, two):
            torch.testing.assert_close(found["changed"][parameter], weight, msg=parameter)
    kept = apart(HISTORY, "one process", slice(0, 6))
    for found in (one, two):
        by_shards, by_replicas = (found["apart"][MIXUP, by] for by in ("shards", "replicas"))
        for parameter, weight in kept.items():
            for by in ("shards", "replicas"):
                torch.testing.assert_close(found["apart"][HISTORY, by][parameter], weight)
            torch.testing.assert_close(by_shards[parameter], by_replicas[parameter])
    for name in FIELDS:
        wanted = trained(name, net(), range(5))[:2]
        straight, resumed = one[name]
        for kind in (0, 1):
            for parameter, weight in wanted[kind].items():
                torch.testing.assert_close(
                    straight[kind][parameter], weight, msg=f"{name} {parameter}"
                )
                assert torch.equal(straight[kind][parameter], resumed[kind][parameter]), name
                assert torch.equal(straight[kind][parameter], two[name][0][kind][parameter]), name


if __name__ == "__main__":
    run_rank(process)
