"""The gradients of a whole step before its own passes, for what surrounds them: nothing else is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.compiler.model.eager import differentiable_checkpoints
from trainc.compiler.model.undisturbed import keep_state
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.runtime.data.batch import Batch, copy_inputs, map_tensors
from trainc.runtime.processes.sharded import reshard
from trainc.runtime.step.gradients import as_dense
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Step
from trainc.runtime.storage.random_streams import derive_seed


class StepGradients:
    """Returns, when called, the gradients of the step's loss, over all micro-batches and replicas.

    Those of parameters are of all that train and have an effect on the loss, zero at entries that a mask does not
    train. Buffers and random states are as before afterwards, so that the step's own passes draw the same dropout; no
    gradient is accumulated and no statistic kept. With a `scaler` losses are scaled and gradients unscaled; they may
    then be infinite, as those of the step's own pass. Where weights are sharded, all processes run as many `passes`.
    """

    def __init__(
        self,
        execution: Execution,
        micro_batches: Sequence[tuple[Batch, MicroBatchSlice]],
        scaler: torch.amp.GradScaler | None,
        passes: int = 0,
    ) -> None:
        self._execution, self._scaler = execution, scaler
        self._more = max(0, passes - len(micro_batches)) if not execution.whole else 0
        self.micro_batches = list(micro_batches)
        """What the step's own passes run."""
        self.loss = torch.zeros(())
        """What was differentiated in the last call for parameters: this process's loss, 0-d."""
        self._copied = False
        self._found: set[str] | None = None
        self._hooks: list[RemovableHandle] = []

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
            _add(found, gradients)
        _add(found, self._of_the_others())
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
        self._of_the_others()
        return trees

    def of_changed(self, change: Callable[[Sequence[Batch]], Sequence[Batch]]) -> dict[str, Tensor]:
        """Return the gradients of other micro-batches; see `runtime.step.around.Gradients`."""
        own = self.micro_batches
        copies = [map_tensors(torch.clone, batch) for batch, _ in own]
        self.micro_batches = [
            (batch, where) for batch, (_, where) in zip(change(copies), own, strict=True)
        ]
        try:
            return self()
        finally:
            self.micro_batches = own

    def of_tensors(self, begin: Callable[[int], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the gradients by tensors of the passes; see `runtime.step.around.Gradients`."""
        torch.clear_autocast_cache()
        execution, trees = self._execution, []
        scale = 1 if execution.replicas is None else execution.replicas.size
        with keep_state(execution.module), differentiable_checkpoints(), torch.enable_grad():
            for batch, where in self.micro_batches:
                leaves = begin(where.first_example)
                _, found = execution.gradients(batch, where, self._scaler, leaves)
                zeros = {n: torch.zeros_like(t) for n, t in leaves.items() if n not in found}
                trees.append(zeros | {n: self._unscaled(g) / scale for n, g in found.items()})
            self._of_the_others()
        return trees

    def _of_the_others(self) -> dict[str, Tensor]:
        """Take part in the passes that other processes have more of; return what these add to the shards here."""
        if not self._more:
            return {}
        parameters = self._execution.parameters
        kept = {name: p.grad for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        try:
            for _ in range(self._more):
                self._execution.run_without_part(self.micro_batches[-1][0])
            return {name: p.grad for name, p in parameters.items() if p.grad is not None}
        finally:
            for name, p in parameters.items():
                p.grad = kept[name]

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
        if replicas is None or not self._execution.whole:
            return found  # shards were averaged in their backward pass
        trained = {n: p for n, p in self._execution.parameters.items() if p.requires_grad}
        summed = {
            name: found[name] / replicas.size if name in found else torch.zeros_like(p)
            for name, p in trained.items()
        }
        replicas.sum_in_place(list(summed.values()))
        return summed

    # what the step's own passes find

    def watch(self, *, averaged: bool = False) -> Callable[[], dict[str, Tensor]]:
        """Return what gives the gradients of the step's own passes; see `runtime.step.around.Gradients`."""
        execution = self._execution
        own: dict[str, Tensor] = {}
        if averaged or execution.replicas is None:
            return lambda: self._trained(self._accumulated())
        if (shard := first_shard(execution.parameters)) is not None:
            raise ValueError(
                f"`{shard}` is sharded over processes (FSDP2), which average its gradient inside the backward pass: no"
                " process has its own. Use DistributedDataParallel, or the gradient of all processes"
            )

        def take(name: str, gradient: Tensor) -> None:
            _add(own, {name: gradient.detach()})

        for name, p in execution.parameters.items():
            if p.requires_grad:
                self._hooks.append(p.register_hook(partial(take, name)))
        return lambda: self._trained(own)

    def _accumulated(self) -> dict[str, Tensor]:
        """Return copies of the gradients that passes have accumulated, in the parameters' shapes."""
        found: dict[str, Tensor] = {}
        for name, p in self._execution.parameters.items():
            mask = self._execution.method.masks.get(name)
            if p.grad is not None:
                _add(found, {name: p.grad.clone()})
            elif mask is not None and (gradient := mask.gradient()) is not None:
                found[name] = mask.whole(gradient)
        return found

    def _trained(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        masks = self._execution.method.masks
        unscaled = {name: self._unscaled(g) for name, g in found.items()}
        return {n: masks[n].trained(g) if n in masks else g for n, g in unscaled.items()}

    def draw(self, name: str, device: torch.device, *, own: bool = True) -> torch.Generator:
        """Return a stream of random numbers; see `runtime.step.around.Gradients`."""
        execution = self._execution
        peers = execution.exchange_group or execution.replicas
        rank = peers.process if own and peers is not None else 0
        made = torch.Generator(device)
        key = "around", name, rank, execution.clock.steps
        return made.manual_seed(derive_seed(execution.seed, *key))

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


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
        passes: int = 0,
    ) -> Iterator[Sequence[tuple[Batch, MicroBatchSlice]]]:
        """Surround the passes of this step, and yield the micro-batches that these run.

        `passes` are those of the process that has most. Raises SiteError for sharded parameters, where an action
        takes none.
        """
        if (shard := first_shard(self._execution.parameters)) is not None:
            refusing = [f"`{one.name}`" for one in self._machine.around if not one.takes_shards]
            if refusing:
                raise SiteError(
                    f"`{shard}` is sharded over processes (FSDP2), and the gradients that {', '.join(refusing)} needs"
                    " before the step's passes are not averaged there: use DistributedDataParallel, or remove the"
                    " clause"
                )
        gradients = StepGradients(self._execution, micro_batches, scaler, passes)
        try:
            with self._machine.surround(step, gradients):
                self._forget_copies()
                yield gradients.micro_batches
                if not self._missed_noted and (missed := gradients.missed()):
                    self._missed_noted = True
                    step.notes.append(
                        f"`{missed[0]}` has a gradient in this step, but had none when {self.names} asked before it:"
                        " another part of the model ran, or an autograd.Function of its own hides the parameter, as"
                        " checkpoints other than torch's do"
                    )
        finally:
            gradients.close()
            self._forget_copies()

    def _forget_copies(self) -> None:
        """Drop copies of weights that were changed: those of autocast, and those gathered from shards."""
        torch.clear_autocast_cache()
        if not self._execution.whole:
            reshard(self._execution.module)


def _add(found: dict[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Add gradients to those found so far, as dense ones."""
    for name, gradient in gradients.items():
        dense = as_dense(gradient)
        found[name] = found[name] + dense if name in found else dense


def _as_leaf(leaves: dict[str, Tensor], tensor: Tensor) -> Tensor:
    """Return a tensor of the inputs as one to differentiate by, and keep it by its number."""
    if not tensor.is_floating_point():
        return tensor
    leaf = tensor.detach().requires_grad_()
    leaves[f"input {len(leaves)}"] = leaf
    return leaf
