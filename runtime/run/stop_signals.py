"""SIGINT and SIGTERM: the first signal asks a run to save and end, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class StopSignals:
    """While entered, turns the first signal into a request; does nothing outside the main thread."""

    def __init__(self) -> None:
        self._request: str | None = None
        self._previous: dict[int, Any] = {}

    def requested(self) -> str | None:
        """Return `interrupted` or `terminated` after a signal, else None."""
        return self._request

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in REASONS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._request is None:
            self._request = REASONS[signal.Signals(number)]
            return
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
