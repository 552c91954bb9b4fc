"""Diagnostics for programs: JSON, SARIF and GitHub annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from trainc.dsl.text.diagnostic import Diagnostic, Edit, Label
from trainc.dsl.text.render import safe

# Where each property of a GitHub annotation stands in a place.
_GITHUB_KEYS = {
    "file": "file", "line": "line", "col": "column", "endLine": "end_line", "endColumn": "end_column",
}  # fmt: skip


def _place(label: Label) -> dict[str, Any]:
    source = label.span.source
    (line, column), (end_line, end_column) = map(
        source.position, (label.span.start, label.span.end)
    )
    return {
        "file": safe(source.name),
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
        "text": safe(label.text),
    }


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """Return a JSON list, one object per diagnostic, for editors and scripts."""
    return json.dumps(
        [
            {
                "rule": d.rule,
                "severity": d.severity,
                "message": safe(d.message),
                "labels": [_place(label) for label in d.labels],
                "notes": [safe(note) for note in d.notes],
                "help": d.help and safe(d.help),
                "edit": d.edit
                and {
                    **_place(Label(d.edit.span)),
                    "text": safe(d.edit.text),
                    "safe": d.edit.safe,
                },
            }
            for d in diagnostics
        ],
        indent=2,
    )


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """Return workflow commands that GitHub shows beside the lines."""

    def escape(text: str, more: str = "") -> str:
        for c in "%\r\n" + more:
            text = text.replace(c, f"%{ord(c):02X}")
        return text

    lines = []
    for d in diagnostics:
        where = {"title": d.rule}
        if d.labels:
            place = _place(d.labels[0])
            where |= {key: str(place[name]) for key, name in _GITHUB_KEYS.items()}
        keys = ",".join(f"{key}={escape(value, ':,')}" for key, value in where.items())
        parts = [safe(d.message), *(safe(x.text) for x in d.labels[:1]), safe(d.help or "")]
        lines.append(f"::{d.severity} {keys}::{escape('; '.join(filter(None, parts)))}")
    return "".join(f"{line}\n" for line in lines)


def render_sarif(diagnostics: Sequence[Diagnostic], version: str = "") -> str:
    """Return a SARIF 2.1.0 log, for code-scanning services; `version` is trainc's."""
    explained = {d.rule: d.explanation for d in diagnostics}
    used = sorted(explained)
    rules = [
        {
            "id": rule,
            "shortDescription": {"text": about.what},
            "help": {"text": about.fix},
        }
        for rule in used
        if (about := explained[rule]) is not None
    ]
    results = []
    for d in diagnostics:
        places = [_sarif_place(label) for label in d.labels]
        text = d.message if not d.help else f"{d.message} ({d.help})"
        result: dict[str, Any] = {
            "ruleId": d.rule,
            "ruleIndex": used.index(d.rule),
            "level": d.severity,
            "message": {"text": safe(text)},
            "locations": places[:1],
        }
        if places[1:]:
            result["relatedLocations"] = places[1:]
        if d.edit is not None:
            result["fixes"] = [_sarif_fix(d.edit, d.help or d.message)]
        results.append(result)
    driver = {"name": "trainc", **({"version": version} if version else {}), "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
        ],
    }
    return json.dumps(log, indent=2)


def _sarif_fix(edit: Edit, what: str) -> dict[str, Any]:
    """Return an edit as a SARIF fix, which a person or a service may apply."""
    place = _place(Label(edit.span))
    replacement = {"deletedRegion": _region(place), "insertedContent": {"text": edit.text}}
    change = {"artifactLocation": {"uri": place["file"]}, "replacements": [replacement]}
    return {"description": {"text": safe(what)}, "artifactChanges": [change]}


def _region(place: dict[str, Any]) -> dict[str, Any]:
    return {
        "startLine": place["line"],
        "startColumn": place["column"],
        "endLine": place["end_line"],
        "endColumn": place["end_column"],
    }


def _sarif_place(label: Label) -> dict[str, Any]:
    place = _place(label)
    out: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": place["file"]}, "region": _region(place)}
    }
    if label.text:
        out["message"] = {"text": place["text"]}
    return out
