"""One panel of a picture: a set of axes and what fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: its title and what fills it; `height` in inches, `wide` over all columns."""

    title: str
    fill: Callable[[Axes], None]
    height: float = 3.3
    wide: bool = False
