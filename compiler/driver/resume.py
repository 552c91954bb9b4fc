"""Compare a spec with the one that a run was started with, before the run is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainc.compiler.plan.plan import FORMAT, Plan
from trainc.compiler.program.save import PLAN
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import from_json


def check_resume(plan: Plan, out: Path, accept: bool) -> None:
    """Compare a plan with that of the run in `out`; raises SpecError where its state does not fit.

    Without `accept` another spec on the same model is an error, too.
    """
    if not (out / PLAN).exists():
        return
    saved: dict[str, Any] = json.loads((out / PLAN).read_text())
    now = plan.to_json()
    if (found := saved.get("format")) != FORMAT:
        raise _impossible(
            f"{out / PLAN} has format {found}, but this version of trainc reads format {FORMAT}",
            "resume with the version of trainc that wrote it, or start a new run in another folder",
        )
    if saved["model"]["signature"] != now["model"]["signature"]:
        raise cannot_resume(
            out,
            "the names, shapes or dtypes of the model's parameters have changed",
        )
    if saved["fingerprint"] == now["fingerprint"] or accept:
        return
    changes = tuple(_changes(saved["clauses"], now["clauses"])) or ("a `when` rule was changed",)
    raise SpecError(
        [
            Diagnostic(
                "resume-needs-accept",
                f"the spec is not the one that the run in {out} was started with",
                notes=changes,
                help="resume with `--accept` to continue the run under the new spec",
            )
        ]
    )


def cannot_resume(out: Path, why: object) -> SpecError:
    """Return the error of a run that cannot be resumed under this spec."""
    return _impossible(
        f"the run in {out} cannot be resumed with this spec: {why}",
        "undo the change, or start a new run in another folder; to begin with the weights of this run,"
        f' write `run {{ start = "{out}" }}`',
    )


def _impossible(message: str, instead: str) -> SpecError:
    return SpecError([Diagnostic("resume-impossible", message, help=instead)])


def _changes(before: list[Any], now: list[Any]) -> Iterator[str]:
    old, new = ({c["label"]: c for c in clauses} for clauses in (before, now))
    for label in sorted(old.keys() | new.keys()):
        if label not in new:
            yield f"`{label}` was removed"
        elif label not in old:
            yield f"`{label}` was added"
        else:
            yield from _differences(label, old[label], new[label])


def _differences(label: str, before: Any, now: Any) -> Iterator[str]:
    for name in sorted(before["fields"].keys() | now["fields"].keys()):
        a, b = before["fields"].get(name), now["fields"].get(name)
        if a != b:
            yield f"`{label}.{name}` was {_written(a)} and is {_written(b)}"
    for name, word in (("targets", "on"), ("start", "from"), ("stop", "until"), ("every", "every")):
        if before[name] != now[name]:
            yield f"`{word}` of `{label}` was changed"


def _written(field: Any) -> str:
    """Return a field of a plan in the notation of a spec."""
    if isinstance(field, list):
        try:
            return str(from_json(field))
        except ValueError:
            return "[" + ", ".join(map(_written, field)) + "]"
    if field is None:
        return "not given"
    return str(field).lower() if isinstance(field, bool) else str(field)
