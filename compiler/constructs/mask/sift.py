"""SIFT: train only the entries whose gradient is largest at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Fraction, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering

Granularity = Literal["element", "row", "column"]


class Sift(Construct):
    """Trains the k entries of each tensor whose accumulated gradient g is largest in magnitude.

    k = min(int(density * numel) + 1, numel), as published. g is the sum over the first `batches`
    steps, in which the selected tensors do not change. From the next step on, the optimizer has
    these k entries only: its moments, weight decay and clipping act on them, and the other entries
    never change. Of equal gradients, the one at the lower position is chosen.
    """

    cite: ClassVar = (
        "Song et al., Sparse is Enough in Fine-tuning Pre-trained Large Language Models, "
        "ICML 2024, arXiv:2312.11875"
    )
    usage: ClassVar = "mask sift on ndim(2) - type(Embedding) { density = 1% }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"density": "100%"}
    effects: ClassVar = (
        Effect("gradients", "choose the entries that train", ("gradient", "params"), ("gradient",)),
        Effect(
            "deltas",
            "write the trained entries into the weights",
            ("delta",),
            ("params", "metrics"),
        ),
    )

    density: Fraction = Field(
        description="fraction of the entries of a tensor that trains, above 0%"
    )
    batches: int = Field(
        default=1, ge=1, description="optimizer steps whose gradients are summed before the choice"
    )
    scope: Literal["tensor", "global"] = Field(
        default="tensor",
        description="whether `density` is a fraction of each tensor, or of all selected tensors together",
    )
    rest: Literal["train", "freeze"] = Field(
        default="train", description="whether parameters that are not selected train or are frozen"
    )
    granularity: Granularity = Field(
        default="element",
        description="what is chosen: single entries, or whole rows or columns by the L2 norm of their gradient",
    )

    @field_validator("density")
    @classmethod
    def _is_positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(
                "expected a fraction above 0%; to train nothing, freeze the parameters"
            )
        return value

    @field_validator("granularity")
    @classmethod
    def _fits_scope(cls, value: Granularity, info: ValidationInfo) -> Granularity:
        if value != "element" and info.data.get("scope") == "global":
            raise ValueError(
                "rows and columns of different tensors differ in length: use `scope = tensor`"
            )
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Object to frozen parameters, and to vectors where rows or columns are chosen."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = f"`{frozen[0]}` is frozen, so it has no gradient to choose entries by"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        flat = [p.name for p in bound.parameters if p.ndim < 2]
        if flat and self.granularity != "element":
            message = f"`{flat[0]}` is not a matrix, so it has no {self.granularity}s"
            yield Problem("wrong-target-kind", message, help="select among `ndim(2)`")

    def count(self, numel: int) -> int:
        """Return how many of `numel` entries, rows or columns train."""
        return min(int(self.density * numel) + 1, numel)

    def lower(self, to: Lowering) -> None:
        """Give the optimizer selected entries in place of the tensors, and choose them when due."""
        from trainc.compiler.constructs.mask._sift import Choices, Choose, WriteBack
        from trainc.runtime.step.update_mask import SelectedEntries

        to.refuse_times(f"`{to.label}` chooses once, for the rest of the run", "until", "every")
        selected = []
        for entry in to.parameters():
            choices = Choices(self.granularity, entry.shape)
            size = self.count(choices.count) * choices.size if self.scope == "tensor" else 0
            selected.append(SelectedEntries(entry.name, to.tensor(entry.name), size))
            to.select_entries(entry.name, selected[-1])
        if self.rest == "freeze":
            kept = {entry.name for entry in to.parameters()}
            to.freeze(p.name for p in to.inventory.trainable if p.name not in kept)
        to.action(Choose(to.label, selected, self, to.gate()))
        to.action(WriteBack(to.label, selected))

    def reference(
        self,
        weights: Mapping[str, Tensor],
        gradients: Sequence[Mapping[str, Tensor]],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
    ) -> dict[str, Tensor]:
        """Return the weights after a run with these dense gradients, by dense masks.

        A copy trains on the masked gradient; after each step the other entries are restored.
        """
        import torch

        first = gradients[: self.batches]
        chosen = {n: torch.stack([g[n] for g in first]).sum(0).abs() for n in weights}
        groups = [list(weights)] if self.scope == "global" else [[n] for n in weights]
        mask: dict[str, Tensor] = {}
        for names in groups:
            scores = torch.cat([chosen[n].flatten() for n in names])
            order = scores.argsort(descending=True, stable=True)[: self.count(len(scores))]
            flat = torch.zeros(len(scores), dtype=torch.bool).scatter_(0, order, True)
            parts = flat.split([chosen[n].numel() for n in names])
            mask |= {n: p.view(weights[n].shape) for n, p in zip(names, parts, strict=True)}
        trained = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
        optimizer = make(list(trained.values()))
        for step in gradients[self.batches :]:
            for n, w in trained.items():
                w.grad = step[n] * mask[n]
            optimizer.step()
            for n, w in trained.items():
                w.data = torch.where(mask[n], w.data, weights[n])
        return {n: w.detach() for n, w in trained.items()}
