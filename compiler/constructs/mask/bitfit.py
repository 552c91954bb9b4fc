"""BitFit: train the biases alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem, Selector
from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.step.record import Step


class Bitfit(Construct):
    """Trains biases and freezes all other parameters, in the whole run.

    `on` says which biases train: all of the model, those of norms included, or some, such as `"**.qkv.bias"`. A new
    head of a task trains besides where `also` selects it, as in the paper. Frozen parameters have no gradient and no
    optimizer state, and no decay: they stay as they are, bit for bit. What of `also` is frozen already stays frozen.
    """

    cite: ClassVar = (
        "Ben Zaken, Ravfogel and Goldberg, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked"
        " Language-models, ACL 2022, arXiv:2106.10199"
    )
    usage: ClassVar = 'mask bitfit { also = "head" }'
    targets: ClassVar = "parameters"
    default_on: ClassVar = "role(bias)"
    effects: ClassVar = (
        Effect("gradients", "leave all but biases untrained", ("gradient",), ("gradient",)),
        Effect("observe", "count what trains", ("params",)),
    )

    also: Selector | None = Field(
        default=None,
        description="parameters that train besides the biases, such as a new head. Default: none",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report parameters that are no biases."""
        others = [p.name for p in bound.parameters if "bias" not in p.roles]
        if others:
            yield Problem(
                "wrong-target-kind",
                f"`{others[0]}` is no bias, and `on` says which biases train",
                help="write `on role(bias)`, and what trains besides in `also`",
            )

    def lower(self, to: Lowering) -> None:
        """Freeze what neither `on` nor `also` selects."""
        to.refuse_times("other parameters are frozen in the whole run", "from", "until", "every")
        biases = to.parameters()
        kept = {entry.name for entry in biases}
        if self.also is not None:
            kept |= set(to.select(self.also, "parameters"))
        to.freeze(entry.name for entry in to.inventory.trainable if entry.name not in kept)
        trained = [entry for entry in to.inventory.trainable if entry.name in kept]
        to.action(Count(to.label, trained, biases, to.inventory.parameters))

    @staticmethod
    def reference(
        weights: Mapping[str, Tensor], gradients: Sequence[Mapping[str, Tensor]], lr: float
    ) -> dict[str, Tensor]:
        """Return the weights after steps of gradient descent that move the parameters called `bias` alone."""
        return {
            name: w - lr * sum(g[name] for g in gradients) * float(name.endswith("bias"))
            for name, w in weights.items()
        }


class Count(Action):
    """Says at the end of a run what trained."""

    phase = Phase.OBSERVE

    def __init__(
        self,
        label: str,
        trained: Sequence[ParameterEntry],
        biases: Sequence[ParameterEntry],
        every: Sequence[ParameterEntry],
    ) -> None:
        names = {entry.name for entry in biases}
        entries = sum(entry.numel for entry in trained)
        own = sum(entry.name in names for entry in trained)
        more = f" and {len(trained) - own} other parameters" if len(trained) > own else ""
        total = sum(entry.numel for entry in every)
        self.name = f"{label} count"
        self.text = f"{label}: {own} biases{more} train, {entries} of {total} entries ({entries / total:.2%})"

    def run(self, step: Step) -> None:
        """Do nothing: what trains is the same in every step."""

    def summary(self) -> str | None:
        return self.text
