"""Every construct under DistributedDataParallel and FSDP2: processes train as one does on the examples of all.

Nothing here names a construct: a new one is found on disk, and is exact or refused with a reason.
"""

from __future__ import annotations

import faulthandler
import re
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests import other_package
from tests.conformance import Setup, in_double
from tests.processes import run_processes, run_rank
from tests.test_constructs import COMPUTING, FOUND, setup_of, spec_around, trained_clause
from trainc.compiler.errors import SiteError
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct
from trainc.runtime.data.batch import Batch, map_tensors
from trainc.runtime.processes.sharded import full

WRAPPERS = ("ddp", "fsdp2", "fsdp2 late")
STEPS = 2
LIMIT = 480
ESTIMATES = {("observe", "consistency"), ("perturb", "targets")}
"""What draws random numbers by an example's place in its replica: another estimate of the same."""
FOURS = [
    ("loss", "cross_entropy"),
    ("noise_scale", "gns"),
    ("mask", "sift"),
    ("regularize", "pace"),
]
SHARES = {2: (4, 2), 4: (2, 1, 2, 1)}
"""How many of the six examples each rank has, by the number of processes."""


def step(program: Program, batch: Batch, part: slice) -> dict[str, float]:
    """Run a step on some of a batch's examples."""
    ids = torch.arange(len(batch[1]))[part]
    inputs, targets = map_tensors(itemgetter(part), batch[0]), batch[1][part]
    given: Any = {"sample_ids": ids} if program.reads_sample_ids else {}
    return program.step((inputs, targets), **given)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer)
    fully_shard(model)
    return model


def trained(construct: type[Construct], wrapper: str | None, part: slice) -> Any:
    """Return the metrics of each step and the weights."""
    setup: Setup = setup_of(construct)
    spec, model = spec_around(trained_clause(construct), setup), setup.model().double()
    program = trainc.compile(
        spec, sharded(model) if wrapper == "fsdp2" else model, executor="module"
    )
    if wrapper == "ddp":
        program.forward = DistributedDataParallel(model)
    if wrapper == "fsdp2 late":
        sharded(model)
    metrics = [step(program, in_double(setup.batch(seed)), part) for seed in range(STEPS)]
    return metrics, {name: full(one).detach().clone() for name, one in model.state_dict().items()}


def difference(found: Any, expected: Any) -> str:
    """Return the first metric or weight that differs, empty where none does.

    What is sent, and to how many, is not compared: processes that shard one model are one replica, and alone.
    """
    for i, (one, other) in enumerate(zip(found[0], expected[0], strict=True)):
        if one.keys() != other.keys():
            return f"step {i}: metrics {sorted(one.keys() ^ other.keys())}"
        for name, value in other.items():
            if name.endswith((".bytes", ".replicas")):
                continue
            if one[name] != pytest.approx(value, rel=1e-8, abs=1e-10, nan_ok=True):
                return f"step {i}: `{name}` is {one[name]}, not {value}"
    for name, value in expected[1].items():
        if not torch.allclose(found[1][name], value, rtol=1e-8, atol=1e-10):
            return f"`{name}` differs by {(found[1][name] - value).abs().max():.3g}"
    return ""


def outcome(construct: type[Construct], wrapper: str, part: slice, expected: Any) -> list[str]:
    """Return `exact`, `differs` or `refused`, and what is said."""
    try:
        found = trained(construct, wrapper, part)
    except (ValueError, trainc.SpecError, SiteError) as error:
        return ["refused", str(error)]
    differs = difference(found, expected)
    return ["differs" if differs else "exact", differs]


def process(rank: int) -> Any:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    world = dist.get_world_size()
    before = sum(SHARES[world][:rank])
    part, found = slice(before, before + SHARES[world][rank]), {}
    with TemporaryDirectory() as site, other_package.installed(Path(site)):
        for key in COMPUTING if world == 2 else FOURS:
            expected = trained(trainc.catalog()[key], None, slice(None))
            for wrapper in WRAPPERS[: 3 if world == 2 else 2]:
                found[*key, wrapper] = outcome(trainc.catalog()[key], wrapper, part, expected)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_processes(__file__, 2, tmp_path_factory.mktemp("pair"), timeout=LIMIT + 30)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_processes(__file__, 4, tmp_path_factory.mktemp("four"), timeout=LIMIT + 30)


@pytest.mark.parametrize("key", COMPUTING, ids=" ".join)
def test_processes_train_as_one_or_say_why_not(key: tuple[str, str], pair: list[Any]) -> None:
    for wrapper in WRAPPERS:
        (what, said), other = (one[*key, wrapper] for one in pair)
        assert other[0] == what, other
        if what == "refused":
            assert re.search(r"FSDP|DistributedDataParallel|fully_shard", said), said
            assert re.search(r"[Uu]se |train with|remove|compile before|leave|Change", said), said
        elif what == "differs":  # as it does over micro-batches, which its page and the plan say
            assert FOUND[key].division is not None or key in ESTIMATES, f"{wrapper}: {said}"


def test_whatever_is_refused_is_few(pair: list[Any]) -> None:
    """DistributedDataParallel is refused by what exchanges weights itself; half and more of all train in shards."""
    refused = {key for key, (what, _) in pair[0].items() if what == "refused"}
    assert {key[0] for key in refused if key[2] == "ddp"} <= {"distribute"}
    assert 2 * len({key[:2] for key in refused}) < len(COMPUTING)


@pytest.mark.parametrize("key", FOURS, ids=" ".join)
def test_four_processes_train_as_one(key: tuple[str, str], four: list[Any]) -> None:
    for one in four:
        assert one[*key, "ddp"] == ["exact", ""]
        assert one[*key, "fsdp2"] == ["exact", ""] or one[*key, "fsdp2"][0] == "refused"


if __name__ == "__main__":
    run_rank(process)
