"""Entries that begin to train: the state of the optimizer starts where the optimizer starts a parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.runtime.torch_optimizer.beginning import first_state

State = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, State, int], Tensor]


def rprop(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    """Return the weights after a step of Rprop, entry by entry as its definition says."""
    product = g * state["prev"]
    factor = torch.ones_like(w).masked_fill(product > 0, 1.2).masked_fill(product < 0, 0.5)
    state["step_size"] = (state["step_size"] * factor).clamp(1e-6, 50.0)
    used = g.masked_fill(product < 0, 0.0)
    state["prev"] = used
    return w - state["step_size"] * used.sign()


def adagrad(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    g = g + 0.1 * w
    state["sum"] = state["sum"] + g * g
    return w - 0.05 * g / (state["sum"].sqrt() + 1e-10)


def adamw(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    state["m"] = 0.9 * state["m"] + 0.1 * g
    state["v"] = 0.999 * state["v"] + 0.001 * g * g
    root = (state["v"] / (1 - 0.999**t)).sqrt() + 1e-8
    return w * (1 - 0.05 * 0.1) - 0.05 * state["m"] / (1 - 0.9**t) / root


METHODS: dict[str, tuple[str, Update, dict[str, float]]] = {
    "rprop": ('torch("torch.optim:Rprop") { lr = 0.05 }', rprop, {"prev": 0, "step_size": 0.05}),
    "adagrad": (
        'torch("torch.optim:Adagrad") { lr = 0.05, weight_decay = 0.1, initial_accumulator_value = 0.3 }',
        adagrad,
        {"sum": 0.3},
    ),
    "adamw": ("adamw { lr = 0.05, weight_decay = 0.1 }", adamw, {"m": 0, "v": 0}),
}
MASKS = {
    "sift": "sift on ndim(2) every 2 steps { density = 25%, select = random }",
    "global": "sift on ndim(2) every 3 steps { density = 25%, scope = global, select = random }",
    "movement": "movement on ndim(2) every 1 steps { density = 60% }",
    "rigl": "rigl on ndim(2) every 2 steps { density = 40%, replace = 50% }",
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False)
    ).double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", MASKS)
def test_new_entries_begin_as_a_parameter_does(method: str, mask: str) -> None:
    """By hand in float64: entries that enter have the first state, those that leave lose theirs."""
    text, update, first = METHODS[method]
    net = model()
    program: Any = trainc.compile(
        f"loss cross_entropy\noptimizer {text}\nmask {MASKS[mask]}\nrun {{ length = 40 steps }}",
        net,
    )
    masks = program._method.masks
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    states = {n: {k: torch.full_like(w, x) for k, x in first.items()} for n, w in weights.items()}
    trained = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    steps, entered = dict.fromkeys(weights, 0), 0
    zeros = not MASKS[mask].startswith("sift")
    source = torch.Generator().manual_seed(1)
    for number in range(12):
        x = torch.randn(5, 6, generator=source, dtype=torch.float64)
        y = torch.randint(4, (5,), generator=source)
        program.step((x, y))
        grew = mask == "rigl" and number % 2 == 0 and number
        for n, one in masks.items():
            now = one.kept_entries() if zeros else one.trained_entries()
            if not grew:
                _change(states[n], first, trained[n], now)
                entered += int((now & ~trained[n]).sum()) if number else 0
                trained[n] = now
        if zeros:
            weights = {n: w * trained[n] for n, w in weights.items()}
        leaf = {n: w.clone().requires_grad_() for n, w in weights.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, leaf, (x,)), y)
        found = torch.autograd.grad(loss, [*leaf.values()])
        for n, g in zip(weights, found, strict=True):
            now = trained[n]
            if grew:  # the optimizer leaves the tensor in this step
                new = masks[n].kept_entries()
                _change(states[n], first, now, new)
                entered += int((new & ~now).sum())
                trained[n] = new
                weights[n] = weights[n] * new
                continue
            steps[n] += 1
            own = {k: s.clone() for k, s in states[n].items()}
            moved = update(weights[n], g * now, own, steps[n])
            weights[n] = torch.where(now, moved, weights[n])
            states[n] = {k: torch.where(now, s, states[n][k]) for k, s in own.items()}
        for n, p in net.named_parameters():
            torch.testing.assert_close(p.detach(), weights[n], rtol=1e-9, atol=1e-12)
    assert entered


def _change(state: State, first: dict[str, float], before: Tensor, now: Tensor) -> None:
    for key, start in first.items():
        state[key] = state[key].masked_fill(now & ~before, start)


def test_the_first_state_of_torchs_optimizers() -> None:
    values = torch.randn(5, dtype=torch.float64)
    options = {"lr": 0.3, "weight_decay": 0.5}
    for kind in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adadelta, torch.optim.NAdam):
        found = first_state(kind, values, options)
        assert all(not t.any() for t in found.values() if t.shape == values.shape), kind
    averaged = first_state(torch.optim.ASGD, values, options)
    torch.testing.assert_close(averaged["ax"], values, rtol=1e-3, atol=0)
    assert first_state(torch.optim.LBFGS, values, {}) == {}  # it asks for a closure


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("at", [None, 3, 4])
def test_a_forgotten_parameter_begins_anew_where_state_is_made_with_the_optimizer(
    at: int | None,
) -> None:
    """Adagrad makes its sums when it is built; a block that trains again has those of a new one, resumed, too."""
    spec = """loss cross_entropy mask lisa every 1 steps run { length = 40 steps, seed = 3 }
    optimizer torch("torch.optim:Adagrad") { lr = 0.05, initial_accumulator_value = 0.3 }"""

    def made() -> trainc.Program:
        torch.manual_seed(0)
        return trainc.compile(spec, Blocks().double())

    program = made()
    want = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    sums: dict[str, Tensor] = {}
    for number in range(10):
        source = torch.Generator().manual_seed(number)
        x = torch.randn(5, 4, generator=source, dtype=torch.float64)
        y = torch.randint(3, (5,), generator=source)
        leaf = {n: w.clone().requires_grad_() for n, w in want.items()}
        loss = F.cross_entropy(torch.func.functional_call(program.module, leaf, (x,)), y)
        gradients = dict(zip(leaf, torch.autograd.grad(loss, [*leaf.values()]), strict=True))
        if number == at:
            state, weights = program.state_dict(), program.module.state_dict()
            weights = {n: w.clone() for n, w in weights.items()}
            program = made()
            program.load_state_dict(state)
            program.module.load_state_dict(weights)
        before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
        program.step((x, y))
        for n, p in program.module.named_parameters():
            if torch.equal(p, before[n]):
                sums.pop(n, None)
                continue
            sums[n] = sums.get(n, torch.full_like(p, 0.3)) + gradients[n] ** 2
            want[n] = want[n] - 0.05 * gradients[n] / (sums[n].sqrt() + 1e-10)
            torch.testing.assert_close(p.detach(), want[n], rtol=1e-9, atol=1e-12)
