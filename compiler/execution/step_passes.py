"""The passes of a step: where it has one, masks choose by each gradient as it arrives, and one is held at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainc.compiler.execution.execution import Execution
from trainc.compiler.model.undisturbed import random_states
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.runtime.data.batch import Batch
from trainc.runtime.mask.selected_entries import ComesInParts
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OwnOptimizer
from trainc.runtime.step.record import Step


class StepPasses:
    """Runs the passes of steps, and lets masks free gradients early where nobody else wants them.

    Clauses around the passes do, and so do an optimizer that asks for gradients and one of the user's own. A reentrant
    checkpoint, and any function with a backward pass of its own, may add to the gradient of a parameter several times
    in one pass. It is found when more comes: then `undo` is called and the pass is run again with the same random
    numbers, and from then on masks wait for the end of the passes.
    """

    def __init__(
        self, execution: Execution, machine: StepMachine, undo: Callable[[Step], None]
    ) -> None:
        self._execution, self._undo = execution, undo
        method = execution.method
        own = any(isinstance(action, OwnOptimizer) for action in machine.actions)
        asking = any(part.asks for part in method.optimizers)
        self._waits = own or asking or bool(machine.around)
        """Whether others than masks want the gradients of all parameters, or they come in parts."""
        self._measured = frozenset([*execution.statistics.parameters, *method.batch_gradients])
        """The parameters whose gradients are read at the end of the passes."""

    def run(
        self,
        step: Step,
        batch: Batch,
        where: MicroBatchSlice,
        scaler: torch.amp.GradScaler | None,
        alone: bool,
    ) -> MicroBatchResult:
        """Run a pass as `Execution.run` does; `alone` says that the step has no other on this process."""
        if alone and scaler is None and self._is_awaited:
            rewind = random_states(self._execution.module)
            try:
                with self._execution.masked.arriving(self._measured):
                    return self._execution.run(batch, where)
            except ComesInParts as found:
                self._waits = True
                # What was counted and calibrated before the pass is not of it.
                samples, tokens, calibrations = step.samples, step.tokens, dict(step.calibrations)
                self._undo(step)
                step.samples, step.tokens = samples, tokens
                step.calibrations.update(calibrations)
                rewind()
                step.notes.append(_IN_PARTS.format(found))
        return self._execution.run(batch, where, scaler)

    @property
    def _is_awaited(self) -> bool:
        """Whether a mask chooses in this step by gradients that may be freed as they arrive."""
        execution = self._execution
        if self._waits or not execution.masked.awaits:
            return False
        return not (execution.replicas or execution.exchange_group or execution.wrappers)


_IN_PARTS = (
    "the gradient of `{}` comes in parts, as with a reentrant checkpoint: the pass was run again, and steps that choose"
    " entries hold the dense gradients of all selected tensors. With `use_reentrant=False` they hold one"
)
