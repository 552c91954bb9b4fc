"""Saturation: how near a network is to the one that it becomes where all weights are infinitely large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.observe.weights._scaled import OUTPUT, Scaled
from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, ModuleSelector, Signal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.observer import Seen

TIE = 1e-5
"""The weight above which a saturated head attends to a position, as published."""


class Saturation(Construct):
    """Reports the cosine of f(x; theta) and f(x; c theta), where c multiplies all parameters; changes nothing.

    For c to infinity f(x; c theta) is the saturated network: its attention is a mean over the positions
    with the largest score. The cosine is over features, for each counted token, or each example where the
    targets are of examples; the mean over these is the saturation, 1 where the network is saturated. One whose
    output is zero in either pass has no direction and is left out; where all are, as with a head that starts at
    zero, nothing is measured in the step, and a note says so. It is reported for the logits, and as
    `hidden` for the mean over `layers`, each of which is in the records.

    Both passes are of the step's examples and of the weights before its update, without gradient, by a copy
    of the model in eval mode that shares its weights: the model, its weights, BatchNorm's statistics and
    random numbers stay as they are, bit for bit. Forward hooks of your own run in both as well. The
    multiplied weights take as much memory as the parameters while the pass runs. BatchNorm normalizes by
    running statistics, which are not multiplied; one that keeps none is an error.

    With `heads` the saturated pass shows to how many positions each attention head attends: those with a
    weight above 1e-5, where ties share it. `attended` is the mean number over heads and counted queries,
    `split` the fraction of them with more than one. Seen is attention by torch's
    scaled_dot_product_attention, by nn.MultiheadAttention, or by a softmax over the last of four axes; a
    model that attends in an operator of its own, as FlashAttention's package does, is an error.
    """

    cite: ClassVar = (
        "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    )
    usage: ClassVar = "observe saturation every 200 steps { c = 1000 }"
    default_every: ClassVar = "200 steps"
    signals: ClassVar = {
        "": Signal("cosine of the logits and the saturated ones, -1 to 1", title=""),
        "hidden": Signal("mean of this over `layers`", title="hidden"),
        "attended": Signal(
            "mean number of positions that a saturated head attends to", title="attended positions"
        ),
        "split": "fraction of queries for which a saturated head attends to more than one position",
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "pass the examples twice more, once with all weights multiplied",
            ("params", "inputs", "forward", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    c: float = Field(default=1000.0, gt=1, description="what all parameters are multiplied by")
    layers: ModuleSelector | None = Field(
        default=None, description="modules whose outputs are compared as well, such as blocks"
    )
    heads: bool = Field(
        default=False, description="report to how many positions saturated attention heads attend"
    )

    def unmeasured_reason(self, signal: str) -> tuple[str, str] | None:
        """Say which signals need a field."""
        if signal == "hidden" and self.layers is None:
            return "no hidden layers are compared", "write `layers = ...`"
        if signal in ("attended", "split") and not self.heads:
            return "attention heads are not looked at", "write `heads = true`"
        return None

    def lower(self, to: Lowering) -> None:
        """Read the steps with a copy of the model that has the model's own weights."""
        to.observe(Saturated.reading(to, self))

    @staticmethod
    def reference(plain: Tensor, saturated: Tensor) -> Tensor:
        """Return the cosine of each row of two outputs, (n,), NaN where one is zero; both are (n, features)."""
        import torch

        # The saturated numbers are so large that their squares may be no finite numbers.
        a = plain / plain.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(plain.dtype).tiny)
        b = saturated / saturated.abs().amax(-1, keepdim=True).clamp_min(
            torch.finfo(saturated.dtype).tiny
        )
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        return cosine.where(plain.any(-1) & saturated.any(-1), math.nan)


class Saturated(Scaled[Saturation]):
    """Adds up cosines by layer, and the positions that heads attend to."""

    measured = "saturation of the output"

    def compare(self, plain: Tensor, scaled: Tensor) -> Tensor:
        import torch

        cosine = self.construct.reference(plain, scaled)
        zero = ~(plain.any(-1) & scaled.any(-1))
        finite = zero | (cosine.isfinite() & scaled.isfinite().all(-1))
        kept = cosine[finite & ~zero]
        return torch.stack([kept.sum(), (finite & ~zero).sum(), (~finite).sum()]).double().cpu()

    def watching(self, forward: Seen, module: nn.Module) -> AbstractContextManager[Any]:
        if not self.construct.heads:
            return nullcontext()
        from trainc.runtime.companion.attention_weights import AttentionWeights

        seen: list[str] = []
        return _Required(
            AttentionWeights(module, partial(self._see_heads, forward.counted, seen)), seen
        )

    def _see_heads(self, counted: Tensor, seen: list[str], name: str, weights: Tensor) -> None:
        """Add up what the heads of one call attend to: weights (..., heads, queries, keys)."""
        import torch

        attended = (weights > TIE).sum(-1).double()  # (..., heads, queries)
        if attended.dim() == 3 and (len(attended), attended.shape[-1]) == tuple(counted.shape):
            attended = attended.masked_fill(~counted[:, None], 0)
        heads = attended.movedim(-2, 0).flatten(1)
        for number, one in enumerate(heads.cpu()):
            some = one[one > 0]
            sums = torch.stack([some.sum(), (some > 1).sum(), torch.tensor(float(len(some)))])
            place = 1 + len(self.layers) + len(seen)
            if place == len(self.parts):
                self.parts.append(f"{name or 'attention'} head {number}")
            seen.append(name)
            self.add(place, sums.double())

    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        """Return the mean cosines of all replicas, and the means over heads."""
        sums = self.gathered(replicas)
        outputs = {n: sums.pop(n) for n in (OUTPUT, *self.layers) if n in sums}
        cosines = {n: one / count for n, (one, count, _) in outputs.items() if count}
        self.overflowed = any(odd > 0 for _, _, odd in outputs.values())
        heads = {n: one for n, one in sums.items() if one[2]}
        positions = {n: total / queries for n, (total, _, queries) in heads.items()}
        self.by_part = {"attended": positions}
        found: dict[str, float] = {}
        if OUTPUT in cosines:
            found[""] = cosines.pop(OUTPUT)
        if cosines:
            found["hidden"] = math.fsum(cosines.values()) / len(cosines)
            self.by_part[""] = cosines
        if heads:
            total, split, queries = map(math.fsum, zip(*heads.values(), strict=True))
            found |= {"attended": total / queries, "split": split / queries}
        self.remember(found.get(""))
        return found


class _Required(AbstractContextManager[None]):
    """Watches attention, and raises FieldError where none was seen."""

    def __init__(self, watching: AbstractContextManager[Any], seen: list[str]) -> None:
        self._watching, self._seen = watching, seen

    def __enter__(self) -> None:
        self._watching.__enter__()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._watching.__exit__(kind, *error)
        if kind is None and not self._seen:
            raise FieldError(
                "heads",
                "no attention weights were seen in a pass: the model has none, or computes attention in an operator"
                " of its own. Remove `heads`, or build the model with torch's scaled_dot_product_attention",
            )
