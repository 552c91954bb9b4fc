"""Static multipliers: each parameter has the number of the entry that selects it, and nothing else."""

import math

import pytest
import torch
from torch import nn

import trainc
from examples.models import gpt
from trainc.compiler.constructs.lr.by_type import ByType
from trainc.dsl.text.errors import SpecError

BASE = "loss cross_entropy\noptimizer sgd { lr = 0.1 }\n"


def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=1, width=16, heads=2, context=8, vocabulary=11)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (2, 9), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def moves(clauses: str) -> dict[str, torch.Tensor]:
    """Return how far each parameter moves in one step of SGD."""
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainc.compile(BASE + clauses, net).step(batch())
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def test_each_parameter_moves_by_the_number_that_selects_it() -> None:
    plain = moves("")
    found = moves('lr by_type { factors = [4 on type(Embedding), 0.5 on "blocks.*.mlp.**"] }')
    for name, move in plain.items():
        factor = 4.0 if name.startswith("embed") else 0.5 if ".mlp." in name else 1.0
        torch.testing.assert_close(found[name], factor * move, rtol=1e-4, atol=1e-7)


def test_factors_of_several_clauses_multiply() -> None:
    clauses = "lr by_type on ndim(2) { factors = 3 } lr layer_decay { decay = 0.5 }"
    plain, found = moves(""), moves(clauses)
    levels = {"head.weight": 3.0, "blocks.0.mlp.fc.weight": 1.5, "embed.token.weight": 0.75}
    for name, factor in levels.items():
        torch.testing.assert_close(found[name], factor * plain[name], rtol=1e-4, atol=1e-7)


def compiled_and_reference() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the moves of one step in float64 by the compiled clause, and by the table of factors."""
    construct = ByType(factors="[4 on type(Embedding), 0.5 on ndim(1)]")  # type: ignore[arg-type]
    found: list[dict[str, torch.Tensor]] = []
    for clause in ("", "lr by_type { factors = [4 on type(Embedding), 0.5 on ndim(1)] }"):
        net = model().double()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        trainc.compile(BASE + clause, net).step(batch())
        found.append({name: p.detach() - before[name] for name, p in net.named_parameters()})
    plain, scaled = found
    known = {
        "type(Embedding)": [name for name in plain if name.startswith("embed")],
        "ndim(1)": [name for name, move in plain.items() if move.dim() == 1],
    }
    factors = construct.reference(known)
    return scaled, {name: factors.get(name, 1.0) * move for name, move in plain.items()}


@pytest.mark.parametrize(
    ("clause", "rule"),
    [
        ("{ factors = 0 on all }", "bad-value"),
        ("{ factors = -1 }", "bad-value"),
        ("{ factors = [2 on type(Embedding), 3 on all] }", "claimed-twice"),
        ("{ factors = [2 on type(Embedding), 3] }", "claimed-twice"),
        ('{ factors = 2 on "nothing.**" }', "selector-matches-nothing"),
        ("on ndim(2) { factors = 2 on ndim(1) }", "selector-matches-nothing"),
        ("until 3 steps { factors = 2 }", "bad-value"),
        ("{ }", "missing-field"),
    ],
)
def test_what_cannot_be_meant_is_an_error(clause: str, rule: str) -> None:
    with pytest.raises(SpecError) as caught:
        trainc.compile(BASE + f"run {{ length = 9 steps }} lr by_type {clause}", model())
    assert rule in [one.rule for one in caught.value.diagnostics]


def test_factors_of_1_are_told() -> None:
    program = trainc.compile(
        BASE + "lr by_type { factors = [1 on ndim(2), 1 on ndim(1)] }", model()
    )
    assert [one.rule for one in program.plan.warnings] == ["no-effect"]
    assert math.isfinite(program.step(batch())["loss"])
