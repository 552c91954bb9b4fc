"""The gradients of a whole step at the weights of now, for what surrounds its passes: nothing else is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trainc.compiler.model.eager import differentiable_checkpoints
from trainc.compiler.model.undisturbed import keep_state
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.compiler.program.execution import Execution
from trainc.runtime.data.batch import Batch


class StepGradients:
    """Returns, when called, the gradients of the step's loss by parameter, over all micro-batches and replicas.

    They are of every parameter that trains and has an effect on the loss, zero at entries that a mask does not train.
    Buffers and random states are as before afterwards, so that the step's own passes draw the same dropout; no
    gradient is accumulated and no statistic kept. With a `scaler` losses are scaled and gradients unscaled; they may
    then be infinite, as those of the step's own pass.
    """

    def __init__(
        self,
        execution: Execution,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._execution, self._micro_batches, self._scaler = execution, micro_batches, scaler
        self._found: set[str] | None = None

    def __call__(self, of: Literal["parameters"] = "parameters") -> dict[str, Tensor]:
        """Run forward and backward passes of all micro-batches."""
        execution = self._execution
        found: dict[str, Tensor] = {}
        torch.clear_autocast_cache()  # its copies of the weights are from before they were changed
        with keep_state(execution.module), differentiable_checkpoints(), torch.enable_grad():
            for batch, where in self._micro_batches:
                for name, gradient in execution.gradients(batch, where, self._scaler).items():
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    found[name] = found[name] + gradient if name in found else gradient
        if self._scaler is not None:
            scale = self._scaler.get_scale()
            found = {name: gradient / scale for name, gradient in found.items()}
        self._found = set(found)
        found = self._average(found)
        masks = execution.method.selected_entries
        return {n: masks[n].trained(g) if n in masks else g for n, g in found.items()}

    def missed(self) -> list[str]:
        """Return the parameters that have a gradient after the step's passes and had none when asked before."""
        if self._found is None:
            return []
        parameters = self._execution.parameters
        return [n for n, p in parameters.items() if p.grad is not None and n not in self._found]

    def _average(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over replicas; a parameter that one of them did not use counts with zeros there."""
        replicas = self._execution.replicas
        if replicas is None:
            return found
        trained = {n: p for n, p in self._execution.parameters.items() if p.requires_grad}
        summed = {
            name: found[name] / replicas.size if name in found else torch.zeros_like(p)
            for name, p in trained.items()
        }
        replicas.sum_in_place(list(summed.values()))
        return summed
