"""Local SGD and its relatives: replicas train on their own and exchange weights now and then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainc.compiler.constructs.distribute._average import Average, Exchanged
from trainc.compiler.constructs.distribute._base import Launched
from trainc.compiler.constructs.distribute._effects import (
    NEAR,
    OF_RULE,
    SIGNALS,
    START,
    STATE,
    WEIGHTS,
)
from trainc.compiler.constructs.distribute._leader import (
    Lead,
    MeetLeaders,
    Near,
    ScoreField,
    Strengths,
    both,
    span_of,
)
from trainc.compiler.constructs.distribute._membership import Membership, require_library
from trainc.compiler.constructs.distribute._outer import EXAMPLE, AgreedStart, Outer, OuterSgd, Rule
from trainc.dsl.reading.construct import Effect, Problem, RuleExplanation
from trainc.dsl.values.value_json import Call

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table

Replaced = Literal["average", "local"]
Part = Annotated[float, Field(ge=0, le=1)]
Parts = Part | tuple[Part, Part]
OF_LEADER = ("groups", "global_every", "pull", "prox", "score")


class Local(Launched):
    """Lets every replica train on data of its own, and exchanges weights between them every few steps.

    `torchrun --nproc-per-node 4 -m trainc run spec.train --out FOLDER` divides the one order of the data over four
    replicas without overlap, `batch` samples a step each, and saves all of them in one checkpoint (docs/processes.md).
    In a loop of your own, start several processes with torch.distributed, compile the same spec in each, give each its
    own batches, and leave `program.forward` as it is.

    The turns are after steps n, 2n, ... of `every n steps`; a step that is skipped keeps its turn. One process
    trains as without the clause and says so in a note. What becomes of the weights in a turn:

    `rule = average`: each selected parameter is the mean over all replicas, w <- (w_1 + ... + w_R) / R, the same bits
    on each. 16-bit weights are averaged in float32.

    `rule = outer(sgd(lr = 0.7, momentum = 0.9, nesterov = true))` is DiLoCo: an optimizer of turns takes delta
    = last agreed weights - mean as a gradient, and all go on from what it gives: m <- momentum m + delta, and
    agreed - lr (delta + momentum m), or agreed - lr m without `nesterov`. With lr 1 alone it is the average.
    Agreed on are first the weights at the start of the run; with a later `from`, or on from a run without the
    clause, the first turn averages.

    `rule = leader` is leader SGD: w <- w + pull (leader - w), where the leader is the replica with the lowest
    mean loss of its last steps, `score`, over the steps that there were; of equal ones that with the lowest rank.
    One whose mean is not finite never leads: where this is so of all, nothing is pulled, and a note says it.
    `groups` have leaders of their own, and every `global_every` turns the weights are drawn to the leader of all,
    too, after that of the group. After every step w <- w + prox / n (stored leader - w), where n is the number of
    steps between two of its turns; before the first turn the stored leaders are the weights at the start. `pull`
    and `prox` are [of groups, of all]. 16-bit weights are drawn in float32 and rounded: a change of less than half
    their last bit is lost, as those of a small `prox / n` are. The optimizer's state and running statistics stay
    with their replica, as published. The published program lets each process do as many steps as it can between
    two turns; here all do the same number, so that runs can be repeated.

    Between two turns the replicas differ, with `leader` always: each evaluates its own weights, and in a loop of
    your own saves and resumes its own checkpoint. What `trainc run` shows, and the model that other commands take
    from its folder, is the replica of rank 0: after a turn of `average` or `outer` it is that of all. Loss, batch,
    clock, signals and noise scales are those of a replica. A `when` rule or a batch policy must come to the same
    batch on all: let it read the clock, in `trainc run` evaluations, or what turns measure of all replicas, such as
    `distance`, which is the same on each. This is checked at every turn, as are the
    step and the tensors that are sent; plan and starting weights are compared before the first step. In a loop of
    your own a replica that stops leaves the others waiting until the timeout of the process group, or until its
    process ends; in `trainc run` all stop with it.

    `membership = torchft` lets replicas leave and join while others go on, by `average` or `outer`, in a loop of
    your own: each is one process, found through a lighthouse; docs/replicas.md says how they are started. The mean
    of a turn is over those that are there. A turn in which one is lost changes nothing, and a note says so. One that
    is behind waits for a turn, and goes on with weights, agreed weights, momenta, optimizer, rules and clock of
    another; what it had does not count in that turn. `replicas` is how many there were, 0 where a turn failed. In
    place of what is compared with fixed replicas, each turn compares plan, batch and what is sent, and one that
    differs from most leaves with an error. One alone has turns as several do: `outer` takes its step.

    `buffers = average` also averages the saved floating-point buffers, such as the running statistics of batch norm:
    means are then those of all data; variances lack what the means of the replicas differ by. With `leader` this is in
    the turns of all. `optimizer_state = average` averages the optimizer's tensors, such as momentum, but not its
    counters of steps. DistributedDataParallel and `mask` clauses are refused: averaged gradients and entries chosen
    by each replica do not fit weights that a replica trains on its own.

    A replica is a process, or several that FSDP2 shards it over, in a loop of your own: with a mesh of two axes,
    `init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))`, call `fully_shard(model,
    mesh=mesh["shard"])`. Then each process exchanges its shards with those that hold the same ones in the other
    replicas, and nothing is gathered. The loss and `score` are means over the replica's processes, `groups` counts
    replicas (of one machine: with processes on the same machines), and `buffers = average` is over all processes.
    Replicas are learned from the meshes of the parameters, and must be equal parts of all processes. One replica
    trains as without the clause and says so. The whole mesh (HSDP) is refused: it averages in every step.
    """

    cite: ClassVar = (
        "McMahan et al., Communication-Efficient Learning, AISTATS 2017, arXiv:1602.05629; Stich, Local SGD Converges"
        " Fast and Communicates Little, ICLR 2019, arXiv:1805.09767; leader: Teng et al., Leader Stochastic Gradient"
        " Descent, NeurIPS 2019, arXiv:1905.10395; outer: Douillard et al., DiLoCo, arXiv:2311.08105"
    )
    usage: ClassVar = "distribute local every 16 steps { rule = average }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = SIGNALS
    effects: ClassVar = (START, NEAR, WEIGHTS, STATE)
    joins: ClassVar[str] = "apart"
    rules: ClassVar = {
        "own-statistics": RuleExplanation(
            "Replicas that follow a leader keep running statistics of their own, such as those of batch norm.",
            "Weights are drawn to those of another replica, whose activations had other statistics.",
            "Write `buffers = local` to say that this is meant, or `buffers = average`.",
        )
    }

    rule: Rule = Field(
        default="average",
        description="what becomes of the weights in a turn: their mean, a step of an optimizer on the change of the"
        " mean, or a pull to the best replica",
    )
    groups: Literal["node"] | int | None = Field(
        default=None,
        description="with `leader`: replicas that have a leader of their own beside that of all: those on one machine"
        " (`node`), or so many neighbouring ones by rank. Default: none",
    )
    global_every: int | None = Field(
        default=None,
        ge=1,
        description="with `groups`: turns of groups from one turn of all to the next, which comes with the last of"
        " them. Default: 4",
    )
    pull: Parts | None = Field(
        default=None,
        description="with `leader`: the part of the way to a leader that weights go in a turn; for groups and all, or"
        " `[of groups, of all]`. Default: 0.1",
    )
    prox: Parts | None = Field(
        default=None,
        description="with `leader`: the part of the way to a stored leader that weights go over the steps between two"
        " turns; for groups and all, or `[of groups, of all]`. Default: 0.1",
    )
    score: ScoreField | None = Field(
        default=None,
        description="with `leader`: by what the best replica is found, such as `mean(loss, 16 steps)`. Default: the"
        " mean loss of as many steps as there are from turn to turn",
    )
    optimizer_state: Replaced = Field(
        default="local", description="whether the optimizer's state is averaged or left as it is"
    )
    buffers: Replaced | None = Field(
        default=None,
        description="whether saved floating-point buffers, such as running statistics, are averaged or left alone."
        " Default: `average`, with `leader` `local`",
    )

    membership: Membership = Field(
        default="fixed",
        description="whether the replicas are those that torch.distributed started together, or may leave and join"
        " while others go on, which torchft has them do",
    )

    @field_validator("rule")
    @classmethod
    def _outer_numbers(cls, value: str | Call) -> str | Call:
        if isinstance(value, Call):
            OuterSgd.of(value)
        return value

    @field_validator(*OF_LEADER)
    @classmethod
    def _needs_leader(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("rule", "leader") != "leader":
            raise ValueError(
                "no other rule than `leader` reads it: write `rule = leader`, or remove it"
            )
        return value

    @field_validator("groups")
    @classmethod
    def _of_several(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 2:
            raise ValueError("expected 2 replicas or more in a group, or `node`")
        return value

    @field_validator("global_every", "pull", "prox")
    @classmethod
    def _needs_groups(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("groups", "node") is not None or value is None:
            return value
        if info.field_name == "global_every":
            raise ValueError(
                "without `groups` every turn is one of all: write `groups`, or remove it"
            )
        if isinstance(value, tuple):
            raise ValueError(
                f"without `groups` there is one leader: write one number, such as {value[1]:g}, or `groups`"
            )
        return value

    @field_validator("score")
    @classmethod
    def _of_the_loss(cls, value: Call | None) -> Call | None:
        if value is not None:
            span_of(value)
        return value

    @field_validator("optimizer_state")
    @classmethod
    def _follows_no_leader(cls, value: Replaced, info: ValidationInfo) -> Replaced:
        if value == "average" and info.data.get("rule") == "leader":
            raise ValueError(
                "with `rule = leader` each replica keeps its optimizer's state: write `local`, or another rule"
            )
        return value

    @field_validator("membership")
    @classmethod
    def _has_no_ranks(cls, value: str, info: ValidationInfo) -> str:
        if value == "torchft" and info.data.get("rule") == "leader":
            raise ValueError(
                "with `rule = leader` the replicas are `fixed`: groups are of ranks, and leaders are kept from turn to"
                " turn. Write `rule = average` or `outer(...)`, or `membership = fixed`"
            )
        return value

    @property
    def averages_buffers(self) -> bool:
        """Whether saved buffers become means."""
        return self.buffers == "average" or (self.buffers is None and self.rule != "leader")

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect, which depends on its rule."""
        if effect == STATE:
            return self.optimizer_state == "average"
        if effect == NEAR:
            return self.rule == "leader"
        return effect != START or self.rule != "average"

    def describe(self, effect: Effect) -> str:
        """Return what a turn does with the weights by this rule."""
        if effect != WEIGHTS:
            return effect.action
        words = {
            "average": "average the weights over replicas",
            "leader": "pull the weights to leaders",
        }
        return words.get(str(self.rule), f"step the agreed weights by {self.rule}")

    def unmeasured_reason(self, signal: str) -> tuple[str, str] | None:
        """Say which signals need another rule."""
        own, of = (
            self.rule.function if isinstance(self.rule, Call) else self.rule,
            OF_RULE.get(signal),
        )
        if of in (None, own):
            return None
        example = f"outer({EXAMPLE})" if of == "outer" else of
        return f"with `rule = {self.rule}` there is none", f"write `rule = {example}`"

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return pictures of the replicas: their losses, how far they are from each other, and what a turn did."""
        from trainc.compiler.constructs.distribute._pictures import replica_panels

        return replica_panels(clauses, runs)

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterable[Table]:
        """Return the table of the replicas."""
        from trainc.compiler.constructs.distribute._pictures import replica_tables

        return replica_tables(label, records)

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report frozen parameters, the same on all replicas, and running statistics beside weights of a leader."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = f"`{frozen[0]}` is frozen, so all replicas have the same values of it"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        norms = [module.name for module in bound.inventory.modules if module.batch_statistics]
        if norms and self.rule == "leader" and self.buffers is None:
            yield Problem(
                "own-statistics",
                f"`{norms[0]}` keeps running statistics of its own replica, and weights are drawn to those of others",
                field="rule",
                help="write `buffers = local` to say that this is meant, or `buffers = average`",
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Exchange in turns after the steps at which the clause's gate fires."""
        parameters = {entry.name: to.tensor(entry.name) for entry in to.parameters()}
        buffers = to.buffers() if self.averages_buffers else dict
        of = Exchanged(parameters, buffers, self.optimizer_state == "average")
        elastic = self.membership != "fixed"
        require_library(self.membership)
        if self.rule == "average":
            to.exchange(Average(to.label, of), elastic=elastic)
        elif isinstance(self.rule, Call):
            outer = Outer(to.label, of, OuterSgd.of(self.rule))
            to.action(AgreedStart(outer))
            to.exchange(outer, elastic=elastic)
        else:
            self._lead(to, of)

    def _lead(self, to: Lowering, of: Exchanged) -> None:
        """Add what finds leaders in turns, and what acts between these."""
        from trainc.runtime.schedule.gate import Gate
        from trainc.runtime.schedule.time_span import TimeSpan

        gate = to.gate() or Gate()
        period = gate.every.amount if gate.every else 1.0
        turns = 1 if self.groups is None else self.global_every or 4
        steps = math.ceil(period) if self.score is None else int(span_of(self.score).amount)
        strengths = Strengths(both(self.pull), both(self.prox), (period, period * turns))
        lead = Lead(to.label, of, strengths, self.groups, steps)
        to.exchange(lead)
        lead.turns_of_all = Gate(gate.start, gate.stop, TimeSpan(period * turns, "steps"))
        to.action(MeetLeaders(lead, gate.span()))
        to.action(Near(lead, gate.span()))

    def reference(self, replicas: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what a turn by `average` makes of the tensors of all replicas, by name: their means."""
        import torch

        return {name: torch.stack([one[name] for one in replicas]).mean(0) for name in replicas[0]}
