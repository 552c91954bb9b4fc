"""The mechanisms for what a step does besides its passes: actions, and what surrounds the passes."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.runtime.mask.trained_entries import TrainedEntries
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

    def _refuse_shards(self, when: str) -> None:
        """Raise ValueError for a sharded parameter, whose gradients are averaged in the step's own passes alone."""
        for name in (entry.name for entry in self.inventory.parameters):
            if self.is_sharded(name):
                raise ValueError(
                    f"it needs gradients {when} the step's passes, and those of `{name}`, which is sharded over"
                    " processes (FSDP2), are not averaged there. Use DistributedDataParallel, or remove the clause"
                )
