"""The gradients of the losses of single examples, with the model in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.undisturbed import in_mode
from trainc.compiler.program.program import Program
from trainc.runtime.data.batch import Batch, one_of, split_batch
from trainc.runtime.soundness.loss_graph import operations_of

CLOSE = 1e-3
"""How far, relative to its length, a gradient of the batch may be from that of its example alone, by rounding."""
COMPARED = 2
"""How many examples of the first batch are compared with passes of their own."""
REENTRANT = "CheckpointFunctionBackward"
"""The operation of torch's reentrant activation checkpoints."""


class Gradients(NamedTuple):
    """The gradients of a batch's examples by parameter, (examples, entries), and their losses, (examples,).

    An example of which no target counts has a gradient of zeros, and a loss of NaN.
    """

    rows: dict[str, Tensor]
    losses: Tensor


class ExampleGradients:
    """Takes the loss of each example alone, without the terms that clauses add, and differentiates it.

    The model is in eval mode: batch norms normalize by their running statistics, and nothing is dropped. There is no
    autocast: gradients have the precision of the weights. Entries that a mask does not let train have a gradient of 0.

    Where all parameters are those of linear layers that run once, the examples of a batch pass together: a linear
    layer's gradient is the outer product of what it is given and the gradient of its output. The first of them whose
    targets count are compared with passes of single examples, which all others take.
    """

    def __init__(self, program: Program, names: Sequence[str], inventory: Inventory) -> None:
        self._execution = program.execution
        self._masks = program.execution.method.masks
        self.parameters = {name: program.execution.parameters[name] for name in names}
        self.entries = sum(p.numel() for p in self.parameters.values())
        self._linear = _linear_layers(program.module, names, inventory)
        self._trusted = False

    @property
    def together(self) -> bool:
        """Whether the examples of a batch pass together."""
        return bool(self._linear)

    def of(self, batch: Batch) -> Gradients:
        """Return the gradients of a batch's examples."""
        with in_mode(self._execution.module, training=False), torch.enable_grad():
            found = self._together(batch) if self._linear else None
            if found is not None and not self._trusted:
                compared = self._agrees(found, batch)
                self._trusted = compared is True
                found = None if compared is False else found
            if found is None:
                self._linear = {}
                found = self._one_by_one(batch)
        return Gradients(self._masked(found.rows), found.losses)

    def _masked(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients with zeros at the entries that do not train; all of those whose mask has not chosen yet."""
        masks = {name: self._masks[name] for name in rows if name in self._masks}
        trained = {n: (~mask.waits & mask.trained_entries()).flatten() for n, mask in masks.items()}
        return rows | {name: rows[name] * kept for name, kept in trained.items()}

    def _one_by_one(self, batch: Batch) -> Gradients:
        found = [self._alone(one) for one in split_batch(batch, 1)]
        rows = {n: torch.stack([one[n] for one, _ in found]) for n in self.parameters}
        return Gradients(rows, torch.stack([loss for _, loss in found]))

    def _alone(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradients of an example by parameter, (entries,), and its loss; zeros where no target counts."""
        of, targets = self._outputs(batch)
        loss = self._loss(of, targets)
        if loss is None:
            zeros = {n: torch.zeros_like(p).flatten() for n, p in self.parameters.items()}
            return zeros, torch.tensor(torch.nan)
        found = self._differentiated(loss)
        rows = {
            name: (
                torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            ).flatten()
            for (name, p), g in zip(self.parameters.items(), found, strict=True)
        }
        return rows, loss.detach().cpu()

    def _differentiated(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of the parameters; those of `.grad` stay as they are.

        Reentrant activation checkpoints know only `backward()`, which finds the gradients of all parameters.
        """
        parameters = [*self.parameters.values()]
        if not any(node.name() == REENTRANT for node in operations_of(loss)):
            return torch.autograd.grad(loss, parameters, allow_unused=True)
        found: list[Tensor | None] = [None] * len(parameters)

        def keep(gradient: Tensor, place: int) -> None:
            held = found[place]
            found[place] = gradient.clone() if held is None else held + gradient

        hooks = [p.register_hook(partial(keep, place=i)) for i, p in enumerate(parameters)]
        every = [*self._execution.module.parameters()]
        before = [p.grad for p in every]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
            for mask in self._masks.values():
                mask.discard()
            for parameter, grad in zip(every, before, strict=True):
                parameter.grad = grad
        return found

    def _together(self, batch: Batch) -> Gradients | None:
        """Return the gradients of examples that pass together; None where layers or outputs are not as expected."""
        examples = len(one_of(batch[1]))
        with self._watched() as seen:
            of, targets = self._outputs(batch)
        kept = [seen[name] for name in self._linear]
        if any(len(calls) != 1 or not _has_rows(calls[0][1], examples) for calls in kept):
            return None
        if not all(calls[0][1].requires_grad for calls in kept):
            return None  # inside of a reentrant activation checkpoint
        if not all(_has_rows(one, examples) for one in of.values()):
            return None
        losses = [
            self._loss({n: one[i : i + 1] for n, one in of.items()}, part)
            for i, (_, part) in enumerate(split_batch((one_of(targets), targets), 1))
        ]
        counted = [loss for loss in losses if loss is not None]
        outputs = [calls[0][1] for calls in kept]
        found: Sequence[Tensor | None] = [None] * len(outputs)
        if counted:
            found = torch.autograd.grad(torch.stack(counted).sum(), outputs, allow_unused=True)
        rows: dict[str, Tensor] = {}
        for name, calls, delta in zip(self._linear, kept, found, strict=True):
            given, output = calls[0]
            delta = torch.zeros_like(output) if delta is None else delta
            rows |= self._rows(name, given.detach(), delta)
        nan = torch.tensor(torch.nan)
        told = [nan if loss is None else loss.detach().cpu() for loss in losses]
        return Gradients({name: rows[name] for name in self.parameters}, torch.stack(told))

    def _rows(self, layer: str, given: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the selected parameters of a linear layer."""
        given, delta = (one.reshape(len(one), -1, one.shape[-1]) for one in (given, delta))
        found: dict[str, Tensor] = {}
        for name in self._linear[layer]:
            weight = name.rpartition(".")[2] == "weight"
            found[name] = (delta.mT @ given).flatten(1) if weight else delta.sum(1)
        return found

    def _agrees(self, found: Gradients, batch: Batch) -> bool | None:
        """Say whether the first examples have the same gradients alone and in the batch; None where all are 0."""
        compared = 0
        for i, one in enumerate(split_batch(batch, 1)):
            alone, _ = self._alone(one)
            apart = sum(float((found.rows[n][i] - alone[n]).square().sum()) for n in alone)
            length = sum(float(g.square().sum()) for g in alone.values())
            if not apart <= CLOSE**2 * length:
                return False
            compared += length > 0
            if compared == COMPARED:
                break
        return True if compared else None

    @contextmanager
    def _watched(self) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
        """Keep what the linear layers are given in this block, and what they return."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._linear}
        hooks = []
        for name in self._linear:

            def keep(_: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
                seen[name].append((given[0], output))

            layer = self._execution.module.get_submodule(name)
            hooks.append(layer.register_forward_hook(keep))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _outputs(self, batch: Batch) -> tuple[Mapping[str, Any], Any]:
        """Return what of the model's output each loss is of, and the targets with what losses read besides."""
        execution = self._execution
        execution.settle_for_evaluation(batch)
        batch = execution.prepare(batch)
        execution.losses.use(execution.losses.numbers_now(execution.clock))
        return execution.losses.run(execution.module, batch).of, batch[1]

    def _loss(self, of: Mapping[str, Any], targets: Any) -> Tensor | None:
        """Return the weighted sum of the losses; None where no target counts."""
        losses, clock = self._execution.losses, self._execution.clock
        weights, found = losses.weights_now(clock), []
        for part in losses.parts:
            own = part.targets(targets)
            if part.loss.count_evaluated(own):
                found.append(weights.get(part.label, 1.0) * part.loss(of[part.label], own))
        return sum(found[1:], start=found[0]) if found else None


def _has_rows(value: Any, count: int) -> bool:
    """Say whether something is a tensor with a row for each example."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def _linear_layers(
    model: nn.Module, names: Sequence[str], inventory: Inventory
) -> dict[str, list[str]]:
    """Return the linear layers that hold the parameters, with those of each; none where one is of anything else."""
    found: dict[str, list[str]] = {}
    for name in names:
        owner = name.rpartition(".")[0]
        layer = model.get_submodule(owner)
        plain = getattr(layer, "unbound", type(layer))
        if inventory.parameter[name].aliases or plain.forward is not nn.Linear.forward:
            return {}
        if hasattr(layer, "parametrizations") or layer._forward_pre_hooks:
            return {}
        found.setdefault(owner, []).append(name)
    return found
