"""A logger for a loop of your own: `open_logger("wandb", folder)`, then `logger.log(program.update(), step)`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainc.runtime.run.loggers import KeptGoing, LoggedRun, NamedLogger, find_logger

_logger = logging.getLogger(__name__)


def open_logger(
    name: str, folder: str | Path, *, step: int = 0, config: Mapping[str, Any] | None = None
) -> KeptGoing:
    """Return the logger `tensorboard`, `wandb` or `trackio` of a run whose folder this is, which is made if needed.

    `step` is where a resumed run is at, `config` what to show of it. What fails later is a warning of `logging`, once.
    Raises ValueError for another name, and where the library is not installed.
    """
    found = NamedLogger(name, find_logger(name), dict(config or {}))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return KeptGoing(found, LoggedRun(Path(folder), step, found.config), _logger.warning)
