"""Distance: how far the weights are from where they began, and whether it grows as the logarithm of time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.compiler.constructs.observe.weights._copies import Start, note_non_finite, record
from trainc.compiler.constructs.observe.weights._laws import Fits
from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table
    from trainc.runtime.step.record import Step

LAWS = ("log", "sqrt")
"""A random walk on a random landscape, and one in which every step is as long and of its own direction."""


class Distance(Construct):
    """Reports the L2 distance of the selected weights from the start, and how it grows; changes nothing.

    The start is what the weights are before the first update in which the clause acts, and t counts
    updates from there. Per parameter and over the selection the distance is |w_t - w_0|. That of the
    selection is fitted by least squares to a + b ln(t) and a + b sqrt(t), with the intervals of
    `observe norm_growth`: a random walk on a random landscape moves away as ln(t) while the rate is
    high, a walk of independent steps as sqrt(t). From three observations on, `log` and `sqrt` are
    the r2 of these laws, `fit` is the larger one, and `slope` is b of that law.

    It keeps one more copy of the weights, in checkpoints too.
    """

    cite: ClassVar = (
        "Hoffer, Hubara and Soudry, Train longer, generalize better, NeurIPS 2017, arXiv:1705.08741"
    )
    usage: ClassVar = "observe distance on ndim(2) every 50 steps"
    default_every: ClassVar = "50 steps"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {
        "": Signal("L2 distance of the selected weights from the start", title=""),
        "log": "r2 of the fit to ln(t), 0 to 1",
        "sqrt": "r2 of the fit to sqrt(t), 0 to 1",
        "fit": "the larger of these, 0 to 1",
        "slope": "slope of the law that fits best",
        "slope_low": "lower end of the 95% interval of `slope`",
        "slope_high": "upper end of the 95% interval of `slope`",
    }
    effects: ClassVar = (
        Effect("rates", "keep the weights at the start", ("params",)),
        Effect(
            "observe",
            "measure the distance from the start",
            ("params", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    @staticmethod
    def reference(start: Sequence[Tensor], now: Sequence[Tensor]) -> float:
        """Return the distance of a selection by definition, in float64."""
        squares = [
            (w.detach().double() - v.detach().double()).square().sum()
            for v, w in zip(start, now, strict=True)
        ]
        return math.sqrt(float(sum(squares)))

    def lower(self, to: Lowering) -> None:
        """Copy the weights before the first update, and observe after updates."""
        start = Start(f"{to.label}.start", to.parameters())
        to.action(start)
        to.action(Observe(to.label, start))

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return the picture of the distance with its laws."""
        from trainc.compiler.constructs.observe.weights._law_pictures import law_panel

        return law_panel(clauses, runs, "", LAWS, from_first=True)

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterable[Table]:
        """Return the table of the laws at the end of a run."""
        from trainc.compiler.constructs.observe.weights._law_pictures import law_table

        return law_table(label, "", LAWS, records, from_first=True)


class Observe(Action):
    """Phase 12: one pass over the weights and their copies."""

    phase = Phase.OBSERVE
    reads_shards = True

    def __init__(self, name: str, start: Start) -> None:
        self.name, self.start = name, start
        self.fits = Fits(LAWS)
        self.last = 0.0

    def run(self, step: Step) -> None:
        distances, broken = {}, []
        weights = {name: step.parameters[name].detach() for name in self.start.copies}
        for name, (square, nonfinite) in self._squares(weights).items():
            distances[name] = math.sqrt(square)
            broken += [name] if nonfinite else []
        note_non_finite(step, self.name, broken)
        step.series[self.name] = distances
        distance = math.hypot(*distances.values())
        # The clock counts the update just made only after this phase.
        self.fits.add(step.clock.steps + 1 - self.start.updates, distance)
        self.last = distance if math.isfinite(distance) else self.last
        step.metrics[self.name] = step.signals[self.name] = distance
        record(step, self.name, {**self.fits.r2, **self.fits.signals()})

    def _squares(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[float, bool]]:
        """Return of each parameter the squared distance, and whether an entry is not finite."""
        import torch

        from trainc.kernels.parameter.multi_norm import multi_norm
        from trainc.runtime.processes.sharded import local, sum_over_shards

        rows, copies = [], self.start.copies
        for name, now in weights.items():  # one by one: a copy of all of them is not needed
            wide = torch.promote_types(now.dtype, torch.float32)
            copies[name] = copies[name].to(now.device)
            rows.append(multi_norm([local(now.to(wide) - copies[name])]))
        found = torch.cat([row.to(rows[0].device) for row in rows])
        sum_over_shards(found, [*weights.values()])
        return {
            name: (square, bool(odd))
            for name, (square, _, _, odd) in zip(weights, found.tolist(), strict=True)
        }

    def state_dict(self) -> ActionState:
        return {"last": self.last, **self.fits.state_dict()} if self.start.copies else {}

    def state_form(self) -> Form:
        return Record({"last": Number(0), **self.fits.state_form()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = float(state.get("last", 0.0))
        self.fits.load_state_dict(state)

    def summary(self) -> str | None:
        if not self.start.copies:
            return None
        return (
            f"{self.name}: the weights ended {self.last:.4g} from their start{self.fits.summary()}"
        )
