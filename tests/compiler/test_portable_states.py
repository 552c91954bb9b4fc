"""States are whole: one process, DistributedDataParallel and FSDP2 continue each other's, in every direction."""

from __future__ import annotations

import faulthandler
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank
from trainc.runtime.processes.sharded import full
from trainc.runtime.storage.checkpoint import load_checkpoint, save_checkpoint

REST = " run { length = 9 steps, seed = 3 } "
ADAM = "loss cross_entropy optimizer adamw { lr = 1e-2, weight_decay = 0.1 } "
SPECS = {
    "measured": ADAM
    + "noise_scale gns on type(LayerNorm) { smooth = 3 steps }"
    + " observe norm_growth on ndim(2) every 1 steps observe distance on ndim(2) every 1 steps"
    + " regularize l2_sp on ndim(2) { weight = 0.1 } when gns.noise > 0 cooldown 2 steps { batch = 2 * batch }"
    + REST,
    "average": ADAM + "regularize ema { decay = 0.9 }" + REST,
    "entries": ADAM + "mask sift on ndim(2) { density = 30%, batches = 1 }" + REST,
    "zeros": ADAM + "mask magnitude on ndim(2) { density = 50% }" + REST,
}
WHOLE = ("average", "entries", "zeros")
"""What needs whole tensors, which FSDP2 has not."""
WAYS = ("one", "ddp", "fsdp2", "fsdp2 late")
CASES = [
    (name, first, second)
    for name in SPECS
    for first, second in product(WAYS, WAYS)
    if not (name in WHOLE and "fsdp2" in first[:5] + second[:5])
]
BEFORE, AFTER = 2, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(5), nn.Linear(5, 5)  # five entries: unequal shards

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(5, 3)).double()


def batch(step: int, part: slice) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(6, 5, generator=g, dtype=torch.float64)
    return x[part], torch.randint(0, 3, (6,), generator=g)[part]


def shard(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)


def program_of(name: str, way: str) -> Any:
    model = net()
    if way == "fsdp2":
        shard(model)
    program = trainc.compile(SPECS[name], model, executor="module")
    if way == "fsdp2 late":
        shard(model)
    if way == "ddp":
        program.forward = DistributedDataParallel(model)
    return program


def run(program: Any, way: str, rank: int, steps: range) -> list[dict[str, float]]:
    part = slice(None) if way == "one" else (slice(0, 4), slice(4, 6))[rank]
    return [program.step(batch(step, part)) for step in steps]


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, dict):
        return [one for value in state.values() for one in tensors(value)]
    return [state] if isinstance(state, Tensor) else []


def moved(name: str, first: str, second: str, rank: int, folder: Path) -> Any:
    """Train one way, save a checkpoint, continue it another way; return metrics and weights of the second part."""
    before = program_of(name, first)
    run(before, first, rank, range(BEFORE))
    state = before.state_dict()
    assert not any(hasattr(one, "device_mesh") for one in tensors(state))
    saved = load_checkpoint(save_checkpoint(folder, BEFORE, state))
    after = program_of(name, second)
    after.load_state_dict(saved)
    metrics = run(after, second, rank, range(BEFORE, BEFORE + AFTER))
    weights = {n: full(one).detach().clone() for n, one in after.module.state_dict().items()}
    return metrics, weights, sorted(after.state_dict()["model"])


def saved(rank: int, folder: Path) -> Any:
    """Save what shards were trained to; return the weights before, and those loaded by one process and by shards."""
    program = program_of("measured", "fsdp2")
    run(program, "fsdp2", rank, range(BEFORE))
    program.save(folder)
    whole, shards = net(), net()
    shard(shards)
    loaded = trainc.load(folder, whole).module, trainc.load(folder, shards).module
    states = [one.state_dict() for one in (program.module, *loaded)]
    return [{n: full(one).detach().clone() for n, one in state.items()} for state in states]


def broken(rank: int, folder: Path) -> str:
    """Save weights of which one process has a shard that is not finite."""
    program = program_of("measured", "fsdp2")
    run(program, "fsdp2", rank, range(1))
    if rank:
        program.module[2].weight.to_local().data[-1].fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite") as error:
        program.save(folder)
    return str(error.value)


def process(rank: int) -> Any:
    faulthandler.dump_traceback_later(100, exit=True)
    own = Path(sys.argv[3])
    found: dict[Any, Any] = {"saved": saved(rank, own / "saved")}
    found["broken"] = broken(rank, own / "broken")
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(CASES):
            found[case] = moved(*case, rank, Path(folder) / str(i))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_processes(__file__, 2, tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module", params=SPECS)
def straight(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Return what one process finds in an uninterrupted run."""
    program = program_of(request.param, "one")
    run(program, "one", 0, range(BEFORE))
    metrics = run(program, "one", 0, range(BEFORE, BEFORE + AFTER))
    return request.param, metrics, program.module.state_dict()


def test_a_state_continues_in_every_direction(straight: Any, found: list[Any]) -> None:
    name, metrics, weights = straight
    for case in CASES:
        if case[0] != name:
            continue
        for one in found:
            for got, expected in zip(one[case][0], metrics, strict=True):
                assert got.keys() == expected.keys(), case
                assert got == pytest.approx(expected, rel=1e-8, abs=1e-11, nan_ok=True), case
            for weight, value in weights.items():
                torch.testing.assert_close(
                    one[case][1][weight], value, rtol=1e-9, atol=1e-12, msg=f"{case} {weight}"
                )
            assert one[case][2] == sorted(weights), case


def test_a_program_is_saved_whole(found: list[Any]) -> None:
    for one in found:
        first, *others = one["saved"]
        for name, weight in first.items():
            assert all(torch.equal(weight, other[name]) for other in others), name


def test_no_process_saves_where_a_shard_of_one_is_not_finite(found: list[Any]) -> None:
    assert found[0]["broken"] == found[1]["broken"]
    assert "2.weight" in found[0]["broken"]


if __name__ == "__main__":
    run_rank(process)
