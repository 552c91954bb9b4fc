"""What rules of width share: fan-in and fan-out of weights, the condition on updates, and the norms of the start."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainc.compiler.errors import FieldError
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Form, ListOf, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.step.record import Step

USUAL = (0.25, 4.0)
"""The norms of the start, as multiples of the condition, that are told without a remark."""


def fans(entry: ParameterEntry) -> tuple[int, int]:
    """Return fan-out and fan-in of a parameter; vectors have a fan-in of 1, tables one row for each input.

    Those of a stack, such as of experts, are those of one of its matrices, as (out, in).
    """
    if entry.ndim < 2:
        return entry.numel, 1
    if is_stack(entry):
        return entry.shape[-2], entry.shape[-1]
    swapped = any(name in ("Embedding", "EmbeddingBag", "Conv1D") for name in entry.types)
    swapped |= any(name.startswith("ConvTranspose") for name in entry.types)
    first, second, *kernel = entry.shape
    out, into = (second, first) if swapped else (first, second)
    return out, into * math.prod(kernel)


def is_stack(entry: ParameterEntry) -> bool:
    """Say whether a parameter holds several matrices, such as those of experts."""
    return entry.ndim > 2 and not any("Conv" in name for name in entry.types)


def update_norm(to: Lowering, name: str, out: float, into: float) -> float:
    """Return the spectral norm of an update per unit of rate, as the optimizer of the parameter says it."""
    optimizer = to.optimizer_of(name)
    known = getattr(optimizer, "update_norm", None)
    found: float | None = None if known is None else known(out, into)
    if found is None:
        raise FieldError(
            "head",
            f"how large the updates of `{name}` are is not known of its optimizer: use one that has a name in trainc,"
            " or exclude the parameter from `on`",
        )
    return found


def condition(to: Lowering, name: str, out: float, into: float) -> float:
    """Return the rate, up to a constant, at which updates have the norm sqrt(fan-out / fan-in)."""
    return math.sqrt(out / into) / update_norm(to, name, out, into)


@dataclass(eq=False)
class StartingNorms(Action):
    """Phase 2 of the first step: spectral norms of weights, over sqrt(fan-out / fan-in), which should be near 1."""

    phase = Phase.RATES
    reads_shards = True
    name: str
    weights: Mapping[str, tuple[float, str]]
    """By name what the norm should be near, and what the weight is called."""
    remark: str = ""
    """What else is said in the first step."""
    stacks: Collection[str] = ()
    """The weights that hold several matrices, of which the largest norm counts."""
    found: dict[str, list[float]] = field(default_factory=dict)
    """The smallest and the largest by what the weights are called."""

    def run(self, step: Step) -> None:
        from trainc.runtime.processes.sharded import full

        if self.found:
            return
        if self.remark:
            step.notes.append(f"{self.name}: {self.remark}")
        unusual: dict[str, dict[str, float]] = {}
        for name, (wanted, kind) in self.weights.items():
            weight = full(step.parameters[name]).detach()
            norm = (
                _largest(weight.flatten(0, -3) if name in self.stacks else weight.flatten(1))
                / wanted
            )
            low, high = self.found.get(kind, [norm, norm])
            self.found[kind] = [min(low, norm), max(high, norm)]
            if norm and not USUAL[0] <= norm <= USUAL[1]:
                unusual.setdefault(kind, {})[name] = norm
        for kind, norms in unusual.items():
            name, norm = next(iter(norms.items()))
            others = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            step.notes.append(
                f"{self.name}: `{name}`{others} ({kind}) begins with {norm:.3g} times the norm sqrt(fan-out / fan-in):"
                " scale the initial values, since rates alone do not let features learn alike at every width"
            )

    def state_dict(self) -> ActionState:
        return {kind: list(pair) for kind, pair in self.found.items()}

    def state_form(self) -> Form:
        return Record(more=ListOf(Number(0)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = {kind: [float(norm) for norm in pair] for kind, pair in state.items()}

    def summary(self) -> str | None:
        if not self.found:
            return None
        shown = (f"{kind} {low:.3g} to {high:.3g}" for kind, (low, high) in self.found.items())
        return f"{self.name}: norms at the start, over sqrt(fan-out / fan-in): {', '.join(shown)}"


def _largest(matrices: Tensor) -> float:
    """Return the largest singular value of a matrix, or of several, (count, out, in)."""
    import torch

    with torch.no_grad():
        wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        tall = wide if wide.size(-2) >= wide.size(-1) else wide.mT
        square = float(torch.linalg.eigvalsh(tall.mH @ tall).max())
    return math.sqrt(max(square, 0.0))
