"""RigL: the published choice, a run by hand, and moments that start at 0 under every optimizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.constructs.mask.dynamic.rigl import Rigl
from trainc.runtime.mask.regrow import Regrow, regrown

CASE = json.loads((Path(__file__).parents[2] / "reference/masks.json").read_text())["relatives"]
NAMES = ("0.weight", "2.weight")
Draw = Callable[[int, str, Tensor], Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)).double()


def data(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=g)


def compiled(mask: str, optimizer: str = "adamw { lr = 0.05, weight_decay = 0.3 }") -> Any:
    text = f"loss cross_entropy\n{mask}\noptimizer {optimizer}\nrun {{ length = 20 steps }}"
    return trainc.compile(text, net())


def by_hand(mask: str, draw: Draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after seven steps, by the program and by AdamW on masked tensors; half is replaced every 2 steps.

    `draw` gives the growth of each entry from the number of the step, the parameter's name and its dense gradient.
    """
    program = compiled(f"mask {mask} on ndim(2) every 2 steps {{ density = 40%, replace = 50% }}")
    program.begin()
    model = program.module
    own = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    kept = {n: own[n].detach() != 0 for n in NAMES}
    optimizer = torch.optim.AdamW(own.values(), lr=0.05, weight_decay=0.3)
    for step in range(7):
        loss = F.cross_entropy(
            torch.func.functional_call(model, own, (data(step)[0],)), data(step)[1]
        )
        for (n, w), g in zip(own.items(), torch.autograd.grad(loss, [*own.values()]), strict=True):
            w.grad = g
            if n in kept and step and step % 2 == 0:
                count = int(0.5 * int(kept[n].sum()))
                kept[n] = Rigl.reference(w.detach(), kept[n], draw(step, n, g), count)
                w.grad = None
                for held in (w.data, *optimizer.state[w].values()):
                    if held.shape == w.shape:
                        held *= kept[n]
            elif n in kept:
                w.grad = g * kept[n]
        optimizer.step()
        program.step(data(step))
    return {n: p.detach() for n, p in model.named_parameters()}, {
        n: w.detach() for n, w in own.items()
    }


def test_what_is_dropped_and_grown_is_the_published_choice() -> None:
    case = CASE["rigl_official_torch_port"]

    def of(key: str, i: int) -> Tensor:
        stored = case[key][i]
        return torch.tensor(stored["data"]).view(stored["shape"])

    for i in (1, 2):
        kept = of("mask_before", i).bool()
        count = int(case["drop_fraction"] * int(kept.sum()))
        new = regrown(of("W_before_update", i), kept, of("dense_grad", i).abs(), count)
        assert torch.equal(new, of("mask_after", i).bool())
        assert torch.equal(of("W_before_update", i) * new, of("W_after", i))


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw { lr = 0.05, weight_decay = 0.3 }",
        "sgd { lr = 0.1, momentum = 0.9 }",
        'torch("torch.optim:RMSprop") { lr = 0.01, momentum = 0.9, centered = true }',
    ],
)
def test_a_new_entry_and_its_moments_are_zero(optimizer: str) -> None:
    program = compiled(
        "mask rigl on ndim(2) every 2 steps { density = 40%, replace = 50% }", optimizer
    )
    masks = program._method.masks
    state = next(a for a in program._machine.actions if hasattr(a, "torch")).torch.state
    before = {}
    for step in range(5):
        before = {n: mask.kept_entries() for n, mask in masks.items()}
        program.step(data(step))
    grown = {n: mask.kept_entries() & ~before[n] for n, mask in masks.items()}
    for n, mask in masks.items():
        assert grown[n].any()
        assert int(mask.kept_entries().sum()) == int(before[n].sum())
        held = [t for t in state[mask.parameter].values() if t.shape == mask.parameter.shape]
        assert held
        assert all(
            bool((t[grown[n] | ~mask.kept_entries()] == 0).all()) for t in (mask.parameter, *held)
        )
    program.step(data(5))
    assert all(bool((mask.parameter[grown[n]] != 0).all()) for n, mask in masks.items())


def test_its_share_falls_and_its_sizes_are_those_of_erk() -> None:
    program = compiled("mask rigl on ndim(2) every 1 steps until 10 steps { density = 40% }")
    action: Regrow = next(a for a in program._machine.actions if isinstance(a, Regrow))
    stayed = []
    for step in range(12):
        program.step(data(step))
        stayed.append(program.report().series.get("rigl.overlap", {}).get("0.weight"))
    assert stayed[0] is None
    assert stayed[10] is stayed[11] is None
    assert all(one >= 0.7 for one in stayed[1:10])
    assert sum(mask.count for mask in action.choice.masks.values()) == 36
    shown = [row["mask"] for row in program.plan.parameters if row["name"] in NAMES]
    assert shown == [f"density {mask.density:.4g}" for mask in action.choice.masks.values()]


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ("mask rigl on ndim(2) every 2 steps { density = 0 }", "above 0%"),
        ("mask rigl on ndim(2) every 2 steps { density = 40%, replace = 2 }", "replace"),
    ],
)
def test_what_makes_no_sense_is_an_error_at_its_place(clause: str, words: str) -> None:
    with pytest.raises(trainc.SpecError, match=words):
        compiled(clause)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after seven steps, by the program and by hand."""
    return by_hand("rigl", lambda step, name, gradient: gradient.abs())
