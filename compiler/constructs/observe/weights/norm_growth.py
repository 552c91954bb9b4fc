"""Norm growth: the norm of the weights, their steps, and the law that the norm follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.observe.weights._copies import Copies, note_non_finite, record, sums
from trainc.compiler.constructs.observe.weights._laws import LAWS, Fits
from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import ActionState, Phase
from trainc.runtime.storage.form import Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table
    from trainc.runtime.step.record import Step


class NormGrowth(Construct):
    """Reports the norm of the selected weights, how they move and how the norm grows; changes nothing.

    With w the weights, v those of the previous observation and d = w - v, per parameter and over
    the selection: norm |w|, step |d|, alignment cos(d, v), direction cos(w, v). A cosine with a
    zero vector is 0, and the first observation has norms only. The norm of the selection is fitted
    by least squares to a + b f(t) with f(t) = sqrt(t), t, ln(t) and t^(1/4), where t counts
    updates; from three observations on, `fit` is the best r2, and `slope` is b of that law. Weights
    whose steps are along themselves grow exponentially; steps at right angles to the weights, with
    rates of 1/sqrt(t), give sqrt(t).

    The 95% interval of a slope is that of least squares with Student's t, for as many independent
    observations as n (1 - r) / (1 + r), where r is the correlation of neighbouring residuals: norms
    of one run follow each other, and an interval for n independent ones would be far too narrow.
    Where a law does not hold, neither does its interval. `trainc report` has the table of all laws.
    """

    cite: ClassVar = (
        "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    )
    usage: ClassVar = "observe norm_growth every 100 steps { params = encoder }"
    default_every: ClassVar = "100 steps"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {
        "norm": Signal("L2 norm of the selected weights", title="norm"),
        "step": "L2 norm of their change since the previous observation",
        "alignment": "cosine of that change and the previous weights, -1 to 1",
        "direction": "cosine of the weights and the previous weights, -1 to 1",
        "fit": "largest r2 of the fits of the norm, 0 to 1",
        "slope": "slope of the law that fits best",
        "slope_low": "lower end of the 95% interval of `slope`",
        "slope_high": "upper end of the 95% interval of `slope`",
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "measure norms and steps",
            ("params", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    params: Literal["all", "encoder"] = Field(
        default="all",
        description="which of the selected parameters: all, or, as published, those of the encoder, which are neither"
        " in an embedding nor in the head, and have an axis",
    )

    def reference(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
        """Return the four measures of a selection by definition, in float64."""
        import torch

        v = torch.cat([tensor.detach().double().flatten() for tensor in before])
        w = torch.cat([tensor.detach().double().flatten() for tensor in now])
        cosine = torch.nn.functional.cosine_similarity
        return {
            "norm": float(w.norm()),
            "step": float((w - v).norm()),
            "alignment": float(cosine(w - v, v, dim=0, eps=1e-300)),
            "direction": float(cosine(w, v, dim=0, eps=1e-300)),
        }

    def lower(self, to: Lowering) -> None:
        """Observe after updates; raises FieldError where nothing of the selection is in the encoder."""
        parameters = to.parameters()
        if self.params == "encoder":
            outside = {"embedding", "head"}
            found = [one for one in parameters if one.ndim and not outside & one.roles]
            if parameters and not found:
                raise FieldError(
                    "params",
                    f"all {len(parameters)} selected parameters are in embeddings or the head, or have no axis: select"
                    " others, or write `params = all`",
                )
            parameters = tuple(found)
        to.action(Observe(to.label, parameters))

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return pictures of the norm with its laws, and of the cosines."""
        from trainc.compiler.constructs.observe.weights._law_pictures import cosine_panel, law_panel

        yield from law_panel(clauses, runs, "norm", [*LAWS])
        yield from cosine_panel(clauses, runs, ("alignment", "direction"))

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterable[Table]:
        """Return the table of the laws at the end of a run."""
        from trainc.compiler.constructs.observe.weights._law_pictures import law_table

        return law_table(label, "norm", [*LAWS], records)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over some entries, d = w - v: |w|^2, |d|^2, w.d and |v|^2."""

    ww: float
    dd: float
    wd: float
    vv: float

    def measures(self, moved: bool) -> dict[str, float]:
        """Return the norm and, after a first observation, the step's length and two cosines."""
        norm = {"norm": math.sqrt(self.ww)}
        if not moved:
            return norm
        return norm | {
            "step": math.sqrt(self.dd),
            "alignment": _cosine(self.wd - self.dd, self.dd, self.vv),
            "direction": _cosine(self.ww - self.wd, self.ww, self.vv),
        }


