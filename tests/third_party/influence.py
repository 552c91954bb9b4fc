"""How much single examples influence the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table
    from trainc.runtime.step.record import Step


class Influence(Construct):
    """Measures self-influence: each example's squared gradient norm, and the largest part that one example has."""

    cite: ClassVar = "Pruthi et al., NeurIPS 2020, arXiv:2002.08484"
    usage: ClassVar = "noise_scale influence on type(LayerNorm) from 2 steps every 3 steps"
    targets: ClassVar = "modules"
    signals: ClassVar = {
        "": Signal("largest part of one example in the sum of squared norms", title=""),
        "total": "sum of squared norms",
    }
    effects: ClassVar = (
        Effect("backward", "measure", ("loss",), ("probe",)),
        Effect("reduce", "compare", ("probe",), ("metrics", "signal:", "signal:total")),
    )

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterator[Panel]:
        """Draw the sum over the run."""
        from trainc.runtime.report.axes import Panel, curve

        def draw(axes: Axes) -> None:
            for clause in clauses:
                at, values = clause.run.series(f"{clause.label}.total")
                curve(axes, at, values, color=clause.run.color, label="sum")

        yield Panel("Influence of all examples", draw)

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
        """Give the sum at the end."""
        from trainc.runtime.report.tables import Table

        total = next(r[f"{label}.total"] for r in reversed(records) if f"{label}.total" in r)
        yield Table(("influence", "sum"), (("of all examples", f"{total:.3g}"),))

    def lower(self, to: Lowering) -> None:
        """Have the layers measured, and compare the examples."""
        from trainc.compiler.layers.registry import site_of
        from trainc.compiler.method.statistic import OfExamples

        names = [entry.name for entry in to.modules()]
        sites = tuple(site_of(name, to.model.get_submodule(name)) for name in names)
        to.statistic(OfExamples(sites))
        parameters = [name for site in sites for name in site.parameters if name is not None]
        to.action(Largest(to.label, parameters))


@dataclass(eq=False)
class Largest(Action):
    """Phase 7: compare the examples."""

    phase = Phase.REDUCE
    name: str
    parameters: Sequence[str]

    def run(self, step: Step) -> None:
        """Set the signals."""
        norms = [
            sum(float(one.sq_norms[name][i]) for name in self.parameters)
            for one in step.contributions
            for i in range(len(one.weights))
        ]
        found = {self.name: max(norms) / sum(norms), f"{self.name}.total": sum(norms)}
        step.metrics.update(found)
        step.signals.update(found)
