"""Targets that a loss has no meaning for by their values: an error names them, in steps and evaluations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainc
from trainc.compiler.method.loss import LossMismatch

RUN = " run { length = 40 steps } optimizer adamw { lr = 1e-2 } "
CLAUSES = {
    "plain": "",
    "measured": "noise_scale gns on type(LayerNorm)",
    "views": "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5 }",
}
INDICES = torch.tensor([0, 1, 2, 3, 1, 2])
SOFT = torch.full((6, 4), 0.25, dtype=torch.float64)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).double()


def inputs() -> Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randn(6, 6, generator=made, dtype=torch.float64)


WRONG: dict[str, tuple[str, Tensor, str]] = {
    "beyond": (
        "cross_entropy",
        INDICES + 1,
        "is the class 4, and the model's output has 4 classes",
    ),
    "negative": ("cross_entropy", INDICES - 1, r"is the class -1, .*`ignore_index`, which is -100"),
    "one hot": ("cross_entropy", F.one_hot(INDICES), r"`targets\.argmax\(-1\)`"),
    "few weights": (
        "cross_entropy { class_weight = [1, 2] }",
        INDICES,
        "`class_weight` has 2 numbers",
    ),
    "index as float": ("cross_entropy", INDICES.double(), "class indices as int64"),
    "several true": ("cross_entropy", 8 * SOFT, r"sum to 8: they must .*`loss bce`"),
    "below 0": ("cross_entropy", SOFT - 0.5, "have the value -0.25"),
    "ignored label": ("bce", SOFT.index_fill(0, torch.tensor(2), -100.0), "from -100 to 0.25"),
    "percent": ("bce", 100 * SOFT, "from 25 to 25, and must be probabilities"),
}


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("wrong", WRONG)
def test_they_are_named(clause: str, wrong: str) -> None:
    loss, targets, message = WRONG[wrong]
    program = trainc.compile(f"loss {loss}{RUN}{CLAUSES[clause]}", model())
    before = [p.detach().clone() for p in program.module.parameters()]
    calls: list[Any] = [
        lambda: program.step((inputs(), targets)),
        lambda: program.loss((inputs(), targets)),
        lambda: program.evaluate(inputs(), targets),
    ]
    for call in calls:
        with pytest.raises(LossMismatch, match=message):
            call()
    for found, wanted in zip(program.module.parameters(), before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("clause", CLAUSES)
def test_a_graph_names_a_class_that_is_not_there_in_a_later_step(clause: str) -> None:
    program = trainc.compile(f"loss cross_entropy{RUN}{CLAUSES[clause]}", model(), executor="graph")
    program.step((inputs(), INDICES))
    with pytest.raises(LossMismatch, match="is the class 4"):
        program.step((inputs(), INDICES + 1))


@pytest.mark.parametrize("clause", CLAUSES)
def test_classes_of_eight_bits_are_those_of_64(clause: str) -> None:
    found = []
    for targets in (INDICES, INDICES.to(torch.uint8)):
        program = trainc.compile(f"loss cross_entropy{RUN}{CLAUSES[clause]}", model())
        found.append(program.step((inputs(), targets))["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_probabilities_of_half_precision_may_be_rounded() -> None:
    program = trainc.compile(f"loss cross_entropy{RUN}", model())
    soft = torch.softmax(torch.randn(6, 4, dtype=torch.float64), -1)
    for targets in (soft, soft.float(), soft.bfloat16()):
        assert program.step((inputs(), targets))["loss"] > 0
