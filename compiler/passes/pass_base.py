"""What a graph pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.method.sites import Rewrite

LOSS = "loss"
"""The site of the passes that serve no layer but the loss of two views."""


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the forward graph.

    `after` and `before` order it among the others; `exact` says that it keeps every number bit for
    bit; `widens` names the outputs that may come out in a wider floating dtype.
    """

    name: ClassVar[str]
    purpose: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True
    widens: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the sites that this pass must serve; where there are none it is not run."""

    @abstractmethod
    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> Sequence[str]:
        """Rewrite the graph and return the sites served."""
