"""Any torch optimizer by import path: built as asked, clear when it cannot be."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after six updates, by the program and by torch's own optimizer."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    theirs.load_state_dict(ours.state_dict())
    spec = 'loss mse optimizer torch("torch.optim:RMSprop") { lr = 1e-2, alpha = 0.95, weight_decay = 0.1 on ndim(2) }'
    program = trainc.compile(spec, ours)
    groups: list[dict[str, Any]] = [
        {"params": [theirs.weight], "weight_decay": 0.1},
        {"params": [theirs.bias]},
    ]
    optimizer = torch.optim.RMSprop(groups, lr=1e-2, alpha=0.95)
    for _ in range(6):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
        program.step((x, y))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(theirs(x), y).backward()
        optimizer.step()
    return ({n: p.detach() for n, p in m.named_parameters()} for m in (ours, theirs))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("torch.optim:RMSProp", "", "did you mean `RMSprop`"),
        ("torch.nn:Linear", "", "not a torch.optim.Optimizer"),
        ("torch.optim:RMSprop", ", alpah = 0.9", "alpah"),
        ("nowhere.at_all:Thing", "", "no module `nowhere`"),
    ],
)
def test_what_cannot_be_built_is_a_located_error(path: str, fields: str, message: str) -> None:
    spec = f'loss mse\noptimizer torch("{path}") {{ lr = 1e-2{fields} }}'
    with pytest.raises(trainc.SpecError, match=message) as caught:
        trainc.compile(spec, nn.Linear(2, 2))
    assert ":2:" in str(caught.value)


def test_an_optimizer_that_asks_for_a_closure_is_an_error_of_the_plan() -> None:
    spec = 'loss cross_entropy optimizer torch("torch.optim:LBFGS") { lr = 0.1 }'
    with pytest.raises(trainc.SpecError, match="needs arguments in `step`, as a closure"):
        trainc.compile(spec, torch.nn.Linear(3, 2))
