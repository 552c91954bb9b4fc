"""The bound module under DistributedDataParallel: two processes give what one process gives on the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank

SPEC = """
loss cross_entropy
optimizer sgd { lr = 0.1 }
noise_scale gns on type(LayerNorm) { smooth = 5 steps }
"""
STEPS = 4


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = [
        nn.Linear(6, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    ]
    return nn.Sequential(*sizes).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=g, dtype=torch.float64), torch.randint(
        0, 4, (8,), generator=g
    )


def replica(rank: int) -> Any:
    """Train on one half of every batch; run as a process of its own."""
    own = model()
    program = trainc.compile(SPEC, own)
    program.forward = DistributedDataParallel(own)
    half = slice(4 * rank, 4 * rank + 4)
    metrics = []
    for step in range(STEPS):
        inputs, targets = data(step)
        metrics.append(program.step((inputs[half], targets[half])))
    return {"weights": own.state_dict(), "metrics": metrics}


def test_weights_and_noise_scale_are_those_of_one_process(tmp_path: Path) -> None:
    replicas = run_processes(__file__, 2, tmp_path)
    alone = model()
    program = trainc.compile(SPEC, alone, executor="module")
    for step in range(STEPS):
        want = program.step(data(step))
        for one in replicas:
            for name in ("gns", "gns.signal", "gns.noise"):
                assert one["metrics"][step][name] == pytest.approx(
                    want[name], rel=1e-9, nan_ok=True
                ), name
    for name, value in alone.state_dict().items():
        for one in replicas:
            torch.testing.assert_close(one["weights"][name], value, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    run_rank(replica)
