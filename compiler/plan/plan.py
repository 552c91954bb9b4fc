"""The plan: the lowered method of a spec on one model, printed as tables of names and numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from trainc.compiler.plan.shown import counted, plan_text
from trainc.compiler.public_names import PublicNames
from trainc.dsl.text.diagnostic import Diagnostic

FORMAT = 4
Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Plan(PublicNames):
    """The printed form of the lowered method: what a spec does to one model, before anything runs.

    `spec` and `clauses` rebuild the program without any text; the tables are for reading: `parameters` with the
    optimizer, decay, mask and clauses of each, `shares` how much of the weights each clause reaches, `measured` the
    parts of weights that clauses measure, `steps` what happens in which phase, `schedules` every scheduled number over
    the run, `sites` the rewritten layers, `kernels` what implements their operators, `memory` the bytes beyond weights
    and gradients.
    """

    spec: Row
    fingerprint: str
    model: Row
    data: Row | None
    settings: Row
    clauses: tuple[Row, ...]
    parameters: tuple[Row, ...]
    shares: tuple[Row, ...]
    measured: tuple[Row, ...]
    steps: tuple[Row, ...]
    schedules: tuple[Row, ...]
    sites: tuple[Row, ...]
    kernels: tuple[Row, ...]
    memory: tuple[Row, ...]
    format: int = FORMAT
    warnings: tuple[Diagnostic, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        clauses, parameters = len(self.spec["clauses"]), len(self.parameters)
        made_for = f"{counted(clauses, 'clause')} for {self.model['type']} of {counted(parameters, 'parameter')}"
        return f"Plan({made_for}, {self.hash[:12]})"

    def __str__(self) -> str:
        """Return what each clause acts on and what a step does, as text; `trainc plan` shows all tables."""
        return plan_text(self)

    def to_json(self) -> Row:
        """Return everything but the warnings as plain data, with the hash."""
        return {**self._content(), "hash": self.hash}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote; raises ValueError if the format differs or the content was changed."""
        if data.get("format") != FORMAT:
            raise ValueError(
                f"this plan was saved by another version of trainc (format {data.get('format')}, this"
                f" version reads {FORMAT}): make the plan again with `trainc plan`"
            )
        names = {f.name for f in fields(cls)} - {"warnings"}
        content: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in data.items() if n in names
        }
        missing = names - set(content)
        if missing:
            raise ValueError(
                f"the plan has no {', '.join(sorted(missing))}: make the plan again with `trainc plan`"
            )
        plan = cls(**content)
        if plan.hash != data.get("hash"):
            raise ValueError(
                "the plan does not match its hash, so it was changed by hand or damaged: make the plan again with"
                " `trainc plan`"
            )
        return plan

    @cached_property
    def hash(self) -> str:
        """Return the SHA-256 of the content: equal plans change equal models in the same way."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> Row:
        names = (f.name for f in fields(self) if f.name != "warnings")
        return {n: list(v) if isinstance(v := getattr(self, n), tuple) else v for n in names}
