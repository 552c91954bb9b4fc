"""Learning rates by the shape of each matrix, so that updates have the spectral norm sqrt(fan-out / fan-in)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.lr._width import StartingNorms, condition, fans
from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class Spectral(Construct):
    """Multiplies each learning rate by the condition of its matrix over that of a square one of `base_width`.

    The condition is the rate at which an update has the spectral norm sqrt(fan-out / fan-in), up to one constant: in
    proportion to 1 / fan-in for AdamW, to fan-out / fan-in for SGD, and to sqrt(fan-out / fan-in) over its own scale
    for Muon. A matrix with `base_width` inputs and outputs keeps its rate; the factors of the others depend on their
    own shapes, not on the rest of the model. The fan-in of a convolution counts the positions of its kernel.

    The paper asks the same of the weights themselves. Their norms in the first step are compared with
    sqrt(fan-out / fan-in): what is more than 4 times as large or small is noted, and the summary has the range.
    `trainc plan` shows the factor of every parameter. Embeddings and vectors have no such fan-in: they keep their rate.
    """

    cite: ClassVar = "Yang, Simon and Bernstein, A Spectral Condition for Feature Learning, 2023, arXiv:2310.17813"
    usage: ClassVar = "lr spectral { base_width = 64 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "(ndim(2) | matrices & type(Conv1d, Conv2d, Conv3d)) - role(embedding)"
    effects: ClassVar = (
        Effect("rates", "scale rates with the shape", reads=("params",), writes=("rate",)),
    )

    base_width: int = Field(
        gt=0, description="inputs and outputs of the matrix that keeps its learning rate"
    )

    def reference(self, out: int, into: int, updates: str) -> float:
        """Return the factor of a matrix for updates that are `adaptive` or follow the `gradient`."""
        return {"adaptive": self.base_width / into, "gradient": out / into}[updates]

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Refuse what has no fan-in."""
        for entry in bound.parameters:
            linear = entry.ndim == 2 or any("Conv" in name for name in entry.types)
            if linear and entry.ndim > 1 and "embedding" not in entry.roles:
                continue
            yield Problem(
                "bad-value",
                f"`{entry.name}` with the shape {entry.shape} has no fan-in: it is a vector, an embedding or a stack",
                help="select weights of linear layers and convolutions alone, or write no `on`",
            )
            return

    def lower(self, to: Lowering) -> None:
        """Give every shape its factor, and look at the norms of the first step."""
        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        units: dict[tuple[str, float], list[str]] = {}
        weights: dict[str, tuple[float, str]] = {}
        for entry in to.parameters():
            out, into = fans(entry)
            base = condition(to, entry.name, self.base_width, self.base_width)
            factor = condition(to, entry.name, out, into) / base
            units.setdefault((f"{out} x {into}", factor), []).append(entry.name)
            weights[entry.name] = (math.sqrt(out / into), "matrices")
        for (shape, factor), names in units.items():
            to.lr_factor(shape, names).factor = factor
        to.action(StartingNorms(f"{to.label} norms", weights))
