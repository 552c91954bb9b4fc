"""Magnitude pruning: train the largest weights and keep the others at zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.mask._base import ZEROS_AGAIN, ChoosingMask
from trainc.dsl.reading.construct import (
    Density,
    Problem,
    RuleExplanation,
)
from trainc.dsl.values.value_json import Number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class Magnitude(ChoosingMask):
    """Keeps the largest weights of each tensor and sets the others to zero, where they stay.

    Of n entries, n - round((1 - density) n) are kept, at least one. They are chosen by the weights at `from`,
    before the forward pass, once for all; with `every`, again and again until `until`, and then the last choice
    stays. A step that is skipped keeps its choice. The other entries are exactly zero after every step of any
    optimizer; their gradient and moments are zero, too. The gradual pruning of Zhu and Gupta is `density =
    cubic(to = 10%, over = 50%)` with `every`. Of equal weights the one in the earlier tensor, then at the lower
    position, is kept; where the density rises, entries come back as zeros. A parameter that is frozen in the run
    keeps its entries until it trains again; with `scope = global` they are compared all the same. A `noise_scale`
    on the same layers measures gradients before the mask.
    """

    cite: ClassVar = (
        "Han et al., Learning both Weights and Connections, NeurIPS 2015, arXiv:1506.02626; Zhu and Gupta, "
        "To prune, or not to prune, arXiv:1710.01878"
    )
    usage: ClassVar = "mask magnitude on ndim(2) every 100 steps { density = cubic(from = 80%, to = 10%, over = 50%) }"
    identity: ClassVar = {"density": "100%"}
    effects: ClassVar = ZEROS_AGAIN

    rules: ClassVar = {
        "zeros-without-norm": RuleExplanation(
            "A mask sets entries to zero of a tensor that `weight_norm` divides by the norms of its rows.",
            "A row of which no entry is kept has norm 0, so that its weights are NaN, and the loss with them.",
            "Exclude the tensor from `on`, or remove the parametrization and prune the weight itself.",
        ),
    }

    density: Density | None = Field(
        default=None,
        description="fraction of the entries that is kept, above 0%: a number or a schedule of the run;"
        " `n_m(n, m)` needs none, others do",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report tensors that the structure does not fit; warn of rows that are divided by their norm."""
        yield from super().validate_targets(bound)
        lists = (
            m.name.rpartition(".")[0] for m in bound.inventory.modules if "_WeightNorm" in m.types
        )
        directions = {f"{name}.original1" for name in lists}
        divided = [p.name for p in bound.parameters if p.name in directions]
        if divided:
            yield Problem(
                "zeros-without-norm",
                f"`{divided[0]}` is divided by the norms of its rows (`weight_norm`): a row of zeros makes the loss"
                " NaN",
                help="exclude it from `on`, or remove the parametrization",
                severity="warning",
            )

    def lower(self, to: Lowering) -> None:
        """Mask the selected parameters; the choice reads the weights alone."""
        from trainc.compiler.constructs.mask._semi_structured import compute_sparse
        from trainc.runtime.mask.scores import ScoredChoice, magnitude

        names = [entry.name for entry in to.parameters()]
        density = self.density or Number(self.exact or 1)
        choice, together = self.choice(to), self.scope != "tensor"
        choose = ScoredChoice(to.label, names, magnitude, choice)
        found = to.mask(names, choose, density, choice=choice, together=together)
        compute_sparse(to, found.masks.values(), choice.structure)

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Return the names that are compared with each other."""
        return [list(names)] if self.scope == "global" else [[name] for name in names]

    def reference(
        self,
        weights: Mapping[str, Tensor],
        gradients: Sequence[Mapping[str, Tensor]],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        densities: Mapping[int, float],
    ) -> dict[str, Tensor]:
        """Return the weights after a run with these gradients, chosen at the steps of `densities`, entry by entry.

        A dense run whose gradient and weights are multiplied by the mask around every step; its optimizer's state is
        multiplied at each choice.
        """
        import torch

        trained = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        mask = {n: torch.ones_like(w) for n, w in weights.items()}
        optimizer = make(list(trained.values()))
        for i, gradient in enumerate(gradients):
            if i in densities:
                mask = self._by_sorting({n: w.detach() for n, w in trained.items()}, densities[i])
                for n, w in trained.items():
                    w.data *= mask[n]
                    for held in optimizer.state.get(w, {}).values():
                        if held.shape == w.shape:
                            held *= mask[n]
            for n, w in trained.items():
                w.grad = gradient[n] * mask[n]
            optimizer.step()
            for n, w in trained.items():
                w.data *= mask[n]
        return {n: w.detach() for n, w in trained.items()}

    def _by_sorting(self, weights: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
        """Return masks of ones and zeros by sorting all (magnitude, place) pairs."""
        import torch

        axis = {"row": 0, "column": 1}.get(str(self.structure))
        out = {n: torch.zeros_like(w) for n, w in weights.items()}
        for group in self.groups(list(weights)):
            ranked = []
            for i, n in enumerate(group):
                w = weights[n] if axis is None else weights[n].transpose(0, axis).flatten(1)
                sizes = (w.abs().flatten() if axis is None else w.square().sum(1).sqrt()).tolist()
                ranked += [(-size, i, place) for place, size in enumerate(sizes)]
            kept = max(1, len(ranked) - round((1 - density) * len(ranked)))
            for _, i, place in sorted(ranked)[:kept]:
                tensor = out[group[i]]
                where = tensor.view(-1) if axis is None else tensor.transpose(0, axis)
                where[place] = 1
        return out
