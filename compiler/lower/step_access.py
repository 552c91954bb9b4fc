"""The mechanisms for what a step does besides its passes: actions, what surrounds the passes, and masks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from trainc.compiler.errors import FieldError
from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.compiler.structure.computed_weights import refuse_lost_zeros
from trainc.dsl.values.value_json import Expr
from trainc.runtime.mask.choose_entries import ChooseEntries
from trainc.runtime.mask.entry_choice import Choice
from trainc.runtime.mask.mask_actions import (
    Chooser,
    ChooseZeros,
    WriteBack,
    ZeroGradients,
    ZeroWeights,
)
from trainc.runtime.mask.scores import Score, SummedScores
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.mask.update_mask import TrainedEntries, masked_shard
from trainc.runtime.mask.zero_mask import ZeroMask
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import Action, check_phase
from trainc.runtime.step.around import Around
from trainc.runtime.step.batches import BatchTransform
from trainc.runtime.step.gradients import Paused
from trainc.runtime.storage.random_streams import derive_seed


class StepAccess(ClauseAccess):
    """One clause's access to the phases of a step."""

    # The step

    def batch(self, transform: BatchTransform) -> None:
        """Change inputs and targets of each micro-batch before its first pass, when the clause's gate is open."""
        self.action(transform)

    def around(self, hook: Around) -> None:
        """Surround the passes of a step, when the clause's gate is open; `hook` may ask for the step's gradients.

        Raises ValueError where a parameter is sharded over processes, unless the hook takes shards.
        """
        if not hook.takes_shards:
            self._refuse_shards("before")
        self.action(hook)

    def action(self, action: Action) -> None:
        """Run an action in every step, in its phase, when the clause's gate is open.

        One without a `name` gets the clause's label; what has state in a checkpoint needs a name of its own there.
        Raises ValueError for the phases `forward` and `backward`, in which a step runs no actions.
        """
        if not hasattr(action, "name"):
            action.name = self.label
        check_phase(action)
        if action.gate is None:
            action.gate = self.gate()
        self._method.actions.append(action)

    def pause(self, parameters: Iterable[str], held: float = 1.0) -> Paused:
        """Return which of these parameters do not train: an action of the clause sets `now` before the gradients.

        A paused parameter has no gradient, so that its optimizer leaves it and its state as they are. Its gradient is
        computed all the same. Rules may freeze the same parameters. Optimizers hold state for the fraction `held` of
        these parameters at a time, at most, because the action lets them forget the others.
        """
        paused = Paused(f"`{self.label}`", frozenset(parameters), held)
        self._method.paused.append(paused)
        return paused

    def seed(self, *purpose: int | str) -> int:
        """Return a 64-bit seed of this clause, from that of the run and a purpose, such as the number of a step."""
        return derive_seed(self._context.seed, self.label, *purpose)

    def trained_entries(self) -> TrainedEntries:
        """Return what tells entries of a parameter that a mask trains from the whole parameter."""
        return TrainedEntries(self._method.masks)

    # Masks

    def select_entries(
        self,
        names: Iterable[str],
        score: Score | SummedScores,
        choice: Choice,
        density: float,
        *,
        batches: int = 1,
        master: bool = True,
    ) -> None:
        """Let the optimizer train entries of parameters that `choice` takes by a score; the others stay as they are.

        They are chosen at `from`, and again `every`, until `until`: by a score of the weights before a step, by scores
        that are summed over the gradients of `batches` steps after it. Entries that stay chosen keep what the optimizer
        has of them. Of 16-bit weights, a `master` copy in float32 is what it updates.
        """
        if self.clause.every is None:
            self.refuse_times(
                "the entries that train are chosen once, for the rest of the run", "until"
            )
        elif isinstance(score, SummedScores):
            between = self._context.units.convert(self.clause.every, "steps", self._context.length)
            if batches > between:
                raise FieldError(
                    "batches",
                    f"gradients of {batches} steps are summed before a choice, and entries are chosen `every"
                    f" {self.clause.every}`: write a longer `every`, or fewer `batches`",
                )
        names = tuple(names)
        self._refuse_masked_shards(names)
        shapes = {name: self.inventory.parameter[name].shape for name in names}
        sizes = choice.sizes(shapes, density)
        selected = {
            n: SelectedEntries(n, self.tensor(n), size, master, choice.known)
            for n, size in sizes.items()
        }
        self._method.masks.update(selected)
        self.action(WriteBack(self.label, selected.values()))
        window = self.gate() or Gate()
        chooser = ChooseEntries(
            self.label, [*selected.values()], score, choice, density, window, batches
        )
        for turn in chooser.turns():
            self.action(turn)

    def mask(
        self,
        names: Iterable[str],
        choose: Chooser,
        density: Expr,
        *,
        choice: Choice | None = None,
        together: bool = False,
        once: bool = False,
    ) -> ChooseZeros:
        """Train a fraction of the entries of parameters and keep the others at zero; chosen at the clause's times.

        `choose(step, fraction)` runs before the forward pass, at `from` and, unless `once`, again `every`. With
        `together` the fraction is of all the parameters, and `choice` says which is of each, which only the plan reads.
        Return the action that chooses: its
        `masks` may be changed in later steps.
        """
        fraction = self.schedule(density)
        text = f"{fraction(Clock()):.6g}" if self.is_constant(density) else str(density)
        by = f", by {choice.measured}" if choice is not None and choice.measured else ""
        shown = f"density {text}{' of all' * together}{by}"
        names = tuple(names)
        self._refuse_masked_shards(names)
        for name in names:
            refuse_lost_zeros(self.model, name)
        each: dict[str, float] = {}
        if choice is not None and choice.allocate is not None and self.is_constant(density):
            shapes = {name: self.inventory.parameter[name].shape for name in names}
            each = choice.densities(shapes, fraction(Clock()))
        masks = {
            name: ZeroMask(
                name, self.tensor(name), f"density {each[name]:.4g}" if name in each else shown
            )
            for name in names
        }
        for name, mask in masks.items():
            mask.averages = partial(self._averages, name)
        self._method.masks.update(masks)
        self._method.schedules[f"{self.label} density"] = fraction
        setting, window = self.clause.construct.model_dump_json(), self.gate() or Gate()
        if once:
            setting, window = str(density), Gate(window.start)
        frozen = self._method.frozen
        chooser = ChooseZeros(self.label, masks, choose, fraction, window, setting, frozen)
        self.action(chooser)
        self.action(ZeroGradients(self.label, masks.values()))
        self.action(ZeroWeights(self.label, masks.values()))
        return chooser

    def _averages(self, name: str) -> list[Tensor]:
        """Return the values of a parameter that evaluation uses in its place now."""
        held = (companion.values for companion in self._method.evaluated_with.values())
        return [values[name] for values in held if name in values]

    def _refuse_masked_shards(self, names: Iterable[str]) -> None:
        if (shard := next(filter(self.is_sharded, names), None)) is not None:
            raise ValueError(masked_shard(shard))

    def _refuse_shards(self, when: str) -> None:
        """Raise ValueError for a sharded parameter, whose gradients are averaged in the step's own passes alone."""
        for name in (entry.name for entry in self.inventory.parameters):
            if self.is_sharded(name):
                raise ValueError(
                    f"it needs gradients {when} the step's passes, and those of `{name}`, which is sharded over"
                    " processes (FSDP2), are not averaged there. Use DistributedDataParallel, or remove the clause"
                )
