"""The plan: what a spec does to one model, in words and numbers, before anything runs. JSON both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainc.dsl.text.diagnostic import Diagnostic

FORMAT = 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A spec bound to a model, resolved to names and numbers.

    `spec` and `clauses` rebuild the program without any text; the tables are for reading:
    `parameters` says who gets which rate, decay, mask and regularizer, `steps` what happens in which phase,
    `schedules` every scheduled number over the run, `sites` how each rewritten layer is reached,
    `kernels` what runs and why, `memory` what it costs beyond the plain run, in bytes.
    """

    spec: Row
    fingerprint: str
    model: Row
    data: Row | None
    settings: Row
    clauses: tuple[Row, ...]
    parameters: tuple[Row, ...]
    steps: tuple[Row, ...]
    schedules: tuple[Row, ...]
    sites: tuple[Row, ...]
    kernels: tuple[Row, ...]
    memory: tuple[Row, ...]
    format: int = FORMAT
    warnings: tuple[Diagnostic, ...] = field(default=(), compare=False)

    def to_json(self) -> Row:
        """Return everything but the warnings as plain data, with the hash."""
        return {**self._content(), "hash": self.hash}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote; raises ValueError when it is of another format or was changed."""
        if data.get("format") != FORMAT:
            raise ValueError(
                f"this plan was saved by another version of trainc (format {data.get('format')}, this"
                f" version reads {FORMAT}): make it again with `trainc plan`"
            )
        names = {f.name for f in fields(cls)} - {"warnings"}
        content: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in data.items() if n in names
        }
        missing = names - set(content)
        if missing:
            raise ValueError(f"the plan lacks {', '.join(sorted(missing))}")
        plan = cls(**content)
        if plan.hash != data.get("hash"):
            raise ValueError("the plan does not match its hash: it was changed by hand or damaged")
        return plan

    @cached_property
    def hash(self) -> str:
        """Return the content's SHA-256: equal plans do equal things to equal models."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> Row:
        names = (f.name for f in fields(self) if f.name != "warnings")
        return {n: list(v) if isinstance(v := getattr(self, n), tuple) else v for n in names}
