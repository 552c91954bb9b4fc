"""Replicas with different numbers of targets: a loss is the mean over those of all of them, in every kind of loop."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank

STEPS = 2
ROWS = (2, 3)
"""How many examples each rank has."""
REST = "optimizer sgd { lr = 0.5 } run { length = 9 steps, seed = 3 } "
ENTROPY = "loss cross_entropy " + REST
SPECS = {
    "cross_entropy": ENTROPY,
    "norms": ENTROPY + "noise_scale gns on all { smooth = 1 steps }",
    "pace": ENTROPY + 'regularize pace on "head" { sigma = 0.3, weight = 0.5 }',
    "penalty": ENTROPY + "regularize l2_sp on trainable { weight = 0.1 }",
    "sam": ENTROPY + "perturb sam { rho = 0.1 }",
    "mse": "loss mse " + REST,
    "sum": 'loss cross_entropy { output = "a", target = "a" } loss mse { output = "b", target = "b", weight = 0.3 } '
    + REST,
}


class Net(nn.Module):
    """Tokens in, tokens out; `both` gives two outputs."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 7)
        self.both = both

    def forward(self, ids: Tensor) -> Any:
        x = torch.tanh(self.norm(self.words(ids)))
        return {"a": self.head(x), "b": x.mean(1)} if self.both else self.head(x)


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(name == "sum").double()


def batch(name: str, rank: int, step: int, fewest: int = 0) -> Any:
    """Return a rank's batch: rank 0 has few targets, in step 1 the `fewest`; those of rank 1 differ by row."""
    g = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randint(7, (ROWS[rank], 8), generator=g)
    y = torch.randint(7, (ROWS[rank], 8), generator=g)
    if name == "mse":
        return x, torch.randn(ROWS[rank], 8, 7, generator=g, dtype=torch.float64)
    if rank == 0:
        y[:, fewest if step == 1 else 2 :] = -100
    y[-1, 6:] = -100
    if name == "sum":
        return x, {"a": y, "b": torch.randn(ROWS[rank], 5, generator=g, dtype=torch.float64)}
    return x, y


def joined(ones: Sequence[Any]) -> Any:
    if isinstance(ones[0], dict):
        return {key: joined([one[key] for one in ones]) for key in ones[0]}
    return torch.cat(list(ones))


def rows(value: Any, part: slice) -> Any:
    if isinstance(value, dict):
        return {key: one[part] for key, one in value.items()}
    return value[part]


def divided(given: Any) -> list[Any]:
    """Return a rank's batch as micro-batches of one example and the rest: two on rank 0, three on rank 1."""
    inputs, targets = given
    parts = [slice(i, i + 1) for i in range(len(inputs))]
    return [(inputs[part], rows(targets, part)) for part in parts]


# What a process does in a step.


def whole(program: Any, given: Any) -> Any:
    return program.step(given)


def in_parts(program: Any, given: Any) -> Any:
    return program.step(divided(given))


def by_loss(program: Any, given: Any) -> Any:
    program.loss(given).backward()
    return program.update()


def synchronised_last(program: Any, parts: Sequence[Any]) -> Any:
    """Yield micro-batches; all but the last stay with this process."""
    for i, one in enumerate(parts):
        alone = i < len(parts) - 1 and hasattr(program.forward, "no_sync")
        with program.forward.no_sync() if alone else contextlib.nullcontext():
            yield one


def by_losses(program: Any, given: Any) -> Any:
    parts = divided(given)
    counts = [program.loss_fn.count(y) for _, y in parts]
    if not sum(counts):
        return by_loss(program, given)
    for (x, y), count in zip(synchronised_last(program, parts), counts, strict=True):
        weight = count / sum(counts)
        program.loss((x, y), weight, len(x) / len(given[0])).backward()
    return program.update()


def own_loss(program: Any, given: Any) -> Any:
    """A loss of the user's own, with a mean over targets that only this code counts."""
    x, y = given
    counts = (y >= 0).sum(1)
    with program.micro_batch(len(x), weights=counts, tokens=y.numel()):
        loss = cross_entropy(program.forward(x).flatten(0, 1), y.flatten())
    program.backward(loss)
    return program.update()


def own_losses(program: Any, given: Any) -> Any:
    parts = divided(given)
    counts = [(y >= 0).sum(1) for _, y in parts]
    total = int(sum(counts))
    for (x, y), count in zip(synchronised_last(program, parts), counts, strict=True):
        with program.micro_batch(len(x), weights=count, loss_weight=int(count) / total):
            loss = cross_entropy(program.forward(x).flatten(0, 1), y.flatten())
        program.backward(loss)
    return program.update()


LOOPS: dict[str, Callable[[Any, Any], Any]] = {
    f.__name__: f for f in (whole, in_parts, by_loss, by_losses, own_loss, own_losses)
}
OWN = {"own_loss": 1, "own_losses": 2}
"""The loops whose own code counts targets, and how many columns of them rank 0 has at least."""
CASES = [
    ("ddp", name, loop)
    for name in SPECS
    for loop in LOOPS
    if not (name == "sam" and loop not in ("whole", "in_parts"))
    and not (name == "pace" and loop in OWN)
    and not (name in ("mse", "sum") and loop in ("by_losses", *OWN))
]
CASES += [("fsdp", "cross_entropy", loop) for loop in ("whole", "by_loss", "own_loss")]
CASES += [("fsdp", name, "in_parts") for name in SPECS if name != "sam"]


def trained(name: str, loop: str, wrapper: str | None, rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    from trainc.runtime.processes.sharded import full

    model = net(name)
    if wrapper == "fsdp":
        fully_shard(model.words)  # type: ignore[arg-type]
        fully_shard(model)
    program = trainc.compile(SPECS[name], model)
    if wrapper == "ddp":
        program.forward = DistributedDataParallel(model)
    metrics = []
    for step in range(STEPS):
        given = batch(name, rank, step, OWN.get(loop, 0))
        metrics.append(LOOPS[loop](program, given))
    weights = {n: full(one).detach().clone() for n, one in model.state_dict().items()}
    return {"metrics": metrics, "weights": weights, "batch": program.batch_size}


def process(rank: int) -> Any:
    faulthandler.dump_traceback_later(40, exit=True)
    return {case: trained(case[1], case[2], case[0], rank) for case in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_processes(__file__, 2, Path(tmp_path_factory.mktemp("means")))


@pytest.mark.parametrize(("wrapper", "name", "loop"), CASES)
def test_replicas_train_as_one_process(
    wrapper: str, name: str, loop: str, found: list[Any]
) -> None:
    model = net(name)
    program = trainc.compile(SPECS[name], model, executor="module")
    for step in range(STEPS):
        parts = [batch(name, rank, step, OWN.get(loop, 0)) for rank in range(2)]
        expected = program.step((joined([x for x, _ in parts]), joined([y for _, y in parts])))
        for one in found:
            metrics = one[wrapper, name, loop]["metrics"][step]
            assert metrics.keys() == expected.keys()
            assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)
    for one in found:
        assert one[wrapper, name, loop]["batch"] == sum(ROWS)
        for weight, value in model.state_dict().items():
            given = one[wrapper, name, loop]["weights"][weight]
            torch.testing.assert_close(given, value, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    run_rank(process)
