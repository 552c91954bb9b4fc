"""The gradients of processes that `distribute fsdp2` joins, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

import trainc
from tests.compiler.constructs.test_ddp import gradients, net
from tests.processes import run_processes, run_rank
from tests.torchrun import Net
from trainc.compiler.constructs.distribute.fsdp2 import Fsdp2
from trainc.dsl.text.errors import SpecError
from trainc.runtime.processes.sharded import full, is_sharded

REST = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 5 steps }"
CLAUSE = 'distribute fsdp2 on "blocks.*"'


def process(rank: int) -> Any:
    alone, together = net(), net()
    modules = {name: together.get_submodule(name) for name in ("blocks", "blocks.0", "blocks.1")}
    modules.pop("blocks")
    clause = Fsdp2(reshard_after_forward=False)
    clause.prepare(together, modules, torch.device("cpu"))
    assert all(map(is_sharded, together.parameters()))
    assert clause.wrap(together, torch.device("cpu")) is together
    found = gradients(together, together, rank)
    half = Fsdp2(param_dtype="bf16", reduce_dtype="float32")
    other = net().float()
    half.prepare(other, {}, torch.device("cpu"))
    dtype = other(torch.ones(2, 8)).dtype
    return gradients(alone, alone, rank), {n: full(g) for n, g in found.items()}, dtype


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with TemporaryDirectory() as folder:
        found = run_processes(__file__, 2, Path(folder), weights_only=False)
    assert found[0][2] == torch.bfloat16
    return found[0][1], Fsdp2().reference([own for own, *_ in found])


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ("mask sift on ndim(2) { density = 20% }", "a mask needs whole tensors"),
        ("mask magnitude on ndim(2) { density = 20% }", "a mask needs whole tensors"),
        ("regularize ema { decay = 0.9 }", "it keeps a copy of the model"),
        ("distribute ddp", "says already how processes train together"),
    ],
)
def test_what_needs_whole_parameters_is_refused_at_plan(clause: str, message: str) -> None:
    trainc.plan(f"{REST} {CLAUSE}", Net())
    with pytest.raises(SpecError, match=message) as caught:
        trainc.plan(f"{REST} {CLAUSE} {clause}", Net())
    assert clause.partition(" {")[0] in str(caught.value)


def test_it_must_say_which_modules() -> None:
    with pytest.raises(SpecError, match="on"):
        trainc.plan(f"{REST} distribute fsdp2", Net())
    with pytest.raises(SpecError, match="matches no"):
        trainc.plan(f'{REST} distribute fsdp2 on "layers.*"', Net())


if __name__ == "__main__":
    run_rank(process)
