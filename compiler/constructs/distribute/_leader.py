"""Leader SGD: replicas are drawn to the best of their group and of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from trainc.compiler.constructs.distribute._average import Exchanged, Turn, length, squared_distance
from trainc.dsl.reading.field_types import call_of
from trainc.dsl.values.functions import Function
from trainc.dsl.values.value_json import Call, Name, Quantity
from trainc.runtime.step.action import Action, ActionState, ClauseFailed, Phase
from trainc.runtime.storage.form import Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.dsl.values.value_json import Duration
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.exchange import Measured
    from trainc.runtime.step.record import Step

SCORES = {"mean": Function({"x": "number", "over": "duration"}, 2, 2)}
ScoreField = Annotated[Call, call_of("score", SCORES, "mean(loss, 16 steps)")]
"""What leaders are chosen by."""


def span_of(score: Call) -> Duration:
    """Return over how long a score's mean runs; raises ValueError for a mean of anything but the loss."""
    given = dict(zip(("x", "over"), score.args, strict=False)) | dict(score.kwargs)
    if given["x"] != Name("loss"):
        raise ValueError(
            f"expected the loss of the process, as in `mean(loss, 16 steps)`, found `{given['x']}`"
        )
    over = given["over"]
    assert isinstance(over, Quantity)
    if over.duration.unit != "steps" or over.duration.amount < 1:
        raise ValueError(f"expected 1 step or more, as in `mean(loss, 16 steps)`, found `{over}`")
    return over.duration


def both(value: Any) -> tuple[float, float]:
    """Return the numbers of groups and of all, of a field that may have one for both; 0.1 where it has none."""
    if isinstance(value, tuple):
        return value
    number = 0.1 if value is None else float(value)
    return number, number


@dataclass(frozen=True)
class Strengths:
    """How far weights are drawn to the leader of their group and to that of all."""

    pull: tuple[float, float]
    """At a turn: w <- w + pull (leader - w)."""
    prox: tuple[float, float]
    """Over the steps of a period together: after each, w <- w + prox / period (stored leader - w)."""
    periods: tuple[float, float]
    """Steps from one turn to the next."""


