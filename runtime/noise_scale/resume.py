"""What of a checkpoint's noise scale serves a clause that measures something else now, and what to say of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = {"total": "the sum over layers", "calibration": "the calibration"}
_LAYER = "layer/"
_SHOWN = 3


def fitting(
    state: Mapping[str, Any], sizes: Mapping[str, int], what: str
) -> tuple[dict[str, Any], str]:
    """Return the sums that go on, and what became of the others; an empty text where all of them do.

    `sizes` are the numbers of each sum by name: `total`, `layer/NAME`, `calibration`. `what` says in which geometry,
    and of what examples: of others nothing goes on. Sum over layers and calibration are of all layers together, so
    they start anew where one of these is another.
    """
    found = {name: value for name, value in state.items() if name in _WORDS or _LAYER in name}
    if state.get("what", what) != what:
        return {}, f"measured {what} instead of {state['what']}: all of it starts anew"
    layers = {name for name in {*found, *sizes} if name.startswith(_LAYER)}
    changed = any((name in found) != (name in sizes) for name in layers)
    known = {
        name: found[name]
        for name, size in sizes.items()
        if name in found and len(found[name]) == size and not (changed and name in _WORDS)
    }
    anew = [name for name in sizes if name not in known]
    gone = [name for name in found if name not in sizes]
    return known, "; ".join(filter(None, (_started(anew), _dropped(gone))))


def _started(anew: list[str]) -> str:
    layers = sum(name.startswith(_LAYER) for name in anew)
    parts = [words for name, words in _WORDS.items() if name in anew]
    if layers:
        parts.append(f"{layers} layer{'s' * (layers != 1)}")
    if not parts:
        return ""
    return f"{', '.join(parts)} start{'s' * (len(anew) == 1)} anew"


def _dropped(gone: list[str]) -> str:
    names = [_WORDS.get(name, f"`{name.removeprefix(_LAYER)}`") for name in gone]
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"not measured any more: {', '.join(names[:_SHOWN])}{more}"
