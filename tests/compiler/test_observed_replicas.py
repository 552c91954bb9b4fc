"""Observers beside replicas: what they find is the same on every process, or they are refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError

HERE = "tests.compiler.test_observed_replicas"
SGD = "optimizer sgd { lr = 0.1, momentum = 0.9 } run { length = 20 steps } "
FREQUENCY = (
    f'loss mse {SGD} observe frequency every 1 steps {{ probe = "{HERE}:probe", threshold = 0.9 }}'
)
LOW_RANK = " adapt lora on type(Linear) { rank = 2, alpha = 4 }"
OF_WEIGHTS = ("observe norm_growth every 1 steps", "observe distance every 1 steps")
LATE = {
    "observe saturation every 1 steps": "loss mse",
    "observe homogeneity every 1 steps": "loss mse",
    f'observe frequency every 1 steps {{ probe = "{HERE}:probe" }}': "loss mse",
    'observe margin { of = training, layer = "3" }': "loss cross_entropy",
}
"""Observers that need whole weights, and the losses beside them."""


def probe() -> tuple[Tensor, Tensor]:
    x = torch.arange(40, dtype=torch.float64)[:, None] / 20 - 1
    return x, torch.sin(3 * torch.pi * x) + 0.3 * torch.cos(7 * torch.pi * x)


def net(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), norm(6), nn.ReLU(), nn.Linear(6, 1)).double()


def data(step: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    x = torch.rand(4 + 2 * rank, 1, generator=draw, dtype=torch.float64) * 2 - 1 + rank
    return x, torch.sin(3 * torch.pi * x)


def shard(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0])
    fully_shard(model)


def observed(program: Any, batches: Any, name: str) -> list[dict[str, float]]:
    every = [program.step(batch) for batch in batches]
    return [{key: value for key, value in one.items() if name in key} for one in every]


def process(rank: int) -> Any:
    batches = [data(step, rank) for step in range(4)]
    program = trainc.compile(FREQUENCY, net())
    program.forward = DistributedDataParallel(program.module)
    found: dict[str, Any] = {"frequency": observed(program, batches, "frequency")}
    found["statistics"] = program.module[1].running_mean.clone()  # type: ignore[index]
    for clause in LATE:
        model = net()
        late = trainc.compile(f"{LATE[clause]} {SGD} {clause}", model)
        shard(model)
        x, y = batches[0]
        try:
            late.step((x, y if LATE[clause] == "loss mse" else y[:, 0].long()))
        except (ValueError, SiteError) as error:
            found[clause] = str(error)
    for clause in OF_WEIGHTS:
        model = net(nn.LayerNorm)
        spec = f"loss mse {SGD} {clause}" + LOW_RANK
        sharded = trainc.compile(spec, model)
        shard(model)
        found[clause] = observed(sharded, batches, clause.split()[1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(__file__, 2, Path(tmp_path_factory.mktemp("observed")))


def test_a_probe_is_read_with_the_running_statistics_of_the_first_process(
    found: list[dict[str, Any]],
) -> None:
    """Each process has statistics of its own, and rules that read the figures must decide alike."""
    first, second = found
    assert not torch.equal(first["statistics"], second["statistics"])
    assert first["frequency"] == second["frequency"]
    assert all("frequency.low" in one for one in first["frequency"])


@pytest.mark.parametrize("clause", LATE)
def test_what_needs_whole_weights_of_a_model_that_was_sharded_later_is_refused_by_name(
    clause: str, found: list[dict[str, Any]]
) -> None:
    for one in found:
        assert re.search(r"`\d\.weight` is sharded over processes \(FSDP2\)", one[clause])
        assert re.search(r"[Rr]emove (the clause|`layer`)", one[clause])


@pytest.mark.parametrize("clause", OF_WEIGHTS)
def test_shards_with_adapters_are_measured_as_whole_weights_are(
    clause: str, found: list[dict[str, Any]]
) -> None:
    whole = trainc.compile(f"loss mse {SGD} {clause}" + LOW_RANK, net(nn.LayerNorm))
    both = [[data(step, rank) for rank in range(2)] for step in range(4)]
    batches = [tuple(torch.cat(pair) for pair in zip(*pairs, strict=True)) for pairs in both]
    wanted = observed(whole, batches, clause.split()[1])
    for one in found:
        for got, want in zip(one[clause], wanted, strict=True):
            assert got == pytest.approx(want, rel=1e-9, nan_ok=True)


if __name__ == "__main__":
    run_rank(process)
