"""What a pass is, and the runner that checks each pass after it ran."""

from __future__ import annotations

import difflib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainc.compiler.errors import PassBug, SiteMissing, SiteUnfit
from trainc.compiler.graph.differentiate import remove_dead
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.serialize import listing
from trainc.compiler.method.sites import Rewrite


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
        """Return the modules this pass must serve; none means it is not run."""

    @abstractmethod
    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> Sequence[str]:
        """Rewrite the graph and return the modules served."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What a pass did: sites, node counts, seconds, and the diff of the listing."""

    name: str
    purpose: str
    ran: bool
    sites: tuple[str, ...] = ()
    unserved: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    diff: str = field(default="", repr=False)


def run_passes(
    forward: ForwardGraph,
    rewrite: Rewrite,
    passes: Sequence[Pass],
    without: frozenset[str] = frozenset(),
) -> tuple[PassReport, ...]:
    """Run the passes in order, checking after each; those in `without` leave sites unserved."""
    reports: list[PassReport] = []
    dropped = {site for step in passes if step.name in without for site in step.wants(rewrite)}
    forward.propagate()
    for step in passes:
        wanted = step.wants(rewrite)
        if step.name in without or not wanted:
            reports.append(PassReport(step.name, step.purpose, False, unserved=wanted))
            continue
        reports.append(_run(forward, rewrite, step, wanted, dropped))
    return tuple(reports)


def _run(
    forward: ForwardGraph, rewrite: Rewrite, step: Pass, wanted: tuple[str, ...], excused: set[str]
) -> PassReport:
    started = time.perf_counter()
    before, count = listing(forward.graph), len(forward.graph.nodes)
    shapes = _shapes(forward)
    try:
        served = tuple(step.run(forward, rewrite))
    except (SiteMissing, SiteUnfit):
        raise
    except Exception as error:
        raise PassBug(step.name, f"{type(error).__name__}: {error}", before) from error
    missing = [name for name in wanted if name not in served]
    if set(missing) - excused:
        raise SiteMissing(step.name, missing)
    extra = set(served) - set(wanted)
    if extra or len(set(served)) != len(served):
        raise PassBug(step.name, f"it served {sorted(served)}, which was not asked for", before)
    try:
        forward.graph.lint()
        remove_dead(forward.graph)
        forward.module.recompile()
        forward.propagate()
    except Exception as error:
        raise PassBug(step.name, f"{type(error).__name__}: {error}", before) from error
    for name, shape in _shapes(forward).items():
        if _differ(shapes.get(name, shape), shape, name in step.widens):
            raise PassBug(step.name, f"`{name}` was {shapes[name]} and is {shape}", before)
    lost = set(shapes) - set(forward.outputs)
    if lost:
        raise PassBug(step.name, f"the outputs {sorted(lost)} are gone", before)
    after = listing(forward.graph)
    diff = "\n".join(
        difflib.unified_diff(
            before.splitlines(),
            after.splitlines(),
            f"before {step.name}",
            f"after {step.name}",
            lineterm="",
            n=1,
        )
    )
    return PassReport(
        step.name,
        step.purpose,
        True,
        served,
        tuple(missing),
        count,
        len(forward.graph.nodes),
        time.perf_counter() - started,
        diff,
    )


def _differ(old: tuple[Any, ...], new: tuple[Any, ...], may_widen: bool) -> bool:
    wider = may_widen and torch.promote_types(old[1], new[1]) == new[1]
    return (old[0], old[2]) != (new[0], new[2]) or (old[1] != new[1] and not wider)


def _shapes(forward: ForwardGraph) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for name in forward.outputs:
        value = forward.result(name).meta["val"]
        if isinstance(value, Tensor):
            found[name] = (tuple(value.shape), value.dtype, str(value.device))
    return found
