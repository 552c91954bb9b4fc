"""The gradients of a whole step before its own passes, for what surrounds them: nothing else is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.compiler.model.eager import differentiable_checkpoints
from trainc.compiler.model.undisturbed import keep_state
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.runtime.data.batch import Batch, copy_inputs, map_tensors
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Step


class StepGradients:
    """Returns, when called, the gradients of the step's loss, over all micro-batches and replicas.

    Those of parameters are of all that train and have an effect on the loss, zero at entries that a mask does not
    train. Buffers and random states are as before afterwards, so that the step's own passes draw the same dropout; no
    gradient is accumulated and no statistic kept. With a `scaler` losses are scaled and gradients unscaled; they may
    then be infinite, as those of the step's own pass.
    """

    def __init__(
        self,
        execution: Execution,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._execution, self._scaler = execution, scaler
        self.micro_batches = list(micro_batches)
        """What the step's own passes run."""
        self.loss = torch.zeros(())
        """What was differentiated in the last call for parameters: this process's loss, 0-d."""
        self._copied = False
        self._found: set[str] | None = None

    @property
    def inputs(self) -> list[Any]:
        """Return copies of the inputs, which replace them in `micro_batches`."""
        if not self._copied:
            self.micro_batches = [
                (copy_inputs(batch), where) for batch, where in self.micro_batches
            ]
            self._copied = True
        return [inputs for (inputs, _), _ in self.micro_batches]

    @overload
    def __call__(self, of: Literal["parameters"] = "parameters") -> dict[str, Tensor]: ...

    @overload
    def __call__(self, of: Literal["inputs"]) -> list[Any]: ...

    def __call__(self, of: Literal["parameters", "inputs"] = "parameters") -> Any:
        """Run forward and backward passes of all micro-batches; see `runtime.step.around.Gradients`."""
        torch.clear_autocast_cache()  # its copies of the weights are from before they were changed
        module = self._execution.module
        with keep_state(module), differentiable_checkpoints(), torch.enable_grad():
            return self._of_parameters() if of == "parameters" else self._of_inputs()

    def _of_parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        self.loss = torch.zeros(())
        for batch, where in self.micro_batches:
            loss, gradients = self._execution.gradients(batch, where, self._scaler)
            self.loss = self.loss.to(loss) + loss
            for name, gradient in gradients.items():
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                found[name] = found[name] + dense if name in found else dense
        self._found = set(found)
        found = self._average({name: self._unscaled(g) for name, g in found.items()})
        masks = self._execution.method.masks
        return {n: masks[n].trained(g) if n in masks else g for n, g in found.items()}

    def _of_inputs(self) -> list[Any]:
        replicas, trees = self._execution.replicas, []
        for (inputs, targets), where in self.micro_batches:
            leaves: dict[str, Tensor] = {}
            given = map_tensors(partial(_as_leaf, leaves), inputs)
            if not leaves:
                raise ValueError(
                    "the inputs have no tensor of floating point, and so no gradients: change the output of a layer"
                    " instead, such as that of an embedding"
                )
            run = self._execution.gradients
            _, found = run((given, targets), where, self._scaler, leaves)
            scale = 1 if replicas is None else replicas.size
            order = iter(leaves)
            trees.append(map_tensors(partial(self._gradient_of, order, found, scale), inputs))
        return trees

    def _gradient_of(
        self, order: Iterator[str], found: Mapping[str, Tensor], scale: int, tensor: Tensor
    ) -> Any:
        """Return the gradient of the next of the inputs; None where it can have none."""
        if not tensor.is_floating_point():
            return None
        gradient = found.get(next(order))
        return torch.zeros_like(tensor) if gradient is None else self._unscaled(gradient) / scale

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self._scaler is None else gradient / self._scaler.get_scale()

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


class SurroundedSteps:
    """Runs the passes of steps inside what surrounds them."""

    def __init__(self, execution: Execution, machine: StepMachine) -> None:
        self._execution, self._machine = execution, machine
        self._missed_noted = False

    @property
    def names(self) -> str:
        """Return the names of what surrounds the passes of a step, for messages."""
        return ", ".join(f"`{action.name}`" for action in self._machine.around)

    @contextmanager
    def surround(
        self,
        step: Step,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
    ) -> Iterator[Sequence[tuple[Batch, MicroBatchSlice]]]:
        """Surround the passes of this step, and yield the micro-batches that these run.

        Raises SiteError for sharded parameters.
        """
        if (shard := first_shard(self._execution.parameters)) is not None:
            raise SiteError(
                f"`{shard}` is sharded over processes (FSDP2), and the gradients that {self.names} needs before the"
                " step's passes are not averaged there: use DistributedDataParallel, or remove the clause"
            )
        gradients = StepGradients(self._execution, micro_batches, scaler)
        try:
            with self._machine.surround(step, gradients):
                torch.clear_autocast_cache()  # of the weights' values before they were changed
                yield gradients.micro_batches
                if not self._missed_noted and (missed := gradients.missed()):
                    self._missed_noted = True
                    step.notes.append(
                        f"`{missed[0]}` has a gradient in this step, but had none when {self.names} asked before it:"
                        " another part of the model ran, or an autograd.Function of its own hides the parameter, as"
                        " checkpoints other than torch's do"
                    )
        finally:
            torch.clear_autocast_cache()


def _as_leaf(leaves: dict[str, Tensor], tensor: Tensor) -> Tensor:
    """Return a tensor of the inputs as one to differentiate by, and keep it by its number."""
    if not tensor.is_floating_point():
        return tensor
    leaf = tensor.detach().requires_grad_()
    leaves[f"input {len(leaves)}"] = leaf
    return leaf
