"""What a construct does that joins the processes of one run: it prepares the model, and wraps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn


class Joining(Protocol):
    """A construct that joins processes."""

    @property
    def title(self) -> str:
        """What a spec calls it."""

    @property
    def patience(self) -> float:
        """How many seconds one process may be at one thing while the others wait."""

    def explain(self, error: Exception, model: nn.Module) -> str | None:
        """Return what is wrong with the clause, and what to write, where an error of torch says so."""

    def prepare(
        self, model: nn.Module, modules: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        """Change a model before the clauses are lowered for it; `modules` are those that the clause selects."""

    def wrap(self, model: nn.Module, device: torch.device) -> Any:
        """Return what is called in place of the model in training steps."""
