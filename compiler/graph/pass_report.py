"""What a graph pass did: kept with the step graph, and printed for people."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did: the sites it served and did not, node counts, seconds, and a unified diff of the listing."""

    name: str
    purpose: str
    ran: bool
    sites: tuple[str, ...] = ()
    unserved: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    diff: str = field(default="", repr=False)
