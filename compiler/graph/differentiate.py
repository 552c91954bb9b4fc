"""Differentiate a forward graph: loss, penalties and every gradient as one flat ATen graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from trainc.compiler.graph.flatten import FlatStep, StepInputs, flatten
from trainc.compiler.graph.forward_graph import ForwardGraph, ForwardInterpreter
from trainc.compiler.graph.step_graph import no_autocast
from trainc.compiler.method.loss import LOSS_WEIGHT
from trainc.compiler.method.penalty import Penalty, Values, evaluate


def differentiate(
    forward: ForwardGraph, parameters: Sequence[str], penalties: Mapping[str, Penalty]
) -> FlatStep:
    """Trace forward and the gradients of `parameters` (canonical names) and of the probes.

    The scalar `loss_weight`, where it is available, multiplies loss and penalties, so that the
    micro-batches of a step add up to its mean.
    """
    step = _TracedStep(forward, parameters, penalties)
    fakes = step.fake_inputs()
    with preserve_node_meta():
        traced = make_fx(step.run, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    torch.clear_autocast_cache()
    return flatten(traced, forward, step.inputs, step.outputs)


class _TracedStep:
    """What is traced: from a flat list of inputs to loss, gradients and probes."""

    def __init__(
        self, forward: ForwardGraph, parameters: Sequence[str], penalties: Mapping[str, Penalty]
    ) -> None:
        self.forward, self.parameters, self.penalties = forward, parameters, penalties
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
        fake: Tensor = self.forward.mode.from_tensor(tensor.detach(), static_shapes=True)
        return fake.requires_grad_(trained)

    def run(self, *flat: Tensor) -> list[Tensor | None]:
        """Return the step's outputs; `outputs` then holds their names."""
        with torch.enable_grad():
            tensors, batch, scalars = self.inputs.split(flat)
            probes = {name: _zeros(node.meta["val"]) for name, node in self.forward.probes.items()}
            results = self._forward_pass(tensors, batch, scalars, probes)
            loss = results.get("loss", results["data_loss"])
            terms = self._terms(tensors, scalars)
            total = sum(terms.values(), start=loss)
            total = total * scalars[LOSS_WEIGHT] if LOSS_WEIGHT in scalars else total
            wanted = [*(tensors[name] for name in self.parameters), *probes.values()]
            # Eager training runs backward outside autocast, but here the engine would run inside it.
            with no_autocast([total.device.type]):
                grads = _gradients(total, wanted)
        named: dict[str, Tensor | None] = {"total": total, "loss": loss}
        named |= {name: results[name] for name in ("data_loss", "consistency") if name in results}
        named |= {f"term:{label}": value for label, value in terms.items()}
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

    def _terms(self, tensors: dict[str, Tensor], scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        values = Values(tensors | scalars, self.forward.canonical)
        return {
            name: evaluate(name, penalty, values, self.owners)
            for name, penalty in self.penalties.items()
        }


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device).requires_grad_()


def _gradients(total: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not wanted or not total.requires_grad:
        return (None,) * len(wanted)
    return torch.autograd.grad(total, wanted, allow_unused=True)
