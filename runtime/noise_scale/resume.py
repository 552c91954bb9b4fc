"""Match the saved state of a noise scale with a changed clause, and report what restarts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {"total": "the sum over layers", "calibration": "the calibration"}
_LAYER = "layer/"
_SHOWN = 3


def match_state(
    state: Mapping[str, Any], sizes: Mapping[str, int], quantity: str
) -> tuple[dict[str, Any], str]:
    """Return the saved averages that still hold, and a text about the others, empty if all hold.

    `sizes` are the lengths of the averages by name: `total`, `layer/NAME`, `calibration`. `quantity` says what they
    measure: examples and geometry. Where that differs none holds. The sum over layers and the calibration are of all
    layers together, so they restart where one layer is added or left out.
    """
    saved = {name: value for name, value in state.items() if name in _NAMES or _LAYER in name}
    if state.get("quantity", quantity) != quantity:
        return {}, f"now measures {quantity}, not {state['quantity']}: all averages restart"
    layers = {name for name in {*saved, *sizes} if name.startswith(_LAYER)}
    changed = any((name in saved) != (name in sizes) for name in layers)
    kept = {
        name: saved[name]
        for name, size in sizes.items()
        if name in saved and len(saved[name]) == size and not (changed and name in _NAMES)
    }
    restarted = [name for name in sizes if name not in kept]
    dropped = [name for name in saved if name not in sizes]
    return kept, "; ".join(filter(None, (_describe_restart(restarted), _describe_drop(dropped))))


def _describe_restart(names: list[str]) -> str:
    layers = sum(name.startswith(_LAYER) for name in names)
    parts = [text for name, text in _NAMES.items() if name in names]
    if layers:
        parts.append(f"{layers} layer{'s' * (layers != 1)}")
    if not parts:
        return ""
    return f"{', '.join(parts)} restart{'s' * (len(names) == 1)}"


def _describe_drop(names: list[str]) -> str:
    texts = [_NAMES.get(name, f"`{name.removeprefix(_LAYER)}`") for name in names]
    if not texts:
        return ""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return f"no longer measured: {', '.join(texts[:_SHOWN])}{more}"
