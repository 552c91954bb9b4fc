"""The live display of a run on a terminal, and plain lines where there is no terminal.

It gets a dict of figures per step and draws at a limited rate: drawing takes less than one
hundredth of the time between two drawings, however slow the terminal is.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainc.runtime.report.number_text import format_loss, sparkline
from trainc.runtime.report.shown_signal import ShownSignal

DRAWING_FRACTION = 0.005
"""The fraction of the time that drawing may take."""


@contextmanager
def _output() -> Iterator[None]:
    """Say which file it is where nothing can be printed, such as into one on a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def format_count(value: float) -> str:
    """Return a count in at most four digits and an SI suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    if not math.isfinite(seconds):
        return "-:--:--"
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


class LiveDisplay:
    """Shows a run of `total` units: a live view on a terminal, else a line from time to time."""

    def __init__(
        self,
        total: float,
        unit: str,
        *,
        title: str = "",
        signals: Sequence[ShownSignal] = (),
        plain: bool = False,
        console: Console | None = None,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Draw at least `interval` seconds apart, by default 0.2 live, 10 plain; with these signals of clauses."""
        self.console = console or Console()
        self.plain = plain or not self.console.is_terminal
        self.total = total
        self.unit = unit
        self.title = title
        self.signals = tuple(signals)
        self._interval = interval if interval is not None else (10.0 if self.plain else 0.2)
        self._clock = clock
        self._due = -math.inf
        self._losses: deque[float] = deque(maxlen=240)
        self._figures: dict[str, float] = {}
        self._started: tuple[float, float] | None = None
        self._live: Live | None = None
        self._stale = False

    def start(self, position: float = 0.0) -> None:
        """Begin at a position of the run; the time left is estimated from here."""
        self._started = (self._clock(), position)
        if not self.plain:
            self._live = Live(console=self.console, auto_refresh=False, transient=False)
            self._live.start()

    def update(self, figures: Mapping[str, float]) -> None:
        """Add the figures of one step: `position`, `loss`, `lr_min`, `lr_max`, signals, ..."""
        self._figures.update(figures)
        self._stale = True
        if "loss" in figures:
            self._losses.append(figures["loss"])
        if self._clock() >= self._due:
            self._show()

    def note(self, text: str) -> None:
        """Print a line above the display, where it stays."""
        with _output():
            self.console.print(Text(text))

    def stop(self) -> None:
        """Draw the last figures and end the live view."""
        if self._stale:
            self._show()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        begin = self._clock()
        self._stale = False
        with _output():
            if self.plain:
                self.console.print(Text(self.line()), soft_wrap=True)
            elif self._live is not None:
                self._live.update(self._view(), refresh=True)
        end = self._clock()
        self._due = end + max(self._interval, (end - begin) / DRAWING_FRACTION)

    @property
    def _position(self) -> float:
        return self._figures.get("position", 0.0)

    def remaining(self) -> float:
        """Return the seconds left at the average speed since `start`; infinite where that is unknown."""
        if self._started is None:
            return math.inf
        start_time, origin = self._started
        covered = self._position - origin
        if covered <= 0:
            return math.inf
        left = max(0.0, self.total - self._position)
        return (self._clock() - start_time) * left / covered

    def texts(self) -> dict[str, str]:
        """Return the figures as text, by the name they are shown under."""
        known = self._figures
        shown: dict[str, str] = {}
        if "loss" in known:
            shown["loss"] = format_loss(known["loss"])
        if "eval_loss" in known:
            shown["eval"] = format_loss(known["eval_loss"])
        if "lr_min" in known and "lr_max" in known:
            low, high = known["lr_min"], known["lr_max"]
            shown["lr"] = f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
        for signal in self.signals:
            if (text := signal.text_with_unit(known)) is not None:
                shown[signal.title] = text
        if "batch" in known:
            shown["batch"] = format_count(known["batch"])
        for name in ("tokens", "samples"):
            if f"{name}_per_second" in known:
                shown[f"{name}/s"] = format_count(known[f"{name}_per_second"])
                break
        shown["left"] = format_duration(self.remaining())
        return shown

    def line(self) -> str:
        """Return the state of the run as one plain line."""
        figures = (f"{name} {text}" for name, text in self.texts().items())
        return "  ".join([self._progress(), *figures])

    def _progress(self) -> str:
        position = self._position
        percent = 100 * min(1.0, position / self.total)
        return f"{format_count(position)}/{format_count(self.total)} {self.unit} {percent:3.0f}%"

    def _view(self) -> Group:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        done = ProgressBar(self.total, min(self._position, self.total))
        bar.add_row(Text(self.title or "training", style="bold"), done, self._progress())
        row = Text()
        for name, text in self.texts().items():
            row.append(f"{name} ", style="dim").append(text)
            if name == "loss" and len(self._losses) > 1:
                row.append(f" {sparkline(list(self._losses))}", style="cyan")
            row.append("   ")
        return Group(bar, row)
