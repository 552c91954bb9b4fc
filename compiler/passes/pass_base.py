"""The base class of graph passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.method.sites import Rewrite

LOSS = "loss"
"""The site of the passes that serve no layer but the loss."""


class Pass(ABC):
    """One rewrite of the forward graph.

    `after` names the passes that must come before it; `widens` names the outputs that may come out in a wider floating
    dtype.
    """

    name: ClassVar[str]
    purpose: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    widens: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the sites that this pass must serve; where there are none it is not run."""

    @abstractmethod
    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> Sequence[str]:
        """Rewrite the graph and return the sites served."""


class NormPass(Pass):
    """A pass that serves the measured norms."""

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the norm sites."""
        return tuple(site.module for site in rewrite.norms)


class FusingPass(Pass):
    """A pass that serves the norms which are one operator each, whether they are measured or not."""

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the norm sites."""
        return tuple(site.module for site in rewrite.fused_norms)


class LossPass(Pass):
    """A pass that serves a loss which one operator computes with a term of two views."""

    def wants(self, rewrite: Rewrite) -> tuple[str, ...]:
        """Return the loss where it has such a term."""
        return (LOSS,) if rewrite.joint is not None else ()
