"""How much the gradients of single examples differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect
from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class Spread(Construct):
    """Measures the sum of the squared gradient norms of single examples."""

    cite: ClassVar = "nobody"
    usage: ClassVar = "noise_scale spread on type(LayerNorm)"
    targets: ClassVar = "modules"
    signals: ClassVar = {"total": "sum of squared norms"}
    effects: ClassVar = (
        Effect("backward", "measure", ("loss",), ("probe",)),
        Effect("reduce", "add up", ("probe",), ("metrics", "signal:total")),
    )

    def lower(self, to: Lowering) -> None:
        """Have the layers measured, and add up what they deliver."""
        from trainc.compiler.layers.registry import site_of

        names: list[str] = []
        for entry in to.modules():
            site = site_of(entry.name, to.model.get_submodule(entry.name))
            to.measure(site)
            names += [name for name in site.parameters if name is not None]
        to.action(Total(to.label, names))


@dataclass(eq=False)
class Total(Action):
    """Phase 7: add up the squared norms."""

    phase = Phase.REDUCE
    name: str
    parameters: Sequence[str]

    def run(self, step: Step) -> None:
        """Set the signal."""
        squares = [c.sq_norms[n].sum() for c in step.contributions for n in self.parameters]
        total = sum(float(square) for square in squares)
        step.metrics[f"{self.name}.total"] = step.signals[f"{self.name}.total"] = total
