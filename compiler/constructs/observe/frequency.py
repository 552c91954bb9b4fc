"""Frequency: which frequencies of a target function are learned when, on a probe, without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.observe._spectrum import (
    SMALL,
    Probe,
    as_columns,
    as_rows,
    check_inputs,
    gaussian_filter,
    grid,
    projection,
    sizes,
    spearman,
    visible,
)
from trainc.compiler.errors import FieldError
from trainc.compiler.model.import_path import ImportProblem, import_callable
from trainc.dsl.reading.construct import Construct, Effect, ImportPath, Signal
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table
    from trainc.runtime.step.record import Step

NAMED = 6
"""The most frequencies that the summary names."""
NOTHING = 1e-9
"""The amplitude, as a fraction of the largest, below which there is nothing."""


class Frequency(Construct):
    """Reports which frequencies of a target function the model has learned, and when; changes nothing.

    `probe` is a function of your own that returns inputs x and targets y. It is called when the spec is compiled; what
    it draws at random is the same in every run. The model passes the inputs in evaluation mode, and with F and Y the
    transforms of its outputs and of the targets the error of a frequency k is |F_k - Y_k| / (1e-5 + |Y_k|), where |.|
    is over all outputs together; with `compare = magnitudes` it is ||F_k| - |Y_k|| / (1e-5 + |Y_k|), as published,
    which a wrong phase leaves at 0. Targets that are class indices are compared with the probabilities of the softmax.
    The report shows the amplitude |Y_k| beside the order: where the amplitudes fall with k the order may be theirs.

    `method` says what a frequency is:

    - `grid`: x is a uniform grid in one dimension, (n,) or (n, 1), without the end of the period; F is the
      discrete Fourier transform.
    - `projection`: x is real, of any shape; p is its first principal component, scaled to 0..1, and
      F_k = 1/n sum y exp(-2 pi i k p). Only small k mean something.
    - `filter`: x is real, of any shape, at most 2000 samples; the low part of y is its mean over all samples with
      the weights exp(-|x_i - x_j|^2 / (2 width^2)), the high part is the rest, and the errors are relative L2 errors.

    A probe of token ids is refused: none of the three has a meaning there. Of several processes that average
    gradients all report what the first one finds: running statistics of a batch norm are each process's own.
    """

    cite: ClassVar = (
        "Ma, Xu and Zhang, Frequency Principle in Deep Learning Beyond Gradient-descent-based Training, 2021,"
        " arXiv:2101.00747; Xu et al., Frequency Principle, 2019, arXiv:1901.06523"
    )
    usage: ClassVar = 'observe frequency every 200 steps { probe = "examples.data:curve_points", threshold = 0.1 }'
    default_every: ClassVar = "200 steps"
    signals: ClassVar = {
        "learned": Signal("fraction of frequencies that were below `threshold`", title="learned"),
        "order": Signal(
            "Spearman correlation of frequency and step of the first error below `threshold`, -1 to 1; those not yet"
            " below come last. 1: low frequencies first; 0 also while all are equal",
            title="order",
        ),
        "low": "error of the lowest frequency",
        "high": "error of the highest frequency",
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "pass a probe and compare its spectrum with the target's",
            ("params", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    probe: ImportPath = Field(
        description="function that returns inputs and targets, as `module:callable`"
    )
    method: Literal["grid", "projection", "filter"] = Field(
        default="grid", description="what a frequency of the probe is"
    )
    compare: Literal["coefficients", "magnitudes"] = Field(
        default="coefficients", description="whether phases count as well"
    )
    peaks: Literal["local", "all"] | None = Field(
        default=None,
        description="which frequencies: those at local maxima of the target's amplitude, or all; of either those of at"
        " least 1% of the largest amplitude. Default: `local` with `grid`, `all` with `projection`",
    )
    highest: int | None = Field(
        default=None,
        ge=1,
        description="highest frequency. Default: 39 with `grid`, or half the points; 10 with `projection`",
    )
    threshold: float = Field(
        default=0.1, gt=0, description="error below which a frequency is learned"
    )
    width: float | None = Field(
        default=None, gt=0, description="with `filter`: the width of the low-pass, in units of x"
    )

    @model_validator(mode="after")
    def _has_fields_of_its_method(self) -> Self:
        if (self.width is None) == (self.method == "filter"):
            raise ValueError("`width` goes with `method = filter`, and only with it")
        if self.method == "filter" and (
            self.highest or self.peaks or self.compare != "coefficients"
        ):
            raise ValueError(
                "`highest`, `peaks` and `compare` are not of `method = filter`: remove them"
            )
        return self

    def lower(self, to: Lowering) -> None:
        """Get the probe, and pass it by a copy of the model that has the model's own weights."""
        probe = self.made_probe()
        twin = to.companion("twin", since="call", parameters=())
        to.action(Spectrum(to.label, self, probe, twin))

    def made_probe(self) -> Probe:
        """Call the probe's function, which may draw random numbers; raises FieldError for what is no probe."""
        import torch

        from trainc.runtime.storage.random_streams import seeded

        try:
            with seeded(0):
                found = import_callable(self.probe, "probe")()
        except ImportProblem as error:
            raise FieldError("probe", str(error)) from error
        except Exception as error:  # whatever the user's function raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise FieldError("probe", f"`{self.probe}` failed: {reason}") from error
        pair = tuple(found) if isinstance(found, tuple | list) else ()
        if len(pair) != 2 or not all(isinstance(one, torch.Tensor) and one.dim() for one in pair):
            raise FieldError(
                "probe",
                f"`{self.probe}` must return two tensors, inputs and targets of the same samples",
            )
        try:
            return self.probe_of(*pair)
        except ValueError as error:
            name = getattr(error, "field", "probe")
            raise FieldError(name, str(error)) from error

    def probe_of(self, x: Tensor, y: Tensor) -> Probe:
        """Return the probe of inputs (n, ...) and targets (n, ...); raises ValueError for what has no spectrum."""
        check_inputs(x, y)
        targets, rows = as_columns(y), as_rows(x)
        if not bool(rows.isfinite().all() and targets.isfinite().all()):
            raise ValueError("the probe has numbers that are not finite")
        if self.method == "grid":
            names, parts = grid(rows, self.highest)
        elif self.method == "projection":
            names, parts = projection(rows, self.highest)
        else:
            names, parts = gaussian_filter(rows, self.width or 1.0)
        every: list[float] = sizes(parts(targets)).tolist()
        count = len(names)
        if max(every[:count]) <= NOTHING * max(1.0, float(targets.abs().max())):
            raise ValueError("the targets of the probe are 0 at every frequency that is shown")
        if self.method == "filter" and min(every) <= NOTHING * max(every):
            side = "wide" if every[0] < every[1] else "small"
            raise FieldError("width", f"the width is too {side}: one part of the target is 0")
        peaks = self.peaks or ("local" if self.method == "grid" else "all")
        shown = (
            [*range(count)] if self.method == "filter" else visible(every, count, peaks == "local")
        )
        return Probe(
            x,
            targets,
            not y.is_floating_point(),
            tuple(names[k] for k in shown),
            tuple(every[k] for k in shown),
            tuple(shown),
            parts,
        )

    def errors(self, probe: Probe, output: Tensor) -> list[float]:
        """Return the error of each shown frequency; raises ValueError for outputs of another shape."""
        added = 0.0 if self.method == "filter" else SMALL
        return probe.errors(output, magnitudes=self.compare == "magnitudes", added=added)

    def reference(self, x: Tensor, y: Tensor, output: Tensor) -> dict[str, float]:
        """Return the error of each shown frequency of outputs for a probe, both (n, ...), by its name."""
        probe = self.probe_of(x, y)
        return dict(zip(probe.names, self.errors(probe, output), strict=True))

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return for each run the errors over time, and the order beside the amplitudes."""
        from trainc.compiler.constructs.observe._frequency_pictures import frequency_panels

        return frequency_panels(clauses, runs)

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterable[Table]:
        """Return the table of the frequencies: amplitude of the target, error at the end, and when it was learned."""
        from trainc.compiler.constructs.observe._frequency_pictures import course_of
        from trainc.runtime.report.number_text import format_number
        from trainc.runtime.report.tables import Table

        rows = [
            (name, format_number(size), format_number(error), "-" if at is None else f"{at:,.0f}")
            for name, size, error, at in course_of(label, records)
        ]
        if rows:
            learned = f"step of the first error below {self.threshold:g}"
            yield Table((label, "amplitude of the target", "error", learned), tuple(rows))


class Spectrum(Action):
    """Phase 12: pass the probe, and keep when each frequency was below the threshold first."""

    phase = Phase.OBSERVE
    figures = ("last",)

    def __init__(self, name: str, construct: Frequency, probe: Probe, twin: Companion) -> None:
        self.name, self.construct, self.probe, self.twin = name, construct, probe, twin
        self.below: dict[str, int] = {}
        """The update after which the error of a frequency was below the threshold first."""
        self.last: list[float] = []

    def run(self, step: Step) -> None:
        self.last = self.construct.errors(self.probe, self._outputs(step))
        if step.replicas is not None:  # running statistics are each process's own; rules read these
            self.last = step.replicas.gather_rows(self.last)[0].tolist()
        for name, error in zip(self.probe.names, self.last, strict=True):
            if error < self.construct.threshold and name not in self.below:
                self.below[name] = (
                    step.clock.steps + 1
                )  # the clock counts the update after this phase
        found = {"learned": len(self.below) / len(self.probe.names)}
        found |= {"order": self.order, "low": self.last[0], "high": self.last[-1]}
        named = {f"{self.name}.{signal}": value for signal, value in found.items()}
        step.metrics.update(named)
        step.signals.update(named)
        rows = {"error": self.last, "amplitude": self.probe.amplitudes}
        for what, values in rows.items():
            step.series[f"{self.name}.{what}"] = dict(zip(self.probe.names, values, strict=True))
        step.series[f"{self.name}.below"] = {n: float(at) for n, at in self.below.items()}

    def _outputs(self, step: Step) -> Tensor:
        """Return what the model of now gives for the probe; raises FieldError where it does not take it."""
        import torch

        self.twin.copy()  # of buffers; the parameters are the model's own
        given = self.probe.inputs
        like = next((p for p in step.parameters.values() if p.is_floating_point()), given)
        try:
            return self.twin.logits(given.to(like.device, like.dtype))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's model raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise FieldError(
                "probe",
                f"the model does not take the inputs {[*given.shape]} of the probe: {reason}",
            ) from error

    @property
    def order(self) -> float:
        """Return the rank correlation of frequency and first time."""
        times = [self.below.get(name, math.inf) for name in self.probe.names]
        return spearman([*map(float, range(len(times)))], times)

    def state_dict(self) -> ActionState:
        return {f"below/{name}": at for name, at in self.below.items()}

    def state_form(self) -> Form:
        return Record({}, {f"below/{name}": Count() for name in self.probe.names})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.below = {key.partition("/")[2]: int(at) for key, at in state.items()}

    def summary(self) -> str | None:
        if not self.last:
            return None
        parts = [
            f"{name} (amplitude {size:.3g}) "
            + (
                f"at step {self.below[name]:,}"
                if name in self.below
                else f"not yet, error {error:.3g}"
            )
            for name, size, error in zip(
                self.probe.names, self.probe.amplitudes, self.last, strict=True
            )
        ]
        if len(parts) > NAMED:
            parts = [*parts[:NAMED], f"and {len(parts) - NAMED} more"]
        text = f"{', '.join(parts)}; order {self.order:.2f}"
        return f"{self.name}: below {self.construct.threshold:g}: {text}"
