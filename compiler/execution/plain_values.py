"""Numbers, switches and words in a model's attributes: a graph has them as they were at its capture."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, complex, str, type(None))
_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module has: its mode, which a graph is asked for, and torch's own notes."""


class PlainValues:
    """The plain attributes of a model's modules, compared with those of when a graph was first wanted.

    What the model's own passes change, such as a counter of calls, is not among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: list[tuple[str, dict[str, Any], str, object]] | None = None

    def remember(self) -> None:
        """Take the attributes as they are now, unless that was done before."""
        if self._before is None:
            self._before = [
                (f"{path}.{name}" if path else name, vars(module), name, value)
                for path, module in self._model.named_modules()
                for name, value in vars(module).items()
                if type(value) in _PLAIN and name not in _OF_TORCH
            ]

    def forget(self) -> None:
        """Compare with nothing until `remember` is called again."""
        self._before = None

    def leave_out_changed(self) -> None:
        """Leave out what has changed by now: the model's own pass changed it."""
        self._before = [one for one in self._before or () if one[1].get(one[2]) == one[3]]

    def first_changed(self) -> str | None:
        """Return the attribute that others changed first, by its path in the model; None where none is."""
        for place, holder, name, value in self._before or ():
            if holder.get(name) != value:
                return place
        return None
