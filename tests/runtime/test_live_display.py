"""The display: live in a pseudo-terminal, and plain lines."""

import io
import math
import os
import pty
import re
import subprocess
import sys
import threading

from rich.console import Console

from trainc.runtime.run.live_display import LiveDisplay, format_count, format_duration, sparkline

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


def plain(total: float = 200, interval: float = 10.0) -> tuple[LiveDisplay, io.StringIO, Ticks]:
    text, ticks = io.StringIO(), Ticks()
    console = Console(file=text, width=40)
    return LiveDisplay(total, "steps", console=console, interval=interval, clock=ticks), text, ticks


def test_without_a_terminal_there_are_plain_lines_from_time_to_time() -> None:
    display, text, ticks = plain()
    display.start()
    for step in range(1, 41):
        ticks.now += 1
        display.update({**FIGURES, "position": step})
    display.stop()
    found = text.getvalue().splitlines()
    # At once, every 10 seconds, and the last state: each one line, however narrow the terminal.
    assert [line.split("/")[0] for line in found] == ["1", "11", "21", "31", "40"]
    assert found[-1] == (
        "40/200 steps  20%  loss 2.3457  lr 0.0001..0.0003  gns 4123 [3012, inf]  batch 32  "
        "tokens/s 123k  left 0:02:40"
    )


def test_noise_scales_are_found_by_the_figures_recorded_with_them() -> None:
    display, _, _ = plain()
    parts = {"signal": 1.0, "noise": 12.0, "low": 8.6, "high": 25.2}
    early = {"early": 12.0, **{f"early.{name}": value for name, value in parts.items()}}
    total = {"late.total": 17.5, "late.total_low": 13.1, "late.total_high": 30.0, "late.slope": 1.4}
    late = {"late": math.nan, **{f"late.{name}": math.nan for name in parts}, **total}
    display.update({**early, **late, "batch": 8, "gns": 1.0})
    shown = display.texts()
    assert list(shown) == ["early", "late", "late of the whole model", "batch", "left"]
    assert shown["early"] == "12 [8.6, 25.2]"
    assert shown["late"] == "? no estimate"
    assert shown["late of the whole model"] == "17.5 [13.1, 30]"


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
