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


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randint(
        0, 3, (7,), generator=g
    )


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("sizes", [(7,), (3, 4)])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_the_loop_written_by_hand(executor: Any, sizes: Any, search: str | None) -> None:
    """The rate falls from step to step, and each step asks several times for the loss of all micro-batches."""
    ours, theirs = network(), network()
    fields = "lr = linear(0.1, from = 0.5, over = 2 steps), max_iter = 5, history_size = 6"
    fields += f', line_search_fn = "{search}"' if search else ""
    spec = f'loss cross_entropy optimizer torch("torch.optim:LBFGS") {{ {fields} }}'
    program = trainc.compile(spec, ours, executor=executor)
    optimizer = torch.optim.LBFGS(
        theirs.parameters(), max_iter=5, history_size=6, line_search_fn=search
    )
    for step in range(3):  # more of them amplify the rounding
        x, y = batch(step)
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))

        def closure(parts: Any = parts) -> float:
            optimizer.zero_grad()
            total = 0.0
            for inputs, targets in parts:
                loss = torch.nn.functional.cross_entropy(theirs(inputs), targets)
                loss = loss * (len(targets) / 7)
                loss.backward()
                total += float(loss.detach())
            return total

        found = program.step(parts)
        assert found["lr_max"] == pytest.approx(0.5 - 0.2 * step)
        optimizer.param_groups[0]["lr"] = found["lr_max"]
        wanted = float(optimizer.step(closure))
        assert found["loss"] == pytest.approx(wanted, rel=1e-12)
        assert found["torch.evaluations"] > 3
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("weight_decay = 0.1", 'LBFGS"` has no weight decay: remove `weight_decay`'),
        ("clip = 1", "clipped gradients would not be those of the loss: remove `clip`"),
    ],
)
def test_what_lbfgs_cannot_do_is_an_error_at_its_clause(fields: str, message: str) -> None:
    spec = f'loss cross_entropy\noptimizer torch("torch.optim:LBFGS") {{ lr = 0.1, {fields} }}'
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(spec, network())
    assert message in str(caught.value)
    assert ":2:" in str(caught.value)
