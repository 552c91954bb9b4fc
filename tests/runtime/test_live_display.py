"""The display: live in a pseudo-terminal, and plain lines."""

import io
import math
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
from rich.console import Console

from tests.runtime.noise_runs import plan
from trainc.compiler.catalog import catalog
from trainc.compiler.driver.recorded_clauses import shown_signals
from trainc.runtime.report.number_text import format_loss, sparkline
from trainc.runtime.report.shown_signal import ShownSignal
from trainc.runtime.run.live_display import LiveDisplay, format_count, format_duration

FIGURES = {
    "loss": 2.34567,
    "lr_min": 1e-4,
    "lr_max": 3e-4,
    "gns": 4123.0,
    "gns.signal": 0.1,
    "gns.noise": 412.3,
    "gns.low": 3012.5,
    "gns.high": math.inf,
    "batch": 32,
    "tokens_per_second": 123456.0,
}

CHILD = """
from trainc.runtime.run.live_display import LiveDisplay
display = LiveDisplay(100, "steps", title="demo", interval=0)
display.start()
for step in range(1, 101):
    display.update({"position": step, "loss": 1 / step, "lr_min": 0.1, "lr_max": 0.2})
    if step == 50:
        display.note("half way")
display.stop()
"""


class Ticks:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(
    total: float = 200, interval: float = 10.0, signals: Sequence[ShownSignal] = ()
) -> tuple[LiveDisplay, io.StringIO, Ticks]:
    text, ticks = io.StringIO(), Ticks()
    console = Console(file=text, width=40)
    display = LiveDisplay(
        total, "steps", signals=signals, console=console, interval=interval, clock=ticks
    )
    return display, text, ticks


def noise_scales(*labels: str) -> list[ShownSignal]:
    """Return what the clauses of a plan show."""
    return shown_signals(plan(*(("noise_scale", label, {}) for label in labels)))


def test_without_a_terminal_there_are_plain_lines_from_time_to_time() -> None:
    display, text, ticks = plain(signals=noise_scales("gns"))
    display.start()
    for step in range(1, 41):
        ticks.now += 1
        display.update({**FIGURES, "position": step})
    display.stop()
    found = text.getvalue().splitlines()
    # At once, every 10 seconds, and the last state: each one line, however narrow the terminal.
    assert [line.split("/")[0] for line in found] == ["1", "11", "21", "31", "40"]
    assert found[-1] == (
        "40/200 steps  20%  loss 2.3457  lr 0.0001..0.0003  gns 4123 [3012, inf] samples  "
        "batch 32  tokens/s 123k  left 0:02:40"
    )


def test_signals_of_clauses_are_shown_with_units_and_intervals() -> None:
    display, _, _ = plain(signals=noise_scales("early", "late"))
    parts = {"signal": 1.0, "noise": 12.0, "low": 8.6, "high": 25.2}
    early = {"early": 12.0, **{f"early.{name}": value for name, value in parts.items()}}
    total = {"late.total": 17.5, "late.total_low": 13.1, "late.total_high": 30.0, "late.slope": 1.4}
    late = {"late": math.nan, **{f"late.{name}": math.nan for name in parts}, **total}
    display.update({**early, **late, "batch": 8, "gns": 1.0})
    shown = display.texts()
    assert list(shown) == ["early", "late", "late of the whole model", "batch", "left"]
    assert shown["early"] == "12 [8.6, 25.2] samples"
    assert shown["late"] == "? no estimate"
    assert shown["late of the whole model"] == "17.5 [13.1, 30] samples"


def test_a_signal_without_a_text_of_its_own_is_shown_in_the_general_form() -> None:
    ends = ("m.low", "m.high")
    display, _, _ = plain(
        signals=[
            ShownSignal("m.size", "m size", "bytes"),
            ShownSignal("m", "m", None, ends),
            ShownSignal("m.late", "m late", "samples", own_text=lambda record: "soon"),
            ShownSignal("m.none", "m none"),
        ]
    )
    display.update({"m": 2.5, "m.low": 2.0, "m.high": math.inf, "m.size": 1234.0})
    display.update({"m.late": math.nan})
    shown = display.texts()
    shown.pop("left")
    assert shown == {"m size": "1234 bytes", "m": "2.5 [2, inf]", "m late": "soon"}
    display.update({"m": math.nan, "m.size": math.nan})
    assert (display.texts()["m"], display.texts()["m size"]) == ("?", "?")


