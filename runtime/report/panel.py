"""One panel of a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Panel:
    """A title and the function that draws on its axes; `height` in inches, `wide`: over all columns."""

    title: str
    draw: Callable[[Axes], None]
    height: float = 3.3
    wide: bool = False