def _cosine(dot: float, left: float, right: float) -> float:
    """Return the cosine of two vectors from their inner product and squared lengths."""
    if left == 0 or right == 0:
        return 0.0
    cosine = dot / (math.sqrt(left) * math.sqrt(right))
    return math.copysign(1.0, cosine) if abs(cosine) > 1 else cosine


class Observe(Copies):
    """Phase 12: one pass over the weights and their changes, then keep the weights."""

    phase = Phase.OBSERVE

    def __init__(self, name: str, parameters: Iterable[ParameterEntry]) -> None:
        super().__init__(name, parameters)
        self.squares: dict[str, float] = {}
        self.fits = Fits([*LAWS])
        self.first = self.last = 0.0

    def run(self, step: Step) -> None:
        weights = [step.parameters[name].detach() for name in self.sizes]
        moved = bool(self.copies)
        if moved:
            # In place, so that observing allocates nothing.
            for name, now in zip(self.sizes, weights, strict=True):
                self.copies[name] = self.copies[name].to(now.device).neg_().add_(now)
        changes = list(self.copies.values()) if moved else None
        rows = sums(weights, changes).tolist()
        found, broken = {}, []
        for name, (ww, dd, wd, nonfinite) in zip(self.sizes, rows, strict=True):
            found[name] = Sums(ww, dd, wd, self.squares.get(name, 0.0))
            broken += [name] if nonfinite else []
        note_non_finite(step, self.name, broken)
        self._measure(step, found, moved)
        self._fit(step, math.sqrt(sum(one.ww for one in found.values())))
        self.squares = {name: one.ww for name, one in found.items()}
        self.keep(step)

    def _measure(self, step: Step, found: Mapping[str, Sums], moved: bool) -> None:
        columns = zip(*((one.ww, one.dd, one.wd, one.vv) for one in found.values()), strict=True)
        record(step, self.name, Sums(*map(sum, columns)).measures(moved))
        for name, one in found.items():
            for measure, value in one.measures(moved).items():
                step.series.setdefault(f"{self.name}.{measure}", {})[name] = value

    def _fit(self, step: Step, norm: float) -> None:
        # The clock counts the update just made only after this phase.
        self.fits.add(step.clock.steps + 1, norm)
        if math.isfinite(norm):
            self.first, self.last = (self.first if self.squares else norm), norm
        record(step, self.name, self.fits.signals())
        step.metrics.update({f"{self.name}.fit.{law}": r2 for law, r2 in self.fits.r2.items()})

    def state_dict(self) -> ActionState:
        out = super().state_dict()
        if out:
            out |= {"first": self.first, "last": self.last}
            out |= {f"squared/{name}": value for name, value in self.squares.items()}
            out |= self.fits.state_dict()
        return out

    def state_form(self) -> Form:
        entries = self.copied_forms() | {"first": Number(0), "last": Number(0)}
        entries |= {f"squared/{name}": Number(0) for name in self.forms}
        return Record(entries | self.fits.state_form())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.squares = {name: float(state[f"squared/{name}"]) for name in self.copies}
        self.first, self.last = float(state.get("first", 0.0)), float(state.get("last", 0.0))
        self.fits.load_state_dict(state)

    def summary(self) -> str | None:
        if not self.copies:
            return None
        return f"{self.name}: norm {self.first:.4g} -> {self.last:.4g}{self.fits.summary()}"
