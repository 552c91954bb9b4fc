"""What masks share that choose by the inputs of layers: sums over the inputs of a few steps, and whose weights fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.mask._base import (
    SCOPES,
    SpectralMask,
    StructureField,
    n_of_m,
    structure_of,
)
from trainc.dsl.reading.construct import Fraction, Problem
from trainc.dsl.values.value_json import Number
from trainc.runtime.step.action import ActionState, ClauseFailed
from trainc.runtime.step.observer import Observer
from trainc.runtime.storage.form import Count, Form, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.mask.entry_choice import Choice
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.observer import Seen
    from trainc.runtime.step.record import Step

Keep = Callable[["Tensor", "Tensor", float], "Tensor"]
"""Given a weight (out, in), the sum over its layer's inputs and a density, where entries are kept, bool (out, in).

It may move the weight in place.
"""


class CalibratedMask(SpectralMask):
    """Base of the masks that choose entries of the weights of linear layers by what these are given at first."""

    identity: ClassVar = {"density": "100%"}

    density: Fraction | None = Field(
        default=None, description="fraction of the entries that is kept, above 0%"
    )
    structure: StructureField = Field(
        default="element",
        description="`element`, or `n_m(n, m)`: n of each m consecutive inputs of a row are kept, and `density` is left"
        " out",
    )
    scope: Literal["tensor", "alpha", "farms", "calibrated"] = Field(
        default="tensor",
        description="whether `density` is a fraction of each weight, or of all: denser where the spectra of weights"
        f" have heavier tails, {SCOPES}",
    )
    batches: int = Field(
        default=4, ge=1, description="steps whose inputs are summed before entries are chosen"
    )

    @field_validator("density")
    @classmethod
    def _is_positive(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError("expected a fraction above 0%")
        return value

    @model_validator(mode="after")
    def _says_how_many_stay(self) -> Self:
        exact = n_of_m(self.structure)
        if self.structure != "element" and exact is None:
            raise ValueError("inputs are compared as `element` or as `n_m(n, m)`")
        if exact is None and self.density is None:
            raise ValueError("write `density`, the fraction of the entries that is kept")
        if exact is not None and self.density is not None:
            raise ValueError(
                f"`structure = {self.structure}` is a density of {exact:.4g}: remove `density`"
            )
        if exact is not None and self.by_spectra:
            raise ValueError(f"`structure = {self.structure}` is for each tensor: remove `scope`")
        return self

    @property
    def kept(self) -> float:
        """Return the fraction of the entries that is kept."""
        found = n_of_m(self.structure) if self.density is None else self.density
        assert found is not None
        return found

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report what is no weight of a linear layer, groups that do not fit, and too many steps of calibration."""
        yield from _unfit_layers(bound)
        yield from super().validate_targets(bound)
        one = structure_of(self.structure)
        for entry in bound.parameters:
            shape = entry.shape if inputs_last(entry) else entry.shape[::-1]
            if (problem := one.problem(shape)) is not None:
                yield Problem(
                    "wrong-target-kind",
                    f"`{entry.name}` {problem}",
                    field="structure",
                    help="exclude it from `on`, or choose other sizes",
                )
                return
        if bound.steps is not None and self.batches >= bound.steps:
            yield Problem(
                "never-acts",
                f"entries are chosen after {self.batches} steps, and {bound.steps:g} steps are left of the run",
                field="batches",
                help="write fewer `batches`",
            )

    def prune(self, to: Lowering, of: Callable[[Tensor], Tensor], axes: int, keep: Keep) -> None:
        """Sum a function of inputs, as `calibrate` does, and choose by the sums when they are known."""
        from trainc.compiler.constructs.mask._semi_structured import compute_sparse
        from trainc.runtime.mask.entry_choice import Choice

        entries, sums = to.parameters(), calibrate(to, self.batches, of, axes)
        choice = Choice(**self.shared(to))
        found = to.mask(
            [entry.name for entry in entries],
            ByInputs(entries, sums, choice, keep),
            Number(self.kept),
            choice=choice,
            together=self.by_spectra,
        )
        compute_sparse(to, found.masks.values(), structure_of(self.structure))


