"""The mechanism of masks that keep entries at zero, under other choices than the largest weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration, Ndim, Number
from trainc.runtime.step.record import Step

STORED = json.loads((Path(__file__).parents[1] / "reference/masks.json").read_text())["relatives"]
EFFECTS = (
    Effect("perturb", "choose", ("params",), ("params",)),
    Effect("gradients", "zero gradients", ("gradient",), ("gradient",), lasting=True),
    Effect("deltas", "zero weights", ("delta",), ("params",), lasting=True),
)


class TwoOfFour(Construct):
    """Keeps the larger two of each four neighbours in a row."""

    kind: ClassVar = "mask"
    name: ClassVar = "two_of_four"
    targets: ClassVar = "parameters"
    effects: ClassVar = EFFECTS

    def lower(self, to: Lowering) -> None:
        names = [entry.name for entry in to.parameters()]

        def choose(step: Step, density: float) -> dict[str, Tensor]:
            assert density == 0.5
            return {name: self.kept(step.parameters[name].detach()) for name in names}

        to.mask(names, choose, Number(0.5))

    def kept(self, weight: Tensor) -> Tensor:
        fours = weight.abs().unflatten(1, (-1, 4))
        kept = torch.zeros_like(fours, dtype=torch.bool)
        return kept.scatter_(2, fours.topk(2).indices, True).flatten(1)


class Turns(TwoOfFour):
    """Trains each half of the columns in turn: what a choice drops is lost, and comes back as zeros."""

    name: ClassVar = "turns"

    def lower(self, to: Lowering) -> None:
        names = [entry.name for entry in to.parameters()]
        turn = [0]

        def choose(step: Step, density: float) -> dict[str, Tensor] | None:
            if step.clock.steps == 2:
                return None  # not yet: it is asked again in the next step
            turn[0] += 1
            half = torch.arange(step.parameters[names[0]].shape[1]) % 2 == turn[0] % 2
            return {name: half.expand_as(step.parameters[name]) for name in names}

        to.mask(names, choose, Number(0.5))


def compiled(model: nn.Module, construct: Construct, every: int | None = None) -> Program:
    base = trainc.check("loss mse optimizer sgd { lr = 0.1, momentum = 0.9 }").spec
    assert base is not None
    period = None if every is None else Duration(every, "steps")
    return trainc.compile(Spec((*base.clauses, Clause(construct, Ndim(2), every=period))), model)


def stored(name: str) -> Tensor:
    found: dict[str, Any] = STORED["wanda"][name]
    return torch.tensor(found["data"]).view(found["shape"])


def batches(count: int) -> Sequence[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(5, 8), torch.randn(5, 4)) for _ in range(count)]


def test_two_of_four_neighbours_are_those_of_the_reference() -> None:
    model = nn.Linear(8, 4, bias=False)
    model.weight.data = stored("W")
    program = compiled(model, TwoOfFour())
    for batch in batches(3):
        program.step(batch)
        pruned = stored("magnitude_prune_mask_2_4").bool()
        assert torch.equal(model.weight.detach() == 0, pruned)


def test_a_choice_may_wait_and_the_clause_asks_again() -> None:
    torch.manual_seed(1)
    model = nn.Linear(8, 4, bias=False)
    program = compiled(model, Turns(), every=2)
    halves = []
    for batch in batches(6):
        program.step(batch)
        kept = (model.weight.detach() != 0).any(0).nonzero()[:, 0].tolist()
        assert len(kept) == 4
        halves.append(kept[0])
    assert halves == [1, 1, 1, 0, 1, 1]
