"""A clause bound to a model: what plan decides about it and what lowering reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainc.compiler.model.inventory import Inventory, ModuleEntry, ParameterEntry

if TYPE_CHECKING:
    from trainc.dsl.reading.construct import Catalog, Construct
    from trainc.dsl.text.source import Span


@dataclass(frozen=True, slots=True)
class BoundClause:
    """One clause with its targets named and its durations resolved.

    `start`, `stop` and `every` are `{"amount", "unit"}` or None; `dropped` says why the clause is not in the program.
    """

    construct: Construct
    label: str
    targets: tuple[str, ...]
    start: dict[str, Any] | None = None
    stop: dict[str, Any] | None = None
    every: dict[str, Any] | None = None
    dropped: str | None = None
    span: Span | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        return self.construct.kind

    @property
    def title(self) -> str:
        return f"{self.construct.kind} {self.construct.name}"

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
            "start": self.start,
            "stop": self.stop,
            "every": self.every,
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
    """What a construct sees when it is asked for its objections: the selected entries and the whole model.

    `sizes` is None in a spec that names no data.
    """

    inventory: Inventory
    modules: tuple[ModuleEntry, ...]
    parameters: tuple[ParameterEntry, ...]
    sizes: Sizes | None = None


def from_json(data: Mapping[str, Any], catalog: Catalog) -> BoundClause:
    """Return the bound clause that `to_json` wrote; raises ValueError when its construct is not installed."""
    key = (data["kind"], data["construct"])
    if key not in catalog:
        raise ValueError(f"this program uses `{' '.join(key)}`, which is not installed here")
    return BoundClause(
        construct=catalog[key].model_validate(data["fields"]),
        label=data["label"],
        targets=tuple(data["targets"]),
        start=data["start"],
        stop=data["stop"],
        every=data["every"],
        dropped=data["dropped"],
    )
