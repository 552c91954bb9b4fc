"""The base class of constructs: a subclass is the schema, the documentation and the meaning of one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from trainc.dsl.reading.field_types import (
    Density,
    Duration,
    Fraction,
    ImportPath,
    ModuleSelector,
    NestedClause,
    Period,
    Probability,
    Proportion,
    Range,
    Samples,
    SamplesOrAuto,
    Schedule,
    ScopedDecayRates,
    ScopedNumbers,
    ScopedSchedules,
    Selector,
    ShrinkingFactor,
    SignedSchedule,
)
from trainc.dsl.reading.fields import read_field, untyped_value
from trainc.dsl.reading.signal import Signal
from trainc.dsl.text.language_rules import RuleExplanation
from trainc.dsl.text.record import Record
from trainc.dsl.text.rules import check_names
from trainc.dsl.text.vocabulary import KINDS, PHASES, RESOURCES, SELECTED
from trainc.dsl.values.value_json import to_json

__all__ = [
    "KINDS",
    "PHASES",
    "RESOURCES",
    "Catalog",
    "Construct",
    "Density",
    "Duration",
    "Effect",
    "Fraction",
    "ImportPath",
    "ModuleSelector",
    "NestedClause",
    "Period",
    "Probability",
    "Problem",
    "Proportion",
    "Range",
    "RuleExplanation",
    "Samples",
    "SamplesOrAuto",
    "Schedule",
    "ScopedDecayRates",
    "ScopedNumbers",
    "ScopedSchedules",
    "Selector",
    "ShrinkingFactor",
    "Signal",
    "SignedSchedule",
]


_SIGNAL = "signal:"


class Effect(Record):
    """One action of a construct: its phase of the step, and what it reads and writes.

    `lasting`: it acts in every step from the clause's start on, also between its times and when they are over.
    """

    phase: str
    action: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    lasting: bool = False

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(
                f"`{self.phase}` is not a phase of a step: write one of {', '.join(PHASES)}"
            )
        for resource in (*self.reads, *self.writes):
            if resource not in RESOURCES and not resource.startswith(_SIGNAL):
                known = ", ".join(sorted(RESOURCES))
                raise ValueError(
                    f"`{resource}` is not a resource of a step: write one of {known}, or `{_SIGNAL}<name>`"
                )


class Problem(Record):
    """A mistake that a construct found in its clause or its targets, placed on one field of the clause.

    `field` None means what `on` selects, the empty string the whole clause.
    """

    rule: str
    message: str
    field: str | None = None
    notes: tuple[str, ...] = ()
    help: str | None = None
    severity: Literal["error", "warning"] = "error"


class Construct(BaseModel):
    """One construct of the language, declared in a file of its own."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        defer_build=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    cite: ClassVar[str] = ""
    """The source: the paper, the equation. Its page prints it."""
    usage: ClassVar[str] = ""
    """An example that checks as it stands; the conformance suite trains it."""
    targets: ClassVar[Literal["none", "modules", "parameters"]] = "none"
    """Whether `on` selects modules or parameters."""
    default_on: ClassVar[str | None] = None
    """The selector where a spec leaves `on` out."""
    default_every: ClassVar[str | None] = None
    """How often a clause acts where a spec leaves `every` out, such as `100 steps`; None: whenever it can."""
    identity: ClassVar[Mapping[str, str]] = {}
    """Field values that make the clause do nothing. The compiler drops such a clause and says so."""
    signals: ClassVar[Mapping[str, Signal | str]] = {}
    """What it measures, for `when` rules: `label.signal`, and `label` for the signal with the empty name. A text, or
    `Signal(description, unit, ends, title, logarithmic)`: with a title the display and `trainc report` show it with
    unit and interval, in rows and as a curve."""
    repeated: ClassVar[tuple[str, ...]] = ()
    """The signals that a clause measures from its second time on, so that it needs an `every`."""
    evaluated: ClassVar[tuple[str, ...]] = ()
    """What evaluations report of a loss besides its mean, such as `accuracy`: rules read it as `eval_accuracy`."""
    effects: ClassVar[tuple[Effect, ...]] = ()
    """Where it acts, and what it reads and writes, in words of dsl/text/vocabulary.py and `signal:<name>`: the order of
    the step, the conflicts, the plan's table."""
    rules: ClassVar[Mapping[str, RuleExplanation]] = {}
    """The rules that its `Problem`s name besides the language's: `{"odd-thing": RuleExplanation(what, why, fix)}`.
    `trainc explain` and docs/diagnostics.md find them."""
    division: ClassVar[str | None] = None
    """Why the update depends on how a step is divided into micro-batches; None where every division gives the same.
    Its page says so, and the plan of a spec that divides its steps."""
    without_gradient: ClassVar[str | None] = None
    """Why a parameter that trains may have no gradient in the first two steps; None where each has one.
    Its page says so."""
    joins: ClassVar[str] = "no"
    """Whether it joins the processes that a launcher started for `trainc run`: `no`, `by clause`, or `by default`, for
    the one that does so in a spec that says nothing. Then it has the methods of compiler/method/joining.py. `apart`:
    each of them trains a replica of its own, on steps of its own."""
    harmless: ClassVar[tuple[str, ...]] = ()
    """Fields that change no number of a run, so that one which is resumed may have others."""
    open_fields: ClassVar[bool] = False
    """Whether a clause may have fields that are not declared, such as arguments of a callable."""
    nests: ClassVar[str | None] = None
    """The field whose value is a clause of the same kind, on what trains and this clause does not select:
    `others = name { ... }`. It becomes a clause of its own, and the construct never sees it."""
    functions: ClassVar[tuple[str, ...]] = ()
    """Its arithmetic as plain functions, `module:name`; `trainc.functional` offers them."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Take kind and name from the file, `.../regularize/outputs/pace.py`; raise ValueError for unknown words.

        The kind is the folder, or the one around it.
        """
        super().__init_subclass__(**options)
        *_, outer, folder, file = ("", "", *cls.__module__.split("."))
        kind = next((one for one in (folder, outer) if one in KINDS), None)
        if kind is not None and "kind" not in vars(cls):
            cls.kind, cls.name = kind, file
        if cls.targets not in SELECTED:
            raise ValueError(
                f"`targets` of `{cls.__name__}` is `{cls.targets}`: write one of {', '.join(SELECTED)}"
            )
        check_names(cls.__name__, cls.rules)
        for written in (resource for effect in cls.effects for resource in effect.writes):
            if written.startswith(_SIGNAL) and written.removeprefix(_SIGNAL) not in cls.signals:
                raise ValueError(
                    f"an effect of `{cls.__name__}` writes `{written}`: declare it in `signals`"
                )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Raise TypeError for a field that pydantic would read by its own rules."""
        super().__pydantic_init_subclass__(**options)
        for name, info in cls.model_fields.items():
            if value := untyped_value(info.annotation, info.metadata):
                raise TypeError(
                    f"field `{name}` of `{cls.__name__}` is annotated with the class `{value.__name__}`, which pydantic"
                    " would read by its own rules: annotate it with a field type of trainc.dsl.reading.construct"
                )

    @classmethod
    def heading(cls) -> str:
        """Return how a spec writes it: `regularize pace`, or `run`."""
        return f"{cls.kind} {cls.name}" if cls.kind != cls.name else cls.kind

    @property
    def title(self) -> str:
        """Return how messages refer to it."""
        return self.heading()

    def identity_setting(self, changing: Container[str] = ()) -> str | None:
        """Return the field setting that makes the clause do nothing, such as `weight = 0`; None where it acts.

        Fields that are `changing` may have another value later.
        """
        found = (
            f"{name} = {text}"
            for name, text in self.identity.items()
            if name not in changing and self._equals(name, text)
        )
        return next(found, None)

    def _equals(self, field: str, text: str) -> bool:
        """Say whether a field has the value that `text` gives it; compare by JSON."""
        value = read_field(type(self).model_fields[field], text)
        return bool(to_json(getattr(self, field)) == to_json(value))

    def validate_targets(self, bound: Any) -> Iterable[Problem]:
        """Yield objections to what `on` selected in the bound model, as `Problem`s under the selector."""
        return ()

    def describe(self, effect: Effect) -> str:
        """Return the words for an effect of this clause in the plan's table of the step."""
        return effect.action

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause, with these fields, performs one of its kind's effects."""
        return True

    @classmethod
    def declared_signals(cls) -> dict[str, Signal]:
        """Return what it measures, by name."""
        return {n: Signal(s) if isinstance(s, str) else s for n, s in cls.signals.items()}

    def opt_in(self) -> Mapping[str, tuple[str, str]]:
        """Say which resources another clause may write only where a field of this one accepts it.

        By resource: what both together do, in words after the clauses' titles, and the field setting to write.
        """
        return {}

    def unit_of(self, signal: str) -> str | None:
        """Return what one of its signals counts with these fields, such as `samples`; None for a plain number."""
        return self.declared_signals()[signal].unit

    def unmeasured_reason(self, signal: str) -> tuple[str, str] | None:
        """Say why this clause, with these fields, never measures a signal, and what to write; None if it does."""
        return None

    def signal_text(self, signal: str, label: str, record: Mapping[str, Any]) -> str | None:
        """Return a step's value of a signal as short text; None for the general form, `142 [98, 210]`."""
        return None

    @classmethod
    def panels(cls, clauses: Sequence[Any], runs: Sequence[Any]) -> Iterable[Any] | None:
        """Return the pictures of what clauses of one label recorded; None for curves of the signals with a title.

        `clauses` are the `RecordedClause`s of the runs that have one, `runs` the `RunRecords` of all that are drawn;
        pictures are `runtime.report.axes.Panel`s. Import matplotlib inside.
        """
        return None

    def tables(self, label: str, records: Sequence[Mapping[str, Any]]) -> Iterable[Any]:
        """Return tables of what this clause recorded in a run's steps, as `runtime.report.tables.Table`s."""
        return ()

    @property
    def adapts(self) -> bool:
        """Whether it changes the modules of a model before the other clauses are bound."""
        return type(self).adapt is not Construct.adapt

    def adapt(self, to: Any) -> None:
        """Add adapters to a model through an `Adapting`: on the meta device, too, and where they are already."""

    def lower(self, to: Any) -> None:
        """Ask a `Lowering` for the mechanisms that it uses, below."""
        if self.adapts:
            return
        raise NotImplementedError(f"`{self.title}` cannot be compiled: its class has no `lower`")


Catalog = Mapping[tuple[str, str], type[Construct]]
