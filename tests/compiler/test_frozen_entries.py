"""An entry that a mask does not let train is bit-identical after any number of steps of any optimizer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc

OPTIMIZERS = [
    "adamw { lr = 0.05, weight_decay = 0.3, clip = 0.1 }",
    "adamw { lr = 0.05, weight_decay = 0.3, betas = [0.5, 0.6] }",
    "sgd { lr = 0.1, momentum = 0.9, nesterov = true, weight_decay = 0.1, clip = 0.1 }",
    'torch("torch.optim:RMSprop") { lr = 0.01, momentum = 0.9, weight_decay = 0.1 }',
    'torch("torch.optim:Adagrad") { lr = 0.1, weight_decay = 0.1 }',
    'torch("torch.optim:NAdam") { lr = 0.1, weight_decay = 0.1, decoupled_weight_decay = true }',
    'torch("torch.optim:Rprop") { lr = 0.01 }',
    'torch("torch.optim:ASGD") { lr = 0.1, t0 = 0, weight_decay = 0.1 }',
]
MASKS = [
    "sift on NAMES { density = 20% }",
    "sift on NAMES every 2 steps { density = 20%, scope = global, batches = 2 }",
    "sift on NAMES { structure = row, density = 30%, select = random }",
    "magnitude on NAMES every 2 steps { density = cubic(to = 30%, over = 5 steps) }",
    "rigl on NAMES every 2 steps { density = 40%, replace = 50% }",
]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.words(ids)))  # type: ignore[no-any-return]


def run(mask: str, optimizer: str, names: str = '("words.*" | "head.*")') -> None:
    """Train, and compare what does not train with what it was, in weights and in their average."""
    torch.manual_seed(0)
    model = Words()
    spec = (
        f"loss cross_entropy\nmask {mask}\noptimizer {optimizer}\nregularize ema {{ decay = 0.5 }}"
    )
    program: Any = trainc.compile(
        spec.replace("NAMES", names) + "\nrun { length = 20 steps }", model
    )
    masks = program._method.masks
    start = {name: mask.parameter.detach().clone() for name, mask in masks.items()}
    never = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in start.items()}
    zeros = not mask.startswith("sift")
    for _ in range(7):
        before = {name: mask.parameter.detach().clone() for name, mask in masks.items()}
        program.step((torch.randint(7, (4, 3)), torch.randint(7, (4, 3))))
        for name, one in masks.items():
            trains = one.trained_entries()
            if not zeros and getattr(one, "index", None) is None:
                trains = torch.zeros_like(trains)
            never[name] &= ~trains
            if zeros:
                assert bool((one.parameter[~trains] == 0).all())
            elif "every" not in mask:
                assert torch.equal(one.parameter[~trains], before[name][~trains])
    for name, one in masks.items():
        assert never[name].any() or "every" in mask
        want = torch.zeros_like(start[name]) if zeros else start[name]
        assert torch.equal(one.parameter[never[name]], want[never[name]])
    assert any(not torch.equal(one.parameter, start[name]) for name, one in masks.items())
    with program.evaluation_weights():
        for name in masks:
            averaged = program.module.get_parameter(name).detach()
            if zeros:  # also those that became zero after the average began
                assert bool((averaged[~masks[name].trained_entries()] == 0).all())
            else:
                assert torch.equal(averaged[never[name]], start[name][never[name]])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_entry_that_does_not_train_is_bit_identical(optimizer: str) -> None:
    for mask in MASKS if optimizer == OPTIMIZERS[0] else MASKS[1:4:2]:
        run(mask, optimizer)


def test_rows_of_an_embedding_train_alone() -> None:
    run(
        "sift on NAMES { structure = row, density = 30%, rest = freeze }",
        OPTIMIZERS[0],
        '"words.*"',
    )


def test_an_optimizer_that_mixes_entries_is_refused_with_a_reason() -> None:
    spec = "loss cross_entropy\nmask MASK\noptimizer muon on matrices { lr = 0.1, others = sgd { lr = 0.1 } }"
    for mask in MASKS[0], MASKS[3]:
        text = spec.replace("MASK", mask.replace("NAMES", '"head.*"'))
        with pytest.raises(trainc.SpecError, match=r"makes each entry of an update from all"):
            trainc.compile(text + "\nrun { length = 9 steps }", Words())
