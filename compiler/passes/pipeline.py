"""The order of the passes: one literal tuple, checked against each pass's constraints."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from trainc.compiler.passes.add_noise import AddNoise
from trainc.compiler.passes.fuse_head import FuseHead
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds
from trainc.compiler.passes.instrument_layers import InstrumentLayers
from trainc.compiler.passes.instrument_norms import InstrumentNorms
from trainc.compiler.passes.pair_views import PairViews
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.share_dropout import ShareDropout

PIPELINE: tuple[Pass, ...] = (
    FuseNorms(),
    FuseResidualAdds(),
    InstrumentNorms(),
    InstrumentLayers(),
    ShareDropout(),
    AddNoise(),
    PairViews(),
    FuseHead(),
)


def check_order(passes: Sequence[Pass]) -> None:
    """Raise when the order breaks a pass's `after` or `before`."""
    place = {step.name: index for index, step in enumerate(passes)}
    for step in passes:
        for other in step.after:
            if place.get(other, -1) > place[step.name]:
                raise ValueError(f"pass `{step.name}` must come after `{other}`")
        for other in step.before:
            if place.get(other, len(passes)) < place[step.name]:
                raise ValueError(f"pass `{step.name}` must come before `{other}`")


def check_names(without: frozenset[str], passes: Sequence[Pass] = PIPELINE) -> None:
    """Raise when a pass to leave out does not exist."""
    names = [step.name for step in passes]
    for name in sorted(without - set(names)):
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else "the passes are " + ", ".join(names)
        raise ValueError(f"there is no pass `{name}`: {hint}")
