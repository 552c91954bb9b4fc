"""What a construct declares of a number that it measures."""

from __future__ import annotations

from trainc.dsl.text.record import Record


class Signal(Record):
    """A measured number: `description` is its one line of documentation.

    `unit` is what it counts, such as `samples`; None for a plain number. `ends` are the names of the signals at the
    lower and upper end of its interval; it is then a positive number. With a `title` the display and `trainc report`
    show it, as the clause's label and these words; the title of a clause's main signal is empty. `logarithmic`: its
    changes are seen on such a scale.
    """

    description: str
    unit: str | None = None
    ends: tuple[str, str] | None = None
    title: str | None = None
    logarithmic: bool = False


def full_name(label: str, signal: str) -> str:
    """Return the name of a signal in expressions and records: `label.name`, or `label` for the main one."""
    return f"{label}.{signal}" if signal else label
