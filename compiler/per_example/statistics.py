"""Statistics: what backward passes leave in probes and hooks, read as contributions to the step's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError, listed
from trainc.compiler.method.example_units import Groups
from trainc.compiler.per_example.gradient_scaling import Witness
from trainc.runtime.step.record import Contribution
from trainc.runtime.step.sharded import squared_norms

if TYPE_CHECKING:
    from trainc.compiler.method.loss import Loss
    from trainc.compiler.method.lowered_method import LoweredMethod
    from trainc.compiler.per_example.micro_batch import Micro
    from trainc.runtime.data.batch import Batch


class Statistics:
    """What a program measures of its micro-batches' gradients."""

    def __init__(self, parts: LoweredMethod, parameters: Mapping[str, nn.Parameter]) -> None:
        self.rewrite, self.whole = parts.rewrite, parts.batch_gradients
        self._parameters = parameters
        self._open: Micro | None = None
        plain = [n for n in (*self.parameters, *self.whole) if n not in parts.selected_entries]
        self.witness = Witness(plain, parameters)
        for name, running in self.whole.items():
            parameters[name].register_hook(partial(self._note_whole, name, running))

    @property
    def wanted(self) -> bool:
        """Whether anything is measured."""
        return bool(self.rewrite.measured or self.whole)

    @property
    def parameters(self) -> list[str]:
        """The parameters behind the probes, each once."""
        sites = self.rewrite.measured
        return list(dict.fromkeys(name for site in sites for name in site.parameters if name))

    # what a micro-batch is given

    def weigh(self, micro: Micro, task: Loss, batch: Batch, share: float) -> None:
        """Note the weights of a micro-batch's units in the step's loss, and of its examples where those are others."""
        units, own = self.rewrite.example_units, task.weights(batch[1])
        micro.weights = (own if units is None else units.weights(task, batch)) * share
        if isinstance(units, Groups):
            micro.examples = own * share

    def watch(self, micro: Micro, total: Tensor) -> None:
        """Have the backward pass of `total` leave what is measured in `micro`."""
        self._open = self.witness.micro = micro

        def note(gradient: Tensor) -> None:
            micro.scale = gradient

        if total.requires_grad:
            total.register_hook(note)

    def take(
        self, micro: Micro, probes: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
    ) -> None:
        """Note what a graph has computed already: probes' gradients and parameters' gradients."""
        for name, statistic in probes.items():
            probe = torch.zeros_like(statistic)
            probe.grad = statistic
            micro.probes[name] = probe
        for name, running in self.whole.items():
            found = self._parameters[name].grad if running else gradients[name]
            if found is not None:
                micro.whole[name] = squared_norm(found)
        own = gradients.get(self.witness.name or "")
        if own is not None:
            self.witness.add(own)

    def _note_whole(self, name: str, running: bool, gradient: Tensor) -> None:
        """Keep the squared norm of a micro-batch's gradient, or of all the step's so far (`running`)."""
        if self._open is None:
            return
        before = self._parameters[name].grad if running else None
        self._open.whole[name] = squared_norm(gradient if before is None else before + gradient)

    def close(self) -> None:
        """Let gradients that belong to no micro-batch pass unmeasured."""
        self._open = self.witness.micro = None
        self.witness.close()

    # what it left

    def contribution(self, micro: Micro) -> Contribution:
        """Return what a micro-batch contributes to the step's gradient; raises SiteError when some did not arrive."""
        silent = [name for name, probe in micro.probes.items() if probe.grad is None]
        silent += [name for name in self.whole if name not in micro.whole]
        if silent:
            names = listed(silent)
            if not micro.training:
                raise SiteError(
                    f"{names} delivered no statistics: the model was in eval mode when `loss` was called, and nothing"
                    " is measured there. Call `model.train()` first; to train a part in eval mode, put that part alone"
                    " into it"
                )
            raise SiteError(
                f"{names} delivered no statistics: did `backward()` reach it through `program.forward`,"
                " once after each `loss`?"
            )
        found = {n: cast(Tensor, p.grad) for n, p in micro.probes.items()}
        if micro.scale is not None and (scale := float(micro.scale)) != 1.0:
            found = {n: _unscaled(g, scale) for n, g in found.items()}
            micro.whole = {n: square / scale**2 for n, square in micro.whole.items()}
        assert micro.weights is not None
        gradients = self._gradients(found)
        return Contribution(
            micro.weights, self.squares(found), gradients, micro.whole, micro.examples
        )

    def squares(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one row of squared norms per parameter, from the probes' gradients by module."""
        narrow = {name: g for name, g in probes.items() if g.dim() == 2}
        wide = self._gradients(probes)
        return self._by_parameter(narrow) | {n: g.square().sum(1) for n, g in wide.items()}

    def _gradients(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._by_parameter({name: g for name, g in probes.items() if g.dim() == 3})

    def _by_parameter(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn the sites' columns into one entry per parameter; layers that share one add up to it."""
        found: dict[str, Tensor] = {}
        for site in self.rewrite.measured:
            if site.module not in probes:
                continue
            for name, column in zip(site.parameters, probes[site.module].unbind(1), strict=True):
                if name is not None:
                    found[name] = found[name] + column if name in found else column
        return found


def _unscaled(statistic: Tensor, scale: float) -> Tensor:
    """Undo what the loss was multiplied by, once in a gradient and twice in a squared norm."""
    return statistic / (scale if statistic.dim() == 3 else scale**2)


def squared_norm(gradient: Tensor) -> Tensor:
    """Return |gradient|^2, 0-d, in float64."""
    return squared_norms([gradient])[0]
