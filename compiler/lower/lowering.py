"""The mechanisms that a construct may ask for, collected in the lowered method.

A construct's `lower(to)` calls methods of `Lowering`; it never touches the model, the graph or another construct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.example_units import ExampleUnits
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import (
    CalibrationPart,
    Inputs,
    LoweredMethod,
    OptimizerConstruct,
    OptimizerPart,
    PenaltyTerm,
    Scheduled,
)
from trainc.compiler.method.sites import LayerSite, MeasuredSite, NoiseSite, NormSite, Pairing
from trainc.compiler.model.inventory import ModuleEntry
from trainc.dsl.values.value_json import Duration, Expr, Number
from trainc.runtime.mask.mask_actions import (
    Chooser,
    ChooseZeros,
    WriteBack,
    ZeroGradients,
    ZeroWeights,
)
from trainc.runtime.mask.update_mask import SelectedEntries, ZeroMask
from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, check_phase
from trainc.runtime.step.around import Around
from trainc.runtime.step.exchange import Exchange
from trainc.runtime.step.optimizer import LrFactor
from trainc.runtime.step.updates import UpdateTransform


class Lowering(ClauseAccess):
    """One clause's access to the mechanisms: what it may ask for, beside its selection and its times."""

    def loss(self, loss: Loss) -> None:
        """Declare the loss of the whole run."""
        self.refuse_times("the loss holds for the whole run", "from", "until", "every")
        self._method.loss = loss

    def measure(self, site: MeasuredSite) -> None:
        """Measure per-example squared gradient norms of a layer in every step."""
        rewrite = self._method.rewrite
        known = next((one for one in rewrite.measured if one.module == site.module), None)
        if isinstance(site, LayerSite):
            if known is None:
                rewrite.layers.append(site)
            return
        if isinstance(known, NormSite):
            rewrite.norms.remove(known)
            gradients = site.per_example_gradients or known.per_example_gradients
            site = replace(site, per_example_gradients=gradients)
        rewrite.norms.append(site)

    def example_units(self, units: ExampleUnits | None) -> None:
        """Set what one example is; raises ValueError when another clause sets something else."""
        rewrite = self._method.rewrite
        if rewrite.measured and rewrite.example_units != units:
            raise ValueError(
                "two clauses define `example` differently, but a program supports one definition: give both the same"
                " `example`, `separator`, `method` and `group`"
            )
        rewrite.example_units = units

    def ghosts(self, names: Iterable[str]) -> None:
        """Let layers that normalize over the batch normalize over each group of examples instead."""
        self._method.rewrite.ghosts = list(names)
        if self._method.rewrite.ghosts:
            reason = f"`{self.label}` changes how layers normalize, in the whole run"
            self.refuse_times(reason, "from", "until", "every")

    def measure_batch_gradients(self, names: Iterable[str], running: bool) -> None:
        """Measure the squared norm of each micro-batch's gradient; with `running`, of the replica's sum so far."""
        for name in names:
            if self._method.batch_gradients.setdefault(name, running) != running:
                raise ValueError(
                    f"another clause measures `{name}` with another method: write `method = micro_batch` in both, or"
                    " `method = replica` in both"
                )

    def calibrate(self, every: Duration, examples: int) -> None:
        """Now and then between `from` and `until`, measure every parameter on a few examples, one by one."""
        self.refuse_times(f"calibrations of `{self.label}` have a period of their own", "every")
        gate = self._context.gate(self.clause.start, self.clause.stop, every)
        self._method.calibrations.append(CalibrationPart(self.label, gate, examples))

    def noise(
        self, module: ModuleEntry, sigma: Expr, share: Literal["token", "none"] = "token"
    ) -> None:
        """Multiply a layer's output by `1 + sigma * normal`, drawn per (view, example, channel).

        While the clause's gate is closed the layer runs as it is.
        """
        site = NoiseSite(module.name, len(self._method.rewrite.noises), share, self.gate())
        self._method.rewrite.noises.append(site)
        self._method.scalars[site.scalar] = self.while_open(self.schedule(sigma, module.place))

    def pair(self, distance: Literal["mse", "kl"], weight: Expr) -> None:
        """Pass every example twice and add `weight` times the distance of the outputs to the loss.

        While the clause's gate is closed examples pass once, and the metric of the distance is 0.
        """
        pairing = Pairing(distance, self.label, self.gate())
        self._method.rewrite.pairing = pairing
        self._method.scalars[pairing.weight] = self.while_open(self.schedule(weight))

    def penalty(
        self,
        value: Callable[[Inputs, Inputs], Tensor],
        parameters: Iterable[str],
        scalars: Mapping[str, Scheduled],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Add a loss term over parameters; scheduled numbers and constants reach it as named tensors.

        While the clause's gate is closed the term is not computed, and its metric is 0.
        """
        self._method.penalties[self.label] = PenaltyTerm(value, tuple(parameters), self.gate())
        self._method.scalars.update({n: self.while_open(value) for n, value in scalars.items()})
        self._method.tensors.update(tensors)

    def lr_factor(self, unit: str, parameters: Iterable[str], holds: bool = False) -> LrFactor:
        """Return a factor of this clause on the learning rate of `parameters`; it starts at 1.

        Outside `from` and `until` the rates are unchanged, whatever the factor. With `holds` an action of the clause
        sets the factor at the clause's times, and what it set last holds.
        """
        window = None
        if not holds:
            self.refuse_times(f"a factor of `{self.label}` holds between its times", "every")
            bounds = (self.clause.start, self.clause.stop, None)
            window = self._context.gate(*bounds) if any(bounds) else None
            self._times_obeyed = True
        lr_factor = LrFactor(self.label, unit, gate=window)
        for name in parameters:
            self._method.lr_factors.setdefault(name, []).append(lr_factor)
        return lr_factor

    def select_entries(self, sizes: Mapping[str, int]) -> list[SelectedEntries]:
        """Let the optimizer train selected entries of parameters: how many of each, 0 where the choice decides.

        They are chosen once, so that `until` and `every` are errors.
        """
        for name in sizes:
            reason = f"the entries of `{name}` that train are chosen once, for the rest of the run"
            self.refuse_times(reason, "until", "every")
        selected = {n: SelectedEntries(n, self.tensor(n), size) for n, size in sizes.items()}
        self._method.masks.update(selected)
        self.action(WriteBack(self.label, selected.values()))
        return [*selected.values()]

    def mask(
        self, names: Iterable[str], choose: Chooser, density: Expr, *, together: bool = False
    ) -> None:
        """Train a fraction of the entries of parameters and keep the others at zero; chosen at the clause's times.

        `choose(step, fraction)` runs before the forward pass, at `from` and again `every`. With `together` the fraction
        is of all the parameters, which only the plan reads.
        """
        fraction = self.schedule(density)
        text = f"{fraction(Clock()):.6g}" if isinstance(density, Number) else str(density)
        shown = f"density {text}{' of all' * together}"
        masks = {name: ZeroMask(name, self.tensor(name), shown) for name in names}
        self._method.masks.update(masks)
        self._method.schedules[f"{self.label} density"] = fraction
        setting, window = self.clause.construct.model_dump_json(), self.gate() or Gate()
        self.action(ChooseZeros(self.label, masks, choose, fraction, window, setting))
        self.action(ZeroGradients(self.label, masks.values()))
        self.action(ZeroWeights(self.label, masks.values()))

    def freeze(self, names: Iterable[str]) -> None:
        """Leave parameters untrained in the whole run, also before `from`."""
        self.refuse_times("a frozen parameter is frozen in the whole run", "until", "every")
        self._method.frozen.update(names)

    def optimizer(
        self, construct: OptimizerConstruct, base: Scheduled, decay: dict[str, float]
    ) -> None:
        """Claim the selected parameters for a torch optimizer, at the rate `base` and these decays by name."""
        clause = self.clause
        self.refuse_times("an optimizer trains in every step", "from", "until", "every")
        self._method.optimizers.append(
            OptimizerPart(clause.label, clause.targets, clause.span, construct, base, decay)
        )

    def delta(self, transform: UpdateTransform, parameters: Iterable[str]) -> None:
        """Change what the optimizer adds to `parameters`, before it is added, when the clause's gate is open."""
        transform.parameters = tuple(parameters)
        self.action(transform)

    def around(self, hook: Around) -> None:
        """Surround the passes of a step, when the clause's gate is open; `hook` may ask for the step's gradients.

        Raises ValueError where a parameter is sharded over processes.
        """
        for name in (entry.name for entry in self.inventory.parameters):
            if is_sharded(self.tensor(name)):
                raise ValueError(
                    f"it needs gradients before the step's passes, and those of `{name}`, which is sharded over"
                    " processes (FSDP2), are not averaged there. Use DistributedDataParallel, or remove the clause"
                )
        self.action(hook)

    def action(self, action: Action) -> None:
        """Run an action in every step, in its phase, when the clause's gate is open.

        Raises ValueError for the phases `forward` and `backward`, in which a step runs no actions.
        """
        check_phase(action)
        if action.gate is None:
            action.gate = self.gate()
        self._method.actions.append(action)

    def exchange(self, action: Exchange) -> None:
        """Give an action a turn with the other replicas after the steps at which the clause's gate fires.

        Raises ValueError for a time that is not counted in steps: replicas may count different numbers of the rest, and
        then one would wait for the others.
        """
        self.action(action)
        for bound in (
            (action.gate.start, action.gate.stop, action.gate.every) if action.gate else ()
        ):
            if bound is not None and bound.unit != "steps":
                raise ValueError(
                    f"replicas meet after a number of steps, and `{bound}` may be another number of steps on each:"
                    " write `from`, `until` and `every` in steps"
                )
        self._method.exchanges.append(self.label)

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