def _unfit_layers(bound: Targets) -> Iterator[Problem]:
    """Report the first parameter that is of no linear layer, or of several."""
    for entry in bound.parameters:
        what = None
        if entry.name.rpartition(".")[2] != "weight" or not {"Linear", "Conv1D"} & {*entry.types}:
            what = "is not the weight of a linear layer, and entries are compared by what such a layer is given"
        elif len(entry.modules) > 1:
            what = f"is shared by `{entry.modules[0]}` and `{entry.modules[1]}`, which are given different inputs"
        elif entry.is_never_called:
            what = "is the output projection of an nn.MultiheadAttention, whose inputs are not seen"
        if what is not None:
            yield Problem(
                "wrong-target-kind",
                f"`{entry.name}` {what}",
                help="select weights of linear layers, such as `ndim(2) & type(Linear)`, without shared ones",
            )
            return


def inputs_last(entry: ParameterEntry) -> bool:
    """Say whether a weight is (outputs, inputs), as nn.Linear has it; that of transformers' Conv1D is transposed."""
    return "Conv1D" not in entry.types


class InputSums(Observer):
    """Phase 12: sums a function of the inputs of layers over the examples of the first steps of the clause's time.

    `forms` are those of the sums, by layer; `keys` say where the layer's share of a micro-batch is found.
    """

    def __init__(self, label: str, batches: int, forms: Mapping[str, Values]) -> None:
        self.label, self.batches, self.forms = label, batches, forms
        self.keys: Mapping[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self._now: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """Whether all steps of the calibration are seen."""
        return self.steps >= self.batches

    def first_broken(self) -> str | None:
        """Return the first layer whose sums are not finite; None where all are."""
        return next((m for m, total in self.sums.items() if not total.isfinite().all()), None)

    def restart(self) -> None:
        """Sum anew, from the next step on."""
        self.sums, self.steps = {}, 0

    def ready(self) -> bool:
        """Return whether the sums can be read; where they were released before, they are summed anew."""
        if self.done and not self.sums:
            self.steps = 0
        return self.done

    def see(self, forward: Seen) -> None:
        for module, key in self.keys.items():
            for share in forward.captured.get(key, ()):
                self._now[module] = self._now[module] + share if module in self._now else share

    def found(self, replicas: ReplicaGroup | None = None) -> dict[str, float]:
        if self.done or not self._now:
            return {}
        if replicas is not None:
            self._now = {module: share.clone() for module, share in self._now.items()}
            replicas.sum_in_place(list(self._now.values()))
        for module, share in self._now.items():
            self.sums[module] = self.sums[module] + share if module in self.sums else share
        self.steps += 1
        return {}

    def forget(self) -> None:
        self._now = {}

    def memory(self) -> int:
        """Return the bytes of the sums while they are held."""
        size = {"float32": 4, "float64": 8}
        return sum(size[f.dtype] * math.prod(n or 0 for n in f.shape) for f in self.forms.values())

    def release(self) -> None:
        """Free the sums, which nothing reads any more."""
        self.sums = {}

    def state_dict(self) -> ActionState:
        if not self.steps:
            return {}
        return {"steps": self.steps} | {f"sum/{module}": s for module, s in self.sums.items()}

    def state_form(self) -> Form:
        return Record({"steps": Count(1)}, {f"sum/{m}": form for m, form in self.forms.items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        foreign = {key.partition("/")[2] for key in state} - {"", *self.forms}
        if foreign:
            raise ValueError(
                f"{self.name}: the checkpoint has sums over inputs of `{min(foreign)}`, whose weight this clause does"
                " not select"
            )
        self.steps = int(state.get("steps", 0))
        self.sums = {m: state[f"sum/{m}"] for m in self.forms if f"sum/{m}" in state}

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        kept = {key.partition("/")[2] for key in state} - {""}
        if not kept or kept == self.forms.keys():
            self.load_state_dict(state)
            return None
        self.load_state_dict({})
        return f"{self.label}: sums the inputs of layers anew, because its selection changed"


class ByInputs:
    """The choice by weights and sums over inputs: see `Lowering.mask`."""

    def __init__(
        self, entries: Sequence[ParameterEntry], sums: InputSums, choice: Choice, keep: Keep
    ) -> None:
        self.entries, self.sums, self.choice, self.keep = entries, sums, choice, keep

    def __call__(self, step: Step, density: float) -> dict[str, Tensor] | None:
        if not self.sums.ready() or self._finds_broken(step):
            return None
        found, densities = {}, densities_of(self.choice, self.entries, density)
        for entry in self.entries:
            weight, last = step.parameters[entry.name].detach(), inputs_last(entry)
            rows = weight if last else weight.T
            try:
                kept = self.keep(rows, self.sums.sums[entry.module], densities[entry.name])
            except ValueError as error:
                raise ClauseFailed(self.sums.label, f"`{entry.name}`: {error}") from error
            found[entry.name] = kept if last else kept.T.contiguous()
        self.sums.release()
        return found

    def _finds_broken(self, step: Step) -> bool:
        """Note the first weight or sum that is not finite, by which nothing can be chosen; say if there is one."""
        from trainc.runtime.mask.scores import not_finite

        label, module = self.sums.label, self.sums.first_broken()
        if module is not None:
            self.sums.restart()
            step.notes.append(
                f"{label}: `{module}` was given inputs that are not finite, so nothing is chosen in this step, and"
                f" inputs are summed anew over {self.sums.batches} steps"
            )
            return True
        names = (entry.name for entry in self.entries)
        name = next((n for n in names if not step.parameters[n].detach().isfinite().all()), None)
        if name is not None:
            step.notes.append(not_finite(label, name))
        return name is not None


def calibrate(to: Lowering, batches: int, of: Callable[[Tensor], Tensor], axes: int) -> InputSums:
    """Sum a function of what the layers of the selected weights are given, over the first steps of the clause's time.

    `of` maps inputs (..., features) to a tensor with `axes` axes of that length, a sum over all others.
    """
    from trainc.runtime.schedule.gate import Gate, UntilDone

    to.refuse_times("entries are chosen once, for the rest of the run", "until", "every")
    forms = {}
    for entry in to.parameters():
        dtype = "float64" if entry.dtype == "float64" else "float32"
        shape = (entry.shape[int(inputs_last(entry))],) * axes
        forms[entry.module] = Values(shape, dtype, finite=True)
    sums = InputSums(to.label, batches, forms)
    gate = UntilDone(other=to.gate() or Gate(), done=lambda: sums.done)
    sums.keys = to.capture_inputs(forms, of, gate)
    to.observe(sums, gate=gate)
    return sums


def densities_of(
    choice: Choice, entries: Iterable[ParameterEntry], density: float
) -> Mapping[str, float]:
    """Return the density of each weight, at least that of one entry."""
    shapes = {entry.name: entry.shape for entry in entries}
    if choice.allocate is None:
        return dict.fromkeys(shapes, density)
    found = choice.allocate(shapes, density)
    return {name: max(found[name], 1 / math.prod(shape)) for name, shape in shapes.items()}


def wide_rows(x: Tensor) -> Tensor:
    """Return inputs (..., features) as rows (n, features), in float32 at least."""
    import torch

    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def kept_of(columns: int, density: float | None, structure: str) -> tuple[int, int]:
    """Return how many inputs are kept of how many: a density of all of them, or n of each m.

    Raises ValueError for a density and a structure that make no sense, or not together.
    """
    from trainc.runtime.mask.structures import Structure

    one = Structure.of(structure)
    if one.kind not in ("element", "n_m"):
        raise ValueError(f"inputs are compared as single entries or n of each m, not by `{one}`")
    density = one.density if density is None else density
    if density is None or not 0 < density <= 1:
        given = "missing" if density is None else f"{density:g}"
        raise ValueError(f"`density` is {given}: expected a fraction above 0, at most 1")
    if (problem := one.problem((1, columns))) is not None:
        raise ValueError(f"the weight {problem}")
    if one.density not in (None, density):
        raise ValueError(f"`{one}` keeps {one.density:g} of the entries: leave `density` out")
    if one.size is not None:
        return one.size
    return max(min(1, columns), columns - int((1 - density) * columns + 1e-9)), columns
