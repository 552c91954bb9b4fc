"""The gradients of processes that `distribute ddp` joins, and what it refuses."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.processes import run_processes, run_rank
from tests.torchrun import Net, points, spec
from trainc.compiler.constructs.distribute.ddp import Ddp
from trainc.compiler.constructs.distribute.local import Local
from trainc.compiler.driver.distribution import Distribution
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError
from trainc.runtime.processes.launch import Launch
from trainc.runtime.processes.replica_group import ReplicaGroup


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def gradients(model: Any, module: nn.Module, rank: int) -> dict[str, Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def process(rank: int) -> Any:
    alone, together = net(), net()
    clause = Ddp(find_unused=True, broadcast_buffers=False, bucket=1)
    wrapped = clause.wrap(together, torch.device("cpu"))
    found = gradients(alone, alone, rank), gradients(wrapped, together, rank)
    return *found, disagreement(rank)


def disagreement(rank: int) -> str:
    """Return what is said of replicas of which one has another weight, as an update with random numbers makes it."""
    text = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 5 steps }"
    program, group = trainc.compile(text, net()), ReplicaGroup()
    program.agree(group)
    with torch.no_grad():
        program.module.get_parameter("head.bias")[0] += rank
    with pytest.raises(ValueError, match="differ in their weights") as caught:
        program.agree(group)
    return str(caught.value)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with TemporaryDirectory() as folder:
        found = run_processes(__file__, 2, Path(folder))
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())
    assert "rank 1 has `head.bias`" in found[0][2]
    assert found[0][2] == found[1][2]
    return found[0][1], Ddp().reference([own for own, *_ in found])


def test_one_process_trains_as_without_the_clause(tmp_path: Path) -> None:
    found = []
    for clause in ("distribute ddp { timeout = 30 seconds }", ""):
        (tmp_path / "a.train").write_text(spec(clause))
        out = tmp_path / f"out{len(clause)}"
        train(tmp_path / "a.train", out, quiet=True)
        found.append((out / "metrics.jsonl").read_bytes())
        if not clause:  # the processes may change in the midst of a run
            longer = spec(clause).replace("length = 10", "length = 11")
            (tmp_path / "a.train").write_text(longer)
            resumed = train(
                tmp_path / "a.train", tmp_path / "out39", resume=True, accept=True, quiet=True
            )
            assert resumed.steps == 11
    assert found[0] == found[1]


def test_the_plan_lists_what_depends_on_the_number_of_processes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Dropout(0.0))
    text = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 5 steps }"
    assert "processes" not in trainc.plan(text, model).settings
    assert trainc.plan(f"{text} distribute ddp", model).settings["processes"] == {
        "1": "normalizes over the part of the batch that its process has",
        "2": "draws torch's random numbers, in each process others",
    }


@pytest.mark.parametrize(
    ("clauses", "message"),
    [
        ("distribute ddp { timeout = 3 steps }", "expected a time of 1 second or more"),
        ("distribute ddp distribute ddp as other", "says already how processes train together"),
        ("distribute ddp distribute local every 2 steps", "says already how processes train"),
        ("distribute ddp from 3 steps", "remove `from 3 steps`"),
    ],
)
def test_what_makes_no_sense_is_refused(clauses: str, message: str) -> None:
    text = f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} run {{ length = 5 steps }} {clauses}"
    with pytest.raises(SpecError, match=message):
        trainc.plan(text, Net())


def test_a_timeout_is_written_in_any_unit_of_time() -> None:
    found = [Ddp(timeout=one).patience for one in ("90 seconds", "1.5 minutes", "1 hour")]  # type: ignore[arg-type]
    assert found == [90, 90, 3600]


def test_a_construct_that_exchanges_and_does_not_say_how_the_data_is_divided_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (
        "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 5 steps }"
        " distribute local every 2 steps"
    )
    program = trainc.compile(text, Net())
    checked = trainc.check(text).spec
    assert checked is not None
    monkeypatch.setattr(Local, "joins", "no")
    with pytest.raises(SpecError, match="`local` lets each process train on data of its own"):
        Distribution(checked, Launch(0, 2, 0)).join(program, points(), torch.device("cpu"))


def test_a_launch_without_its_variables_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    (tmp_path / "a.train").write_text(spec())
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT are not set: start"):
        train(tmp_path / "a.train", tmp_path / "out", quiet=True)


if __name__ == "__main__":
    run_rank(process)
