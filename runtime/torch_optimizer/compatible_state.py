"""Loading the state of an optimizer into one with other parameters, groups or options: what of it still fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainc.runtime.torch_optimizer.entry_form import EntryForms
from trainc.runtime.torch_optimizer.named_state import OTHERS, WHOLE, NamedState, Options
from trainc.runtime.torch_optimizer.nested import decoded, leaves, same


def load_compatible(forms: EntryForms, state: Mapping[str, Any]) -> str | None:
    """Load what fits into an optimizer that was just built; return in one line what restarts.

    Options of the groups are those of the spec, except for what the optimizer itself has changed since it was built.
    Raises ValueError for state of a parameter that is not optimized here.
    """
    named = forms.named
    if WHOLE in state:
        try:
            named.load(state)
        except ValueError:
            return f"{named.label}: starts anew, because its state fits no other parameters"
        return None
    found, records = named.split(state)
    fitting = {name: forms.fitting(name, own) for name, own in found.items()}
    entries = {name: own for name, own in fitting.items() if own is not None}
    whole = spans(state, named.size)
    new = [name for name in named.names if found and not whole and name not in entries]
    options, mixed = _options(named, records)
    kept = {name: dict(made) for name in new if (made := named.entries(name))} | entries
    named.put(kept, options, decoded(state.get(OTHERS, {})))
    lines = []
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        lines.append(f"begins without state of `{new[0]}`{more}")
    if mixed:
        lines.append(f"goes on with `{mixed}` of the first of the groups that are one now")
    return f"{named.label}: {'; '.join(lines)}" if lines else None


def other_state(
    named: NamedState, before: Mapping[str, Any], state: Mapping[str, Any]
) -> str | None:
    """Return why no part of a state fits, by what `before` says of its optimizer; None where a part may."""
    if before["class"] != named.kind:
        return f"it was `{before['class']}` and is `{named.kind}`"
    if before["size"] != named.size and spans(state, before["size"]):
        return "it keeps one state for all of its parameters, and they changed"
    return None


def spans(state: Mapping[str, Any], size: int) -> bool:
    """Say whether a saved state has a vector over all parameters, which have `size` entries together."""
    parts = (leaf for value in state.values() for _, leaf in leaves(value, ""))
    return any(isinstance(part, Tensor) and part.shape == (size,) for part in parts)


def _options(named: NamedState, records: Mapping[str, Options]) -> tuple[list[Options], str | None]:
    """Return what of each group goes on, and the first option of which merged groups had different values."""
    found: list[Options] = []
    mixed: str | None = None
    for group in named.groups:
        old = [_kept(records[name]) for name in group if name and name in records]
        found.append(old[0] if old else {})
        for other in old[1:]:
            keys = sorted(other.keys() | old[0].keys(), key=str)
            different = (k for k in keys if not same(other.get(k), old[0].get(k)))
            mixed = mixed or next(map(str, different), None)
    return found, mixed


def _kept(record: Options) -> Options:
    """Return the options that go on: the learning rate is the schedule's."""
    return {key: value for key, value in record["options"].items() if key != "lr"}
