"""A clause bound to a model: the names it selects, its durations, and why it was dropped, if it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainc.compiler.model.inventory import Inventory, ModuleEntry, ParameterEntry
from trainc.dsl.reading.construct import Catalog, Construct
from trainc.dsl.resolve.origin import Origin
from trainc.dsl.text.source import Span
from trainc.runtime.schedule.time_span import TimeSpan


@dataclass(frozen=True, slots=True)
class BoundClause:
    """One clause with the names of its targets; `dropped` says why it is not in the program, None if it is."""

    construct: Construct
    label: str
    targets: tuple[str, ...]
    start: TimeSpan | None = None
    stop: TimeSpan | None = None
    every: TimeSpan | None = None
    dropped: str | None = None
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def span(self) -> Span | None:
        """Return where it was written, or None for a clause made in Python."""
        return None if self.origin is None else self.origin.span

    def part_span(self, part: str) -> Span | None:
        """Return where a part or a field was written; the whole clause where it was not."""
        return None if self.origin is None else self.origin.part_span(part)

    @property
    def kind(self) -> str:
        return self.construct.kind

    @property
    def title(self) -> str:
        """Return what a spec calls its construct: `regularize pace`, or `run`."""
        return self.construct.title

    def modules(self, inventory: Inventory) -> tuple[ModuleEntry, ...]:
        return tuple(inventory.module[name] for name in self.targets)

    def parameters(self, inventory: Inventory) -> tuple[ParameterEntry, ...]:
        return tuple(inventory.parameter[name] for name in self.targets)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.construct.kind,
            "construct": self.construct.name,
            "label": self.label,
            "targets": list(self.targets),
            "start": self.start and self.start.to_json(),
            "stop": self.stop and self.stop.to_json(),
            "every": self.every and self.every.to_json(),
            "dropped": self.dropped,
            "fields": self.construct.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """Samples of a micro-batch and of the first step, and whether the batch may change."""

    micro: int
    start: int
    changing: bool


@dataclass(frozen=True, slots=True)
class Targets:
    """What `Construct.validate_targets` is given: the selected entries and the whole model.

    `sizes` is None in a spec that names no data, and `steps`, those between the clause's `from` and `until`, where
    they are not known before the run.
    """

    inventory: Inventory
    modules: tuple[ModuleEntry, ...]
    parameters: tuple[ParameterEntry, ...]
    sizes: Sizes | None = None
    steps: float | None = None


def from_json(data: Mapping[str, Any], catalog: Catalog) -> BoundClause:
    """Return the bound clause that `to_json` wrote; raises ValueError when its construct is not installed."""
    key = (data["kind"], data["construct"])
    if key not in catalog:
        raise ValueError(
            f"the program uses the construct `{' '.join(key)}`, which is not installed here: install the package"
            " that provides it"
        )
    return BoundClause(
        construct=catalog[key].model_validate(data["fields"]),
        label=data["label"],
        targets=tuple(data["targets"]),
        start=_duration(data["start"]),
        stop=_duration(data["stop"]),
        every=_duration(data["every"]),
        dropped=data["dropped"],
    )


def _duration(data: Any) -> TimeSpan | None:
    return None if data is None else TimeSpan.from_json(data)