class Lead(Turn):
    """Phase 11: find the leaders, keep copies of them, and pull the weights there.

    A leader is the replica with the lowest mean loss of its last steps, of equal ones that of the lowest rank; one
    whose mean is not finite never leads. `groups` is the number of neighbouring replicas in a group, `node` for those
    of one machine, or None. Where one group has all, its leader is that of all, and the turns of groups are left out.
    """

    kept: ClassVar = ("of_group", "of_all")
    figures: tuple[str, ...] = (*Turn.figures, "led")
    of_group: dict[str, Tensor]
    of_all: dict[str, Tensor]
    """The leaders of the last turns, until then the weights at the start."""

    def __init__(
        self,
        label: str,
        of: Exchanged,
        strengths: Strengths,
        groups: int | str | None,
        steps: int,
    ) -> None:
        super().__init__(label, of)
        self.strengths, self.groups, self.steps = strengths, groups, steps
        self.turns_of_all: Gate | None = None
        self.losses: list[float] = []
        """Those of the last steps that were taken, at most `steps` of them."""
        self.led: list[int] = []
        """The turns in which each replica was the leader of all."""
        self._met = False
        self._part: ReplicaGroup | None = None
        self._group_of: list[int] = []
        """The lowest rank in the group of each replica."""

    @property
    def score(self) -> float:
        """The mean of the losses that there are; infinite without one, and where it is not finite."""
        mean = sum(self.losses) / len(self.losses) if self.losses else math.inf
        return mean if math.isfinite(mean) else math.inf

    def begin(self, step: Step, replicas: ReplicaGroup) -> None:
        """Form the groups, and keep the weights of now unless leaders are kept already."""
        if not self._met:
            self._form_groups(replicas)
            self._met = True
        if not self.of_all:
            self.of_all = self.copied(step)
        if self._part is not None and not self.of_group:
            self.of_group = self.copied(step)

    def _form_groups(self, replicas: ReplicaGroup) -> None:
        if self.groups is None:
            return
        if isinstance(self.groups, int):
            if replicas.size % self.groups:
                raise ClauseFailed(
                    self.label,
                    f"{replicas.size} replicas cannot be divided into groups of {self.groups}: write a number that"
                    f" divides {replicas.size}, or start another number of them",
                    "groups",
                )
            part = replicas.split(self.groups)
        else:
            part = replicas.split_by_machine()
        if part.size < replicas.size:
            self._part = part
            lowest = replicas.gather_rows([min(part.ranks_in(replicas))])
            self._group_of = [int(rank) for rank in lowest[:, 0]]

    def turn(self, step: Step, replicas: ReplicaGroup) -> Measured | None:
        self.begin(step, replicas)
        of_all = self.turns_of_all is None or self.turns_of_all.fires(step.clock_after())
        if self._part is None and not of_all:
            return None
        scores = replicas.gather_rows([self.score])[:, 0].tolist()
        leads, distance = dict.fromkeys(range(replicas.size), 0.0), math.nan
        signals: dict[str, float] = {}
        if self._part is not None:
            leaders = {group: self._best(scores, group) for group in {*self._group_of}}
            leads |= {best: 1.0 for best in leaders.values() if best is not None}
            ranks = self._part.ranks_in(replicas)
            if (best := leaders[ranks[0]]) is None:
                self._say_none_leads(step, "of the group")
            else:
                place, pull = ranks.index(best), self.strengths.pull[0]
                self.of_group, distance = self._follow(step, self._part, place, pull)
        if of_all:
            best = self._best(scores)
            if best is None:
                self._say_none_leads(step, "of all")
            else:
                self.of_all, far = self._follow(step, replicas, best, self.strengths.pull[1])
                distance = far if self._part is None else distance
                self.led += [0] * (replicas.size - len(self.led))
                self.led[best] += 1
                leads[best], signals = 2.0, {"leader": float(best), "score": scores[best]}
            self.average_the_rest(step, replicas)
        found = self.measured(step, replicas, distance, signals)
        by_replica = {"score": dict(enumerate(scores)), "leads": leads}
        return replace(found, by_replica={**found.by_replica, **by_replica})

    def _best(self, scores: Sequence[float], group: int | None = None) -> int | None:
        """Return the rank of the lowest score, of all or of a group; None where no score is finite."""
        of = [r for r in range(len(scores)) if group is None or self._group_of[r] == group]
        return min(
            (r for r in of if math.isfinite(scores[r])), key=scores.__getitem__, default=None
        )

    def _say_none_leads(self, step: Step, of: str) -> None:
        step.notes.append(
            f"{self.name}: no replica {of} has a finite loss at step {step.clock.steps + 1}, so none leads"
        )

    def _follow(
        self, step: Step, group: ReplicaGroup, source: int, pull: float
    ) -> tuple[dict[str, Tensor], float]:
        """Pull the weights to those of a rank of a group; return these, and how far off they were.

        The leader itself has no distance: NaN.
        """
        leader, weights = self.copied(step), self.of.weights(step)
        group.copy_from(source, [*leader.values()])
        squares = [squared_distance(weights[name], one) for name, one in leader.items()]
        distance = length(squares, [*weights.values()])
        self.draw(step, leader, pull)
        return leader, math.nan if group.rank == source else distance

    def draw(self, step: Step, leader: Mapping[str, Tensor], strength: float) -> None:
        """Move the weights a part of the way to a leader's."""
        if strength:
            for name, weight in self.of.weights(step).items():
                if name in leader:
                    weight.lerp_(leader[name], strength)

    def state_dict(self) -> ActionState:
        import torch

        losses = {"losses": torch.tensor(self.losses, dtype=torch.float64)} if self.losses else {}
        return super().state_dict() | losses

    def state_form(self) -> Form:
        form = super().state_form()
        assert isinstance(form, Record)
        return Record(optional={**form.optional, "losses": Values((None,), "float64")})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = state["losses"].tolist()[-self.steps :] if "losses" in state else []
        super().load_state_dict({key: one for key, one in state.items() if key != "losses"})

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        line = super().load_compatible({k: one for k, one in state.items() if k != "losses"})
        self.losses = state["losses"].tolist()[-self.steps :] if "losses" in state else []
        return line

    def summary(self) -> str | None:
        line = super().summary()
        if not sum(self.led):
            return line
        best = max(range(len(self.led)), key=self.led.__getitem__)
        return f"{line}; replica {best} led all most often, in {self.led[best]} of {sum(self.led)} turns"


class MeetLeaders(Action):
    """Phase 7: forms the groups before anything is updated, and keeps the weights at the start."""

    phase = Phase.REDUCE
    reads_shards: ClassVar = True

    def __init__(self, lead: Lead, gate: Gate | None) -> None:
        self.name, self.lead, self.gate = f"{lead.label} start", lead, gate

    def run(self, step: Step) -> None:
        if step.exchange_group is not None:
            self.lead.begin(step, step.exchange_group)


class Near(Action):
    """Phase 10, after every step: draws the weights to the stored leaders, and notes the loss of the step."""

    phase = Phase.DELTAS
    reads_shards: ClassVar = True

    def __init__(self, lead: Lead, gate: Gate | None) -> None:
        self.name, self.lead, self.gate = f"{lead.label} near", lead, gate

    def run(self, step: Step) -> None:
        if step.exchange_group is None:
            return
        lead, strengths = self.lead, self.lead.strengths
        lead.losses = [*lead.losses, step.loss][-lead.steps :]
        lead.draw(step, lead.of_all, strengths.prox[1] / strengths.periods[1])
        lead.draw(step, lead.of_group, strengths.prox[0] / strengths.periods[0])
