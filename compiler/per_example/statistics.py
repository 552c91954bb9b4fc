"""Read probes and hooks after backward passes as the micro-batches' contributions to the step's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError, listed
from trainc.compiler.method.example_units import Groups
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.statistic import BatchGradient
from trainc.compiler.per_example.gradient_scaling import ScalingDetector
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.runtime.data.batch import Batch
from trainc.runtime.processes.sharded import squared_norms
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.record import Contribution


class Statistics:
    """What a program measures of its micro-batches' gradients."""

    def __init__(
        self, method: LoweredMethod, parameters: Mapping[str, nn.Parameter], clock: Clock
    ) -> None:
        self._method, self._parameters, self._clock = method, parameters, clock
        self._open: MicroBatchResult | None = None
        separate = {name for name, mask in method.masks.items() if mask.separate}
        plain = [n for n in (*self.parameters, *method.batch_gradients) if n not in separate]
        self.scaling = ScalingDetector(plain, parameters)
        for name in method.batch_gradients:
            parameters[name].register_hook(partial(self._record_batch_sq_norm, name))

    @property
    def rewrite(self) -> Rewrite:
        """What is measured of examples in this step."""
        return self._method.rewrite.at(self._clock)

    @property
    def batch_gradients(self) -> dict[str, BatchGradient]:
        """The parameters of which gradients of micro-batches or replicas are measured in this step."""
        found = self._method.batch_gradients.items()
        return {name: one for name, one in found if one.is_open(self._clock)}

    @property
    def of_replicas(self) -> list[str]:
        """Those of them of which the gradient that a replica has summed is measured."""
        if not self._method.batch_gradients:
            return []
        return [name for name, one in self.batch_gradients.items() if one.of_replica]

    @property
    def wanted(self) -> bool:
        """Whether anything is measured in this step."""
        return bool(self.rewrite.measured or self.batch_gradients)

    @property
    def parameters(self) -> list[str]:
        """The parameters behind the probes of any step, each once."""
        sites = self._method.rewrite.measured
        return list(dict.fromkeys(name for site in sites for name in site.parameters if name))

    # before and during the backward pass

    def weigh(
        self, result: MicroBatchResult, losses: Losses, batch: Batch, where: MicroBatchSlice
    ) -> None:
        """Record the weights of a micro-batch's units in the step's loss; for groups also those of their examples."""
        units, fractions = self.rewrite.example_units, dict(where.fractions)
        own = losses.example_weights(batch[1], fractions)
        loss_weight = 1.0 if fractions and where.loss_weight else where.loss_weight
        of_units = own if units is None else units.weights(losses, batch, own)
        result.weights = _times(of_units, loss_weight)
        if isinstance(units, Groups):
            result.example_weights = _times(own, loss_weight)

    def weigh_rows(self, result: MicroBatchResult, own: Tensor, loss_weight: float) -> None:
        """Record the weights of a micro-batch's units, from those of its rows, (rows,), with sum 1."""
        units = self.rewrite.example_units
        result.weights = own * loss_weight
        if isinstance(units, Groups):
            result.example_weights = result.weights
            result.weights = result.weights.view(-1, units.size).sum(1)

    def watch(self, result: MicroBatchResult, total: Tensor) -> None:
        """Let the backward pass of `total` write the measured statistics to `result`."""
        self._open = self.scaling.micro_batch = result

        def record(gradient: Tensor) -> None:
            result.loss_scale = gradient

        if total.requires_grad:
            total.register_hook(record)

    def record_graph(
        self,
        result: MicroBatchResult,
        probes: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | None],
    ) -> None:
        """Record the gradients of probes and parameters that a graph computed."""
        for name, statistic in probes.items():
            probe = torch.zeros_like(statistic)
            probe.grad = statistic
            result.probes[name] = probe
        if result.weights is None:  # nothing is measured in this step
            return
        for name, one in self.batch_gradients.items():
            found = self._parameters[name].grad if one.of_replica else gradients[name]
            if found is not None:
                result.batch_sq_norms[name] = squared_norm(found)
        own = gradients.get(self.scaling.name or "")
        if own is not None:
            self.scaling.add(own)

    def _record_batch_sq_norm(self, name: str, gradient: Tensor) -> None:
        """Keep the squared norm of a micro-batch's gradient, or of what the replica has summed in this step so far."""
        wanted = self._method.batch_gradients[name]
        if self._open is None or not wanted.is_open(self._clock):
            return
        before = self._parameters[name].grad if wanted.of_replica else None
        self._open.batch_sq_norms[name] = squared_norm(
            gradient if before is None else before + gradient
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure no gradient inside this block."""
        kept = self._open, self.scaling.micro_batch
        self._open = self.scaling.micro_batch = None
        try:
            yield
        finally:
            self._open, self.scaling.micro_batch = kept

    def close(self) -> None:
        """End the step: gradients from now on belong to no micro-batch and are not measured."""
        self._open = self.scaling.micro_batch = None
        self.scaling.close()

    # after it

    def contribution(self, result: MicroBatchResult) -> Contribution:
        """Return what a micro-batch contributes to the step's gradient; raises SiteError where something is missing."""
        silent = [name for name, probe in result.probes.items() if probe.grad is None]
        silent += [name for name in self.batch_gradients if name not in result.batch_sq_norms]
        if silent:
            raise SiteError(
                f"no statistics from {listed(silent)}: call `backward()` once on each result of `program.loss`, and run"
                " the model only through `program.forward`"
            )
        found = {n: cast(Tensor, p.grad) for n, p in result.probes.items()}
        if result.loss_scale is not None and (scale := float(result.loss_scale)) != 1.0:
            # What the loss was multiplied by is once in a gradient, twice in a squared norm.
            found = {n: g / (scale if g.dim() == 3 else scale**2) for n, g in found.items()}
            result.batch_sq_norms = {
                n: square / scale**2 for n, square in result.batch_sq_norms.items()
            }
        assert result.weights is not None
        return Contribution(
            result.weights,
            self.squares(found),
            self._gradients(found),
            result.batch_sq_norms,
            result.example_weights,
        )

    def squares(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one row of squared norms per parameter, from the probes' gradients by module."""
        norms = {name: g for name, g in probes.items() if g.dim() == 2}
        gradients = self._gradients(probes)
        own = by_parameter(self.rewrite, norms)
        return own | {n: g.square().sum(1) for n, g in gradients.items()}

    def _gradients(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_parameter(self.rewrite, {name: g for name, g in probes.items() if g.dim() == 3})


def _times(weights: Tensor, loss_weight: float) -> Tensor:
    """Return weights in the loss of the step; where no target counts, those in the mean are not numbers."""
    return weights * loss_weight if loss_weight else torch.zeros_like(weights)


def by_parameter(rewrite: Rewrite, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of the sites' probes by parameter; those of layers that share a parameter are added."""
    found: dict[str, Tensor] = {}
    for site in rewrite.measured:
        if site.module in probes:
            for name, column in zip(site.parameters, probes[site.module].unbind(1), strict=True):
                if name is not None:
                    found[name] = found[name] + column if name in found else column
    return found


def squared_norm(gradient: Tensor) -> Tensor:
    """Return |gradient|^2, 0-d, in float64."""
    return squared_norms([gradient])[0]
