"""Differentiate a forward graph: loss, terms and every gradient as one flat ATen graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from trainc.compiler.graph.flatten import FlatStep, StepInputs, flatten
from trainc.compiler.graph.forward_graph import ForwardGraph, ForwardInterpreter
from trainc.compiler.graph.step_graph import no_autocast
from trainc.compiler.method.losses import LOSS
from trainc.compiler.method.term import (
    CAPTURED,
    TERM,
    Forward,
    Term,
    Values,
    add_terms,
    captured_outputs,
)


def differentiate(
    forward: ForwardGraph, parameters: Sequence[str], terms: Sequence[Term], logits: bool = False
) -> FlatStep:
    """Trace forward and the gradients of `parameters` (canonical names) and of the probes.

    The scalar `loss_weight`, where it is available, multiplies loss and terms, so that the
    micro-batches of a step add up to its mean. The value of a term may be an output of the forward graph already.
    With `logits` they and what is captured are outputs of the step.
    """
    step = _TracedStep(forward, parameters, terms, logits)
    fakes = step.fake_inputs()
    # A symbolic size exists only under the mode that made it, and `arange` takes no tensor that would bring the mode.
    mode = forward.mode if forward.sizes else nullcontext()
    with preserve_node_meta(), mode:
        traced = make_fx(step.run, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    torch.clear_autocast_cache()
    return flatten(traced, forward, step.inputs, step.outputs)


class _TracedStep:
    """What is traced: from a flat list of inputs to loss, gradients and probes."""

    def __init__(
        self,
        forward: ForwardGraph,
        parameters: Sequence[str],
        terms: Sequence[Term],
        logits: bool,
    ) -> None:
        self.forward, self.parameters, self.terms = forward, parameters, terms
        self.logits = logits
        self.inputs = StepInputs.of(forward)
        self.outputs: tuple[str, ...] = ()
        self.owners = {id(tensor): name for name, tensor in forward.tensors.items()}

    def fake_inputs(self) -> list[Tensor]:
        """Return fake tensors of the inputs, in order; the parameters require gradients."""
        forward, trained = self.forward, set(self.parameters)
        with forward.mode:
            fakes = [
                self._fake(tensor, name in trained) for name, tensor in forward.tensors.items()
            ]
            fakes += [forward.values[name] for name in self.inputs.batch]
            fakes += [self._fake(forward.available[name], False) for name in self.inputs.scalars]
        return fakes

    def _fake(self, tensor: Tensor, trained: bool) -> Tensor:
        return self.forward.fake(tensor).requires_grad_(trained)

    def run(self, *flat: Tensor) -> list[Tensor | None]:
        """Return the step's outputs; `outputs` then holds their names."""
        with torch.enable_grad():
            tensors, batch, scalars = self.inputs.split(flat)
            probes = {name: _zeros(node.meta["val"]) for name, node in self.forward.probes.items()}
            results = self._forward_pass(tensors, batch, scalars, probes)
            terms = self._evaluate_terms(results, tensors, batch, scalars)
            of_losses, data_loss = self._add_losses(results, scalars)
            loss, total = add_terms(data_loss, self.terms, terms, scalars)
            wanted = [*(tensors[name] for name in self.parameters), *probes.values()]
            # Eager training runs backward outside autocast, but here the engine would run inside it.
            with no_autocast([total.device.type]):
                grads = _gradients(total, wanted)
        named: dict[str, Tensor | None] = {"total": total, "loss": loss, "data_loss": data_loss}
        named |= of_losses
        named |= {TERM + label: value for label, value in terms.items()}
        if self.logits:
            named |= {n: v for n, v in results.items() if n == "logits" or n.startswith(CAPTURED)}
        count = len(self.parameters)
        named |= {f"grad:{n}": g for n, g in zip(self.parameters, grads[:count], strict=True)}
        named |= {f"probe:{n}": g for n, g in zip(probes, grads[count:], strict=True)}
        self.outputs = tuple(named)
        return [None if value is None else value.detach() for value in named.values()]

    def _forward_pass(
        self,
        tensors: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor],
        probes: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        forward = self.forward
        given = dict(batch)
        given |= {node.name: scalars[name] for name, node in forward.scalars.items()}
        given |= {node.name: probes[name] for name, node in forward.probes.items()}
        values = ForwardInterpreter(forward, tensors, given).run(enable_io_processing=False)
        return dict(zip(forward.outputs, values, strict=True))

    def _add_losses(
        self, results: Mapping[str, Tensor], scalars: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses of a sum by the names of their outputs, and the loss without terms."""
        losses = self.forward.loss.losses
        if losses is None or not losses.is_sum:
            return {}, results["data_loss"]
        first, *others = losses.parts
        values = {first.label: results["data_loss"]}
        values |= {part.label: results[part.scalar] for part in others}
        return {LOSS + name: value for name, value in values.items()}, losses.add(values, scalars)

    def _evaluate_terms(
        self,
        results: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the values of the terms: a pass has made some of them outputs of the forward graph."""
        given, losses = self.forward, self.forward.loss.losses
        targets = given.pack_targets(batch)
        forward = Forward.of_loss(
            None if losses is None else losses.first,
            results["logits"],
            targets if losses is None else losses.targets_to_read(targets),
            given.pack_inputs(batch),
            given.views,
            Values(tensors, given.canonical),
            scalars,
            given.loss.ignore_index,
            captured_outputs(results),
        )
        return {
            term.label: results[TERM + term.label]
            if TERM + term.label in results
            else term.evaluate(forward, self.owners)
            for term in self.terms
        }


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device).requires_grad_()


def _gradients(total: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not wanted or not total.requires_grad:
        return (None,) * len(wanted)
    return torch.autograd.grad(total, wanted, allow_unused=True)
