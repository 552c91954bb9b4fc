"""What masks share that choose entries of the selected parameters: a structure, and what a density is of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.dsl.reading.construct import Construct, Effect, Problem
from trainc.dsl.reading.field_types import word_or_call
from trainc.dsl.values.functions import Function
from trainc.dsl.values.value_json import Call, Number

if TYPE_CHECKING:
    from torch import nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.compiler.structure.weights import UsedWeight
    from trainc.runtime.mask.entry_choice import Choice
    from trainc.runtime.mask.structures import Structure
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords

_CALLS = {
    "block": Function({"rows": "plain", "columns": "plain"}, 2, 2),
    "n_m": Function({"n": "plain", "m": "plain"}, 2, 2),
}
StructureField = Annotated[
    str | Call, word_or_call("structure", ("element", "row", "column", "layer"), _CALLS)
]


def structure_of(value: str | Call) -> Structure:
    """Return the structure that a field names; raises ValueError for sizes that make no sense."""
    from trainc.runtime.mask.structures import Structure

    return Structure.of(value if isinstance(value, str) else call_text(value))


def call_text(call: Call) -> str:
    """Return `block(1, 16)`, however its arguments are given; raises ValueError unless both are whole numbers."""
    names = {"block": ("rows", "columns"), "n_m": ("n", "m")}[call.function]
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    sizes = [given.get(name) for name in names]
    whole = [
        int(s.value)
        for s in sizes
        if isinstance(s, Number) and s.value == int(s.value) and s.value >= 1
    ]
    if len(whole) < 2:
        raise ValueError(f"`{call}`: expected two whole numbers, 1 or more, as in `block(1, 16)`")
    return f"{call.function}({whole[0]}, {whole[1]})"


ZEROS = (
    Effect(
        "perturb",
        "choose the entries that train, zero the others",
        ("params", "clock"),
        ("params", "optimizer_state", "metrics"),
    ),
    Effect(
        "gradients", "zero the gradient of the others", ("gradient",), ("gradient",), lasting=True
    ),
    Effect("deltas", "keep the others at zero", ("delta",), ("params",), lasting=True),
)
"""What masks do that keep entries at zero."""


OVERLAP = {
    "overlap": "fraction of the entries chosen last that trained before, of all tensors together, 0 to 1"
}
"""The signal of masks that choose again and again."""
ZEROS_AGAIN = (
    Effect("perturb", ZEROS[0].action, ZEROS[0].reads, (*ZEROS[0].writes, "signal:overlap")),
    *ZEROS[1:],
)
"""What masks do that keep entries at zero, and choose again and again which."""

BY_SPECTRA = ("alpha", "farms", "calibrated")
SCOPES = (
    "by alpha as AlphaPruning has it (`alpha`, arXiv:2410.10912, its tail from the peak of the spectrum), of windows"
    " (`farms`, arXiv:2506.06280), or beside that of random weights of the shape (`calibrated`; both from the median)."
    " Alphas are measured at each choice"
)
"""What is said of the scopes by spectra."""


class PicturedMask(Construct):
    """Base of the masks whose entries a checkpoint holds: a report shows those of the largest tensor."""

    @classmethod
    def panels(
        cls, clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
    ) -> Iterable[Panel]:
        """Return a picture of the mask of the largest tensor of each run."""
        from trainc.compiler.constructs.mask._picture import mask_panels

        return mask_panels(clauses)


class EntryMask(PicturedMask):
    """Base of the masks whose entries train as a vector of their own, the others staying as they are."""

    master: bool | None = Field(
        default=None,
        description="whether 16-bit weights that train are kept in float32 besides, so that small updates add up. With"
        " `false` every update is rounded to the weight, and an optimizer that steps entries in place, as `adamw` does,"
        " holds 4 bytes an entry less. Default: `true`",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn of a choice that makes no difference to any selected parameter."""
        yield from super().validate_targets(bound)
        if self.master is None or {"float16", "bfloat16"} & {p.dtype for p in bound.parameters}:
            return
        one = bound.parameters[0]
        yield Problem(
            "no-effect",
            f"no selected parameter has 16 bits: `{one.name}` is {one.dtype}",
            field="master",
            severity="warning",
            help="remove `master`",
        )


