"""AlphaDecay: weight decay by the tail of each weight's spectrum, stronger for lighter tails."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainc.compiler.constructs.lr._spectral import SpectralPolicy
from trainc.dsl.reading.construct import Range
from trainc.dsl.values import value_json as v


class AlphaDecay(SpectralPolicy):
    """Scales the weight decay of each module by its weight's Hill exponent alpha, mapped onto `range`.

    It is `lr temp_balance` on the decay: a module with a heavy tail, which has learned more, decays
    less, one with a light tail more. All fields mean what they do there, `metric`, `shrink` and
    `control` too; `unit = part` is of rates alone. As published are `metric = alpha, shrink = false`. The
    paper has the ranges 0.67..3 and 0.67..5, `fit = median`, and a measurement every 500 steps, the
    default here; any interval up to that gives the same.

    The factors multiply the `weight_decay` of the optimizer, a number or a schedule, and parameters
    without decay keep none. The kind is `lr` because that is the kind of clauses that put a named factor
    on what the optimizer does to a parameter: several such clauses multiply, whichever of the two
    they scale.
    """

    cite: ClassVar = "He et al., AlphaDecay: Module-wise Weight Decay for LLMs, arXiv:2506.14562"
    usage: ClassVar = "lr alpha_decay on ndim(2) - type(Embedding) { range = 0.67..3 }"
    scales: ClassVar = "weight_decay"
    every_steps: ClassVar = 500
    effects: ClassVar = tuple(
        e.replace(action=e.action.replace("factors", "factors of weight decay"))
        for e in SpectralPolicy.effects
        if e.phase != "deltas"
    )

    range: Range = Field(
        default=v.Range(0.67, 3.0),
        description="factors of the smallest and the largest alpha; `sqrt` and `log2` do not use it",
    )