def test_every_construct_declares_its_signals_and_their_intervals() -> None:
    for construct in catalog().values():
        declared = construct.declared_signals()
        for name, signal in declared.items():
            assert signal.description, construct
            assert set(signal.ends or ()) <= declared.keys(), construct
            assert signal.title == "" if not name else signal.title != "", construct


def test_notes_are_printed_at_once() -> None:
    display, text, _ = plain()
    display.start()
    display.note("resumed from step 5")
    assert text.getvalue() == "resumed from step 5\n"


def test_a_note_is_not_read_as_markup() -> None:
    display, text, _ = plain()
    display.note("[red]x[/red] is nan")
    assert "[red]x[/red]" in text.getvalue()


def test_the_time_left_is_estimated_from_where_this_process_began() -> None:
    display, _, ticks = plain()
    assert display.remaining() == math.inf
    display.start(100)
    ticks.now += 30
    display.update({"position": 150})
    assert display.remaining() == 30
    display.update({"position": 250})
    assert display.remaining() == 0


def test_a_run_without_figures_shows_nothing() -> None:
    display, text, _ = plain()
    display.start()
    display.stop()
    assert text.getvalue() == ""


def test_drawing_takes_a_small_part_of_the_time() -> None:
    text, ticks = io.StringIO(), Ticks()

    class Slow(Console):
        def print(self, *args: object, **options: object) -> None:
            ticks.now += 0.5
            super().print(str(args[0]))

    display = LiveDisplay(1e9, "steps", console=Slow(file=text), interval=0, clock=ticks)
    display.start()
    begin = ticks.now
    for step in range(100_000):
        ticks.now += 0.01
        display.update({"position": step})
    drawn = 0.5 * len(text.getvalue().splitlines())
    assert 0 < drawn <= 0.01 * (ticks.now - begin) + 0.5


def test_a_terminal_gets_a_live_view() -> None:
    main, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "20"}
    chunks: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                chunk = os.read(main, 4096)
            except OSError:
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        subprocess.run(
            [sys.executable, "-P", "-c", CHILD],
            stdout=child,
            stderr=child,
            env=environment,
            check=True,
            timeout=60,
        )
    finally:
        os.close(child)
        reader.join(60)
        os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode())
    assert "demo" in text
    assert "half way" in text
    assert "100/100 steps 100%" in text
    assert "loss 0.0100" in text
    assert "lr 0.1..0.2" in text
    assert re.search("[▁▂▃▄▅▆▇█]{5}", text)
    assert "━" in text


def test_quantities_are_short() -> None:
    found = {n: format_count(n) for n in (0, 7.25, 999, 1234, 9999, 12345, 2.5e6, 3e9, 4e12)}
    assert list(found.values()) == ["0", "7.25", "999", "1234", "9999", "12.3k", "2.5M", "3G", "4T"]
    assert format_count(math.nan) == "nan"


def test_durations_are_hours_minutes_seconds() -> None:
    assert [format_duration(s) for s in (0, 61, 3725.4, math.inf)] == [
        "0:00:00",
        "0:01:01",
        "1:02:05",
        "-:--:--",
    ]


def test_a_sparkline_shows_shape_and_gaps() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, math.nan, 2]) == "▁!█"
    assert sparkline([math.nan]) == "!"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(240)])) == 24


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (2.30259, "2.3026"),
        (0.0, "0.0000"),
        (1.8e32, "1.8e+32"),
        (-2.5e7, "-2.5e+07"),
        (4e-9, "4e-09"),
        (999_999.0, "999999.0000"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_a_loss_is_readable_when_it_explodes(loss: float, text: str) -> None:
    assert format_loss(loss) == text
    display = LiveDisplay(9, "steps", plain=True, console=Console(file=io.StringIO()))
    display.update({"position": 1.0, "loss": loss, "eval_loss": loss})
    assert display.texts()["loss"] == display.texts()["eval"] == text
