"""Leaders that are chosen by figures which are not finite, by ties, and among another number of processes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.distribute._average import Exchanged
from trainc.compiler.constructs.distribute._leader import Lead, Strengths

SPEC = "loss mse optimizer sgd { lr = 0.1 } distribute local every 2 steps { rule = leader }"


class OneOfMany:
    """A process among others whose scores are given, and whose weights are twice as large as its own."""

    def __init__(self, scores: list[float], rank: int = 0) -> None:
        self.scores, self.rank, self.size = scores, rank, len(scores)
        self.sources: list[int] = []

    def gather_rows(self, numbers: list[float]) -> Tensor:
        rows = [numbers if i == self.rank else [score] for i, score in enumerate(self.scores)]
        return torch.tensor(rows, dtype=torch.float64)

    def rows_in_turn(self, numbers: list[float]) -> Tensor:
        self.told = numbers
        return torch.tensor([numbers] * self.size, dtype=torch.float64)

    def numbers_in_turn(self) -> list[int]:
        return [*range(self.size)]

    def copy_from(self, source: int, tensors: list[Tensor]) -> None:
        self.sources.append(source)
        for tensor in tensors:
            tensor.mul_(1 if source == self.rank else 2)

    def mean_in_place(self, tensors: list[Tensor], dtype: torch.dtype | None = None) -> None:
        assert not tensors

    mean_of_processes = mean_in_place


def led(losses: list[float], others: list[float], led: list[int] | None = None) -> Any:
    """Return the turn of a process with these losses: whom it followed, its weight, its notes, who led how often."""
    weight = nn.Parameter(torch.ones(3))
    lead = Lead(
        "local",
        Exchanged({"w": weight}, dict, False),
        Strengths((0.5, 0.5), (0.1, 0.1), (2, 2)),
        None,
        4,
    )
    lead.losses, lead.led = losses, led or []
    step: Any = SimpleNamespace(
        parameters={"w": weight},
        notes=[],
        clock=SimpleNamespace(steps=1),
        clock_after=lambda: None,
        loss=0.5,
    )
    group: Any = OneOfMany([math.nan, *others])
    measured = lead.turn(step, group)
    return SimpleNamespace(
        sources=group.sources,
        weight=float(weight.detach()[0]),
        notes=step.notes,
        led=lead.led,
        told=group.told,
        measured=measured,
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_process_without_a_finite_loss_never_leads(loss: float) -> None:
    found = led([0.1, loss], [7.0, 9.0])
    assert found.sources == [1]
    assert found.weight == 1.5
    assert not found.notes
    assert found.told == [0.5, pytest.approx(math.sqrt(3))]
    assert found.measured.signals["leader"] == 1


@pytest.mark.parametrize("losses", [[], [math.nan], [-math.inf]])
def test_where_no_loss_is_finite_none_leads_and_a_note_says_it(losses: list[float]) -> None:
    found = led(losses, [math.inf, math.inf])
    assert found.sources == []
    assert found.weight == 1
    assert math.isnan(found.told[1])
    assert not {"leader", "score", "distance"} & {*found.measured.signals}
    assert {*found.measured.by_replica["leads"].values()} == {0.0}
    (note,) = found.notes
    assert note == "local: no replica of all has a finite loss at step 2, so none leads"


def test_of_equal_ones_the_lowest_rank_leads() -> None:
    found = led([2.0], [2.0, 2.0])
    assert found.sources == [0]
    assert math.isnan(found.told[1])  # a leader is no distance from itself
    assert led([3.0], [2.0, 2.0]).sources == [1]


def test_a_run_that_goes_on_with_more_processes_counts_their_leaders_too() -> None:
    assert led([3.0], [4.0, 5.0, 2.0], led=[4, 1]).led == [4, 1, 0, 1]
    assert led([3.0], [2.0], led=[4, 1, 0, 7]).led == [4, 2, 0, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_drawn_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    weight, leader = (torch.randn(999, generator=draw).to(dtype) for _ in range(2))
    wanted = torch.lerp(weight.float(), leader.float(), 0.3).to(dtype)
    model = nn.Linear(1, 1)
    program = trainc.compile(SPEC, model)
    (near,) = [action for action in program._machine.actions if action.name == "local near"]
    parameter = nn.Parameter(weight.clone())
    lead: Any = near.lead  # type: ignore[attr-defined]
    lead.of = Exchanged({"w": parameter}, dict, False)
    step: Any = SimpleNamespace(parameters={"w": parameter})
    lead.draw(step, {"w": leader}, 0.3)
    assert torch.equal(parameter.detach(), wanted)
