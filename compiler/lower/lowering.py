"""The mechanisms that a construct may ask for, collected in the lowered method.

A construct's `lower(to)` calls methods of `Lowering`; it never touches the model, the graph or another construct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import Tensor

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.errors import RuleRefused
from trainc.compiler.lower.companions import CompanionAccess
from trainc.compiler.lower.forward_access import ForwardAccess
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.lower.statistics import StatisticAccess
from trainc.compiler.lower.step_access import StepAccess
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.losses import LossPart
from trainc.compiler.method.lowered_method import (
    LoweredMethod,
    MeasuredWeight,
    OptimizerConstruct,
    OptimizerPart,
    Scheduled,
)
from trainc.compiler.model.batch_statistics import depend_on_processes
from trainc.dsl.values.value_json import Expr
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.exchange import Exchange
from trainc.runtime.step.gradients import GradientTransform, sharded_gradient
from trainc.runtime.step.optimizer import LrFactor, OptionValue, OptionValues, parts_of
from trainc.runtime.step.updates import UpdateTransform


class Lowering(ForwardAccess, StatisticAccess, CompanionAccess, StepAccess):
    """One clause's access to the mechanisms: what it may ask for, beside its selection and its times."""

    # The loss, and what reads the passes

    def loss(self, loss: Loss, weight: Expr | None = None) -> None:
        """Add a loss to that of the whole run, the sum of all that clauses declare, each times its `weight`."""
        self.refuse_times("the loss holds for the whole run", "from", "until", "every")
        schedule = None if weight is None else self.schedule(weight)
        if schedule is not None:
            self.show("weight", schedule)
        for name, number in loss.numbers.items():
            self.show(name, number)
            loss.is_cross_entropy = False  # operators take its numbers as constants
            if loss.chunks is not None:
                raise ValueError(f"`chunks` needs one number in the whole run as `{name}`")
        if loss.chunks is not None:
            if self._method.loss_parts:
                raise ValueError(
                    "`chunks` is for the first loss of a sum: remove it, or write this clause before other losses"
                )
            self._method.rewrite.chunks = loss.chunks
        self._method.loss_parts.append(LossPart(self.label, loss, schedule))

    # The optimizer and its parameters

    def lr_factor(self, unit: str, parameters: Iterable[str], holds: bool = False) -> LrFactor:
        """Return a factor of this clause on the learning rate of `parameters`; it starts at 1.

        Outside `from` and `until` the rates are unchanged, whatever the factor. With `holds` an action of the clause
        sets the factor at the clause's times, and what it set last holds.
        """
        window = None
        if not holds:
            self.refuse_times(f"a factor of `{self.label}` holds between its times", "every")
            window = self._gate_of(None)
            self._times_obeyed = True
        lr_factor = LrFactor(self.label, unit, gate=window)
        for name in parameters:
            self._method.lr_factors.setdefault(name, []).append(lr_factor)
        return lr_factor

    def show(self, name: str, schedule: Scheduled) -> None:
        """Show a number of this clause over the run, in the plan's table of schedules."""
        self._method.schedules[f"{self.label} {name}"] = schedule

    def option_factor(
        self,
        of: Literal["weight_decay", "half_life"],
        unit: str,
        parameters: Iterable[str],
        holds: bool = False,
    ) -> LrFactor:
        """Return a factor of this clause on weight decay, or on the half-life of Adam's second moment; it starts at 1.

        The half-life is the number of steps in which a squared gradient loses half of its weight: a factor f takes
        the last of the betas to the power 1 / f. `holds` is that of `lr_factor`.
        """
        if not holds:
            self._times_obeyed = True
            self.refuse_times(f"`{self.label}` holds for the whole run", "from", "until", "every")
        factor = LrFactor(self.label, unit, of=of)
        for name in parameters:
            self._method.option_factors.setdefault(name, []).append(factor)
        return factor

    def optimizer_options(self, option: str) -> Callable[[], dict[str, OptionValue]]:
        """Return a function that gives an option of all optimized parameters by name, once every clause is lowered."""
        method = self._method

        def found() -> dict[str, OptionValue]:
            own = {n: o for part in method.optimizers for n, o in part.options.items()}
            return {n: o[option] for n, o in own.items() if option in o and n not in method.frozen}

        return found

    def base_rate(self) -> Scheduled:
        """Return the learning rate as a function of the clock, without factors: the highest of all parameters.

        The function raises ValueError in a spec without an optimizer.
        """
        options = self.optimizer_options("lr")

        def rate(clock: Clock) -> float:
            rates = {id(one): one for value in options().values() for one in parts_of(value)}
            found = [one.at(clock) for one in rates.values()]
            return next((x for x in found if x != x), max(found))

        return rate

    def freeze(self, names: Iterable[str], *, rest: bool = False) -> None:
        """Leave parameters untrained in the whole run, also before `from`.

        With `rest` they are those that the clause leaves out, and its times are of what it does to the others.
        """
        if not rest:
            self.refuse_times("a frozen parameter is frozen in the whole run", "until", "every")
        given = set(names)
        self._method.frozen |= given
        self._method.frozen_by.setdefault(self.label, set()).update(given)

    def optimizer(
        self,
        construct: OptimizerConstruct,
        options: dict[str, OptionValues],
        *,
        steady: bool = False,
        has_modes: bool = False,
    ) -> None:
        """Claim the selected parameters for a torch optimizer, with these options of each: `lr`, `weight_decay`.

        `steady`: the rate is one number, which the optimizer may change by itself. `has_modes`: it has `train()` and
        `eval()`, which puts other weights in place for evaluation.
        """
        clause = self.clause
        self.refuse_times("an optimizer trains in every step", "from", "until", "every")
        self._method.optimizers.append(
            OptimizerPart(clause.label, clause.targets, clause.span, construct, options)
        )
        part = self._method.optimizers[-1]
        part.steady, part.has_modes = steady, has_modes

    def closure(
        self,
        construct: OptimizerConstruct,
        options: dict[str, OptionValues],
        **known: bool,
    ) -> None:
        """Claim the selected parameters for an optimizer that asks for loss and gradients several times in a step.

        Its `step` is called with a function that returns the step's loss at the weights of now and leaves the
        gradients in `.grad`. Raises ValueError where a parameter is sharded over processes.
        """
        self._refuse_shards("after")
        self.optimizer(construct, options, **known)
        self._method.optimizers[-1].asks = True

    def compile_modules(self) -> None:
        """Let torch compile the modules of the model, for the passes that `step` and `loss` of a program run."""
        self._method.compiled = self._method.rewrite.compiled = True

    def replay_passes(self) -> None:
        """Let passes of step graphs be recorded and replayed as CUDA graphs, in what `step` of a program runs."""
        self._method.replayed = True

    def clip(self, limit: float) -> None:
        """Scale the gradients of all optimizers down to an L2 norm of at most `limit`, all together, in every step."""
        self.refuse_times("the gradients of the whole run are clipped", "from", "until", "every")
        self._method.clip = limit

    def gradient(self, transform: GradientTransform, parameters: Iterable[str]) -> None:
        """Change the gradients of `parameters` before they are clipped, when the clause's gate is open.

        Raises ValueError for a parameter whose gradient will be sparse, and for one that is sharded over processes
        unless the transform is elementwise or takes shards.
        """
        transform.parameters = tuple(parameters)
        for name in transform.parameters:
            if self.has_sparse_gradient(name):
                raise ValueError(
                    f"the gradient of `{name}` is sparse, and only dense ones can be changed: build its layer with"
                    " `sparse=False`, or exclude the parameter from `on`"
                )
            if self.is_sharded(name) and not (transform.elementwise or transform.takes_shards):
                raise ValueError(sharded_gradient(name))
        self.action(transform)

    def delta(self, transform: UpdateTransform, parameters: Iterable[str]) -> None:
        """Change what the optimizer adds to `parameters`, before it is added, when the clause's gate is open."""
        transform.parameters = tuple(parameters)
        self.action(transform)

    def measures(self, weight: str, parts: Mapping[str, str], reason: str) -> None:
        """Show in the plan that the clause measures the parts of a weight, each with its size, and why it has these."""
        self._method.measured.append(
            MeasuredWeight(self.label, weight, tuple(parts), tuple(parts.values()), reason)
        )

    # Several processes

    def exchange(self, action: Exchange, *, elastic: bool = False) -> None:
        """Give an action a turn with the other replicas after the steps at which the clause's gate fires.

        `elastic`: replicas may leave and join. The action is then an ElasticExchange.

        Raises ValueError for a time that is not counted in steps: replicas may count different numbers of the rest, and
        then one would wait for the others.
        """
        self.action(action)
        self._refuse_switch("replicas meet in turns, for which all of them wait")
        for bound in (
            (action.gate.start, action.gate.stop, action.gate.every) if action.gate else ()
        ):
            if bound is not None and bound.unit != "steps":
                raise ValueError(
                    f"replicas meet after a number of steps, and `{bound}` may be another number of steps on each:"
                    " write `from`, `until` and `every` in steps"
                )
        self._refuse_joined()
        self._method.exchanges.append(self.label)
        if elastic:
            self._method.elastic.add(self.label)

    def join(self, *, shards: bool = False) -> None:
        """Let `trainc run` join the processes that a launcher started: see compiler/method/joining.py.

        `shards`: each of them then holds a part of every parameter, and clauses that need whole ones are refused.
        """
        self.refuse_times("processes are joined for the whole run", "from", "until", "every")
        self._refuse_joined()
        self._method.joined_by, self._method.shards = self.label, shards
        self._method.process_dependence.update(depend_on_processes(self.model))

    def _refuse_switch(self, reason: str) -> None:
        """Raise RuleRefused where a rule opens or closes the clause."""
        if self.label in self._context.switches.names:
            raise RuleRefused(f"{reason}: no rule can open or close `{self.label}`", self.label)

    def _refuse_joined(self) -> None:
        """Raise ValueError where another clause says already how processes train together."""
        known = *self._method.exchanges, self._method.joined_by
        others = [label for label in known if label and label != self.label]
        if others:
            raise ValueError(
                f"`{others[0]}` says already how processes train together: remove one of the two clauses. Replicas of"
                " several processes each, which the parameters are sharded over, are for a loop of your own"
            )

    def buffers(self) -> Callable[[], dict[str, Tensor]]:
        """Return a function that gives the saved floating-point buffers of the model, as they are when it is called."""
        model = self.model

        def found() -> dict[str, Tensor]:
            saved = model.state_dict(keep_vars=True)
            held = ((name, saved.get(name)) for name, _ in model.named_buffers())
            return {name: b for name, b in held if b is not None and b.is_floating_point()}

        return found


def lower(clause: BoundClause, context: LoweringContext, method: LoweredMethod) -> None:
    """Add what a clause asks for to the method; raises ValueError if it has a time that nothing of it obeys."""
    to = Lowering(clause, context, method)
    clause.construct.lower(to)
    if not to._times_obeyed:
        reason = f"`{to.label}` is the same in the whole run: nothing that it does can begin, end or repeat"
        to.refuse_times(reason, "from", "until", "every")
