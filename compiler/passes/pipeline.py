"""The passes in order, and the loop that runs them and checks the graph after each."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.compiler.errors import PassBug, SiteMissing, SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph, remove_dead
from trainc.compiler.graph.listing import listing
from trainc.compiler.graph.step_graph import PassReport
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.add_noise import AddNoise
from trainc.compiler.passes.fuse_head import FuseHead
from trainc.compiler.passes.fuse_loss import FuseLoss
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds
from trainc.compiler.passes.instrument_layers import InstrumentLayers
from trainc.compiler.passes.instrument_norms import InstrumentNorms
from trainc.compiler.passes.pair_late import PairLate
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.share_dropout import ShareDropout

PIPELINE: tuple[Pass, ...] = (
    FuseNorms(),
    FuseResidualAdds(),
    InstrumentNorms(),
    InstrumentLayers(),
    ShareDropout(),
    AddNoise(),
    PairLate(),
    FuseLoss(),
    FuseHead(),
)

# Shape, dtype and device of an output.
Signature = tuple[tuple[int, ...], torch.dtype, str]


def check_order(passes: Sequence[Pass]) -> None:
    """Raise when the order breaks a pass's `after`."""
    place = {step.name: index for index, step in enumerate(passes)}
    for step in passes:
        for other in step.after:
            if place.get(other, -1) > place[step.name]:
                raise ValueError(f"pass `{step.name}` must come after `{other}`")


def check_names(without: frozenset[str], passes: Sequence[Pass] = PIPELINE) -> None:
    """Raise when a pass to leave out does not exist."""
    names = [step.name for step in passes]
    for name in sorted(without - set(names)):
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else "the passes are " + ", ".join(names)
        raise ValueError(f"there is no pass `{name}`: {hint}")


def run_passes(
    forward: ForwardGraph,
    rewrite: Rewrite,
    passes: Sequence[Pass],
    without: frozenset[str] = frozenset(),
) -> tuple[PassReport, ...]:
    """Run the passes in order and check after each; those named in `without` leave their sites unserved.

    The values of the graph's nodes must be known (`propagate`).

    Raises SiteMissing and SiteUnfit for sites that cannot be served, PassBug for a pass that breaks the graph.
    """
    reports: list[PassReport] = []
    excused = {site for step in passes if step.name in without for site in step.wants(rewrite)}
    for step in passes:
        wanted = step.wants(rewrite)
        if step.name in without or not wanted:
            reports.append(PassReport(step.name, step.purpose, False, unserved=wanted))
        else:
            reports.append(_run(forward, rewrite, step, wanted, excused))
    return tuple(reports)


def _run(
    forward: ForwardGraph, rewrite: Rewrite, step: Pass, wanted: tuple[str, ...], excused: set[str]
) -> PassReport:
    started = time.perf_counter()
    before, count = listing(forward.graph, forward.sizes), len(forward.graph.nodes)
    outputs = _signatures(forward)
    try:
        served = tuple(step.run(forward, rewrite))
        unserved = tuple(name for name in wanted if name not in served)
        if set(unserved) - excused:
            raise SiteMissing(step.name, unserved)
        if set(served) - set(wanted) or len(set(served)) != len(served):
            reason = f"it served the sites {sorted(served)}, but had to serve {sorted(wanted)}"
            raise PassBug(step.name, reason, before)
        forward.graph.lint()
        remove_dead(forward.graph)
        forward.propagate()
    except (SiteMissing, SiteUnfit, PassBug):
        raise
    except Exception as error:
        raise PassBug(step.name, f"{type(error).__name__}: {error}", before) from error
    broken = _broken_output(outputs, _signatures(forward), step.widens)
    if broken is not None:
        raise PassBug(step.name, broken, before)
    return PassReport(
        step.name,
        step.purpose,
        True,
        served,
        unserved,
        count,
        len(forward.graph.nodes),
        time.perf_counter() - started,
        _diff(step.name, before, listing(forward.graph, forward.sizes)),
    )


def _diff(name: str, before: str, after: str) -> str:
    old, new = before.splitlines(), after.splitlines()
    titles = f"before {name}", f"after {name}"
    return "\n".join(difflib.unified_diff(old, new, *titles, lineterm="", n=1))


def _signatures(forward: ForwardGraph) -> dict[str, Signature]:
    found: dict[str, Signature] = {}
    for name in forward.outputs:
        value = forward.result(name).meta["val"]
        if isinstance(value, Tensor):
            found[name] = (tuple(value.shape), value.dtype, str(value.device))
    return found


def _broken_output(
    before: dict[str, Signature], after: dict[str, Signature], widens: frozenset[str]
) -> str | None:
    """Say which output changed its shape, dtype or device, or is gone; None where all are as they were."""
    for name, new in after.items():
        if _differ(before.get(name, new), new, name in widens):
            return f"`{name}` was {before[name]} and is {new}"
    lost = sorted(set(before) - set(after))
    return f"the outputs {lost} are gone" if lost else None


def _differ(old: Signature, new: Signature, may_widen: bool) -> bool:
    wider = may_widen and torch.promote_types(old[1], new[1]) == new[1]
    return (old[0], old[2]) != (new[0], new[2]) or (old[1] != new[1] and not wider)
