"""Masks under DistributedDataParallel: replicas choose and train the same entries, those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank

MASKS = {
    "entries": "sift on ndim(2) { density = 20% }",
    "entries chosen again": "sift on ndim(2) every 2 steps { density = 20%, scope = global }",
    "random entries": "sift on ndim(2) every 2 steps { density = 20%, scope = erk, select = random }",
    "entries by movement": "sift on ndim(2) every 3 steps { density = 20%, select = movement, batches = 2 }",
    "entries by spectra": "sift on ndim(2) { density = 30%, scope = calibrated, unit = tensor }",
    "entries in rows": "embedding_rows on ndim(2) { rows = [0, 3] }",
    "zeros": "magnitude on ndim(2) { density = 50% }",
    "zeros by gradients": "movement on ndim(2) every 1 steps { density = 50% }",
    "zeros by inputs": "wanda on ndim(2) { density = 50%, batches = 2 }",
    "zeros by inputs and spectra": "wanda on ndim(2) { density = 50%, batches = 1, scope = farms, unit = tensor }",
    "zeros and moved": "sparsegpt on ndim(2) { structure = n_m(2, 4), batches = 1 }",
    "zeros by spectra": "magnitude on ndim(2) every 2 steps { density = 50%, scope = alpha, unit = tensor }",
    "zeros that grow": "rigl on ndim(2) every 1 steps { density = 50%, replace = 30% }",
    "zeros that grow at random": "set on ndim(2) every 1 steps { density = 50%, replace = 30% }",
    "groups": "n_m on ndim(2) { n = 2, m = 4 }",
    "biases": "bitfit",
    "blocks": "lisa on ndim(2) | role(bias) every 1 steps",
}
STEPS = 4


def spec_of(name: str) -> str:
    return f"loss cross_entropy optimizer adamw {{ lr = 1e-2 }} mask {MASKS[name]}"


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = x + torch.relu(layer(x))
        return self.out(x)  # type: ignore[no-any-return]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().double()


def data(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 8, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=g)


def replica(rank: int) -> Any:
    """Train on one half of every batch, in two micro-batches; run as a process of its own."""
    found: dict[str, Any] = {}
    for name in MASKS:
        own = model()
        if rank and name == "entries":  # those of rank 0 count
            own.get_parameter("inner.0.weight").data += 1
        program = trainc.compile(spec_of(name), own)
        program.forward = DistributedDataParallel(own)
        found[f"{name} left out"] = sorted(program.forward.parameters_to_ignore)
        for step in range(STEPS):
            x, y = data(step)
            rows = [slice(4 * rank + i, 4 * rank + i + 2) for i in (0, 2)]
            program.step([(x[part], y[part]) for part in rows])
        found[name] = own.state_dict()
    return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("replicas")
    return run_processes(__file__, 2, folder)


@pytest.mark.parametrize("spec", MASKS)
def test_replicas_train_the_entries_of_one_process(spec: str, replicas: list[Any]) -> None:
    alone = model()
    program = trainc.compile(spec_of(spec), alone, executor="module")
    for step in range(STEPS):
        program.step(data(step))
    left_out = ["inner.0.weight", "inner.1.weight", "out.weight"] if "entries" in spec else []
    assert [one[f"{spec} left out"] for one in replicas] == [left_out] * 2
    moved = [not torch.equal(w, model().state_dict()[n]) for n, w in alone.state_dict().items()]
    assert any(moved)
    for name, wanted in alone.state_dict().items():
        one, two = (found[spec][name] for found in replicas)
        assert torch.equal(one, two), name
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    run_rank(replica)