class SpectralMask(PicturedMask):
    """Base of the masks that may give each tensor a density of its own by the spectra of weights.

    A subclass has a field `scope`, which has the words of `BY_SPECTRA`.
    """

    targets: ClassVar = "parameters"
    functions: ClassVar[tuple[str, ...]] = ("trainc.runtime.mask.allocation:allocate",)

    spread: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="with a `scope` by spectra: sparsities are in proportion to numbers from 1 - `spread`, for the"
        " smallest alpha, to 1 + `spread`, for the largest. Default: 0.2",
    )
    unit: Literal["block", "tensor"] | None = Field(
        default=None,
        description="with a `scope` by spectra: whether the weights of a block share the mean of their alphas, as"
        " published, or each has its own; what is in no block has its own. Default: `block`",
    )
    window: int | None = Field(
        default=None,
        ge=1,
        description="with `scope = farms`: rows of the windows that are measured. Default: 100",
    )

    if TYPE_CHECKING:
        scope: str

    @model_validator(mode="after")
    def _has_fields_of_its_scope(self) -> Self:
        if self.window is not None and self.scope != "farms":
            raise ValueError("`window` is of `scope = farms`: write that, or remove `window`")
        for name in ("spread", "unit") if not self.by_spectra else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is of a `scope` by spectra: add `scope = alpha`, or remove `{name}`"
                )
        return self

    @property
    def by_spectra(self) -> bool:
        """Say whether densities follow from the spectra of the weights."""
        return self.scope in BY_SPECTRA

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report what has no spectrum, and warn where there is nothing to share out."""
        if not self.by_spectra:
            return
        unfit = [*self.without_spectrum(bound, "scope")]
        yield from unfit
        if not unfit and len(self._units(bound.parameters)) < 2:
            yield Problem(
                "no-effect",
                f"all that is selected is one {self.unit or 'block'}, so that it has one density",
                field="scope",
                severity="warning",
                help="select more in `on`, write `unit = tensor`, or remove `scope`",
            )

    def without_spectrum(self, bound: Targets, field: str) -> Iterator[Problem]:
        """Report the first parameter without a spectrum, which a field would follow."""
        for name in [p.name for p in bound.parameters if p.name not in bound.inventory.weight_of][
            :1
        ]:
            message = f"`{name}` has no spectrum that `{field}` could follow: it is no matrix, or an embedding"
            help = "exclude it from `on`, for instance with `- type(Embedding)`, or write another"
            yield Problem("wrong-target-kind", message, field=field, help=f"{help} `{field}`")

    def shared(self, to: Lowering) -> dict[str, Any]:
        """Return the fields of a choice that say how its density is shared by spectra; none for another scope."""
        from trainc.runtime.mask.allocation import DensitiesByAlpha

        if not self.by_spectra:
            return {}
        weights = {p.name: to.inventory.weight_of[p.name] for p in to.parameters()}
        measure, units = partial(self._alphas, to.model, weights), self._units(to.parameters())
        densities = DensitiesByAlpha(measure, units, self.spread or 0.2)
        return {"allocate": densities, "measured": f"alphas ({self.scope})"}

    def _units(self, parameters: Iterable[ParameterEntry]) -> list[list[str]]:
        """Return the names of the parameters that share a density."""
        found: dict[object, list[str]] = {}
        for entry in parameters:
            block = None if self.unit == "tensor" else entry.place.inner_level
            found.setdefault(entry.name if block is None else block, []).append(entry.name)
        return [*found.values()]

    def _alphas(
        self, model: nn.Module, weights: Mapping[str, UsedWeight], names: Iterable[str]
    ) -> dict[str, list[float]]:
        """Return the alphas of the matrices that each of these weights consists of."""
        from trainc.compiler.structure.weights import read_units
        from trainc.kernels.parameter.figures import measure, refuse_not_finite
        from trainc.kernels.parameter.spectral_null import calibrated_alpha
        from trainc.kernels.parameter.spectral_windows import Windows

        units = {name: weights[name].units() for name in names}
        every = [unit for own in units.values() for unit in own]
        matrices = read_units(model, every)
        if self.scope == "farms":
            refuse_not_finite(matrices)
            windows = Windows(self.window or 100)
            alphas = {n: windows.alpha(m, "median", 0.5, "code") for n, m in matrices.items()}
        else:
            figures = measure(matrices, "peak" if self.scope == "alpha" else "median")
            alphas = {name: one.alpha for name, one in figures.items()}
        if self.scope == "calibrated":
            shapes = {unit.name: (unit.outputs, unit.inputs, unit.count, 1) for unit in every}
            alphas = {name: calibrated_alpha(a, shapes[name]) for name, a in alphas.items()}
        return {name: [alphas[unit.name] for unit in own] for name, own in units.items()}


class ChoosingMask(SpectralMask):
    """Base of the masks that choose entries of tensors by a score, under a structure and a budget.

    A subclass has a field `density`, a number or an expression, or None where the structure says it.
    """

    functions: ClassVar[tuple[str, ...]] = (
        *SpectralMask.functions,
        "trainc.runtime.mask.entry_choice:topk_mask",
    )
    signals: ClassVar = OVERLAP
    repeated: ClassVar = ("overlap",)

    scope: Literal["tensor", "global", "erk", "alpha", "farms", "calibrated"] = Field(
        default="tensor",
        description="whether `density` is a fraction of each tensor or of all selected tensors together: the largest"
        " of all (`global`); by Erdos-Renyi-Kernel, denser in tensors that are small (`erk`); or denser where the"
        f" spectra of weights have heavier tails, {SCOPES}",
    )
    structure: StructureField = Field(
        default="element",
        description="what is chosen as one: single entries; whole rows (an index of axis 0), columns (of axis 1) or"
        " blocks of r rows and c columns, by the L2 norm of their scores; n of each m consecutive entries along"
        " axis 1; whole tensors, by the root mean square",
    )

    if TYPE_CHECKING:
        density: Any

    @model_validator(mode="after")
    def _structure_fits(self) -> Self:
        kind = self.structure.function if isinstance(self.structure, Call) else self.structure
        exact = self.exact
        if exact is None and self.density is None:
            raise ValueError("write `density`, the fraction of the entries that is chosen")
        given = self.density.value if isinstance(self.density, Number) else self.density
        if exact is not None and given not in (None, exact):
            raise ValueError(
                f"`structure = {self.structure}` is a density of {exact:.4g}: remove `density`"
            )
        if exact is not None and self.scope != "tensor":
            raise ValueError(f"`structure = {self.structure}` is for each tensor: remove `scope`")
        if kind == "layer" and self.scope != "global":
            raise ValueError("whole tensors are chosen among all selected: write `scope = global`")
        if kind in ("row", "column") and self.scope == "global":
            raise ValueError(
                "rows and columns of different tensors differ in length: use `scope = tensor`"
            )
        return self

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report tensors that the structure does not fit, or that have no spectrum."""
        yield from super().validate_targets(bound)
        yield from structure_problems(bound, self.structure)

    @property
    def exact(self) -> float | None:
        """Return the density that the structure says; None where `density` does."""
        return n_of_m(self.structure)

    def choice(self, to: Lowering, **how: Any) -> Choice:
        """Return the choice by this structure and scope; `how` are further fields of it."""
        from trainc.runtime.mask.budget import erk_densities
        from trainc.runtime.mask.entry_choice import Choice
        from trainc.runtime.mask.structures import rms

        if self.structure == "layer":
            how.setdefault("reduce", rms)
        if self.scope == "erk":
            how.setdefault("allocate", erk_densities)
        how |= self.shared(to)
        return Choice(structure_of(self.structure), self.scope == "global", **how)


def n_of_m(structure: str | Call) -> float | None:
    """Return the density of `n_m(n, m)`, None of others; raises ValueError for sizes that make no sense."""
    if not isinstance(structure, Call):
        return None
    text = call_text(structure)
    first, second = map(int, text.partition("(")[2].rstrip(")").split(","))
    if structure.function != "n_m":
        return None
    if first > second:
        raise ValueError(f"`{structure}`: expected at most {second} of {second}")
    return first / second


def structure_problems(bound: Targets, structure: str | Call) -> Iterator[Problem]:
    """Report the first tensor that has no such units."""
    if structure == "element":
        return
    one = structure_of(structure)
    for parameter in bound.parameters:
        if (problem := one.problem(parameter.shape)) is not None:
            help = (
                "select among `ndim(2)`"
                if parameter.ndim < 2
                else "exclude it from `on`, or choose other sizes"
            )
            yield Problem("wrong-target-kind", f"`{parameter.name}` {problem}", help=help)
            return
