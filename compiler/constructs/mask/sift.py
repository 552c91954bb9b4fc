"""SIFT: train only the entries whose gradient is largest at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainc.compiler.constructs.mask._base import fits_scope, vector_problems
from trainc.dsl.reading.construct import Construct, Effect, Fraction, Problem
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, Record, Values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.update_mask import SelectedEntries
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.record import Step

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
        return fits_scope(value, info)

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report frozen parameters, and vectors where rows or columns are chosen."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = (
                f"`{frozen[0]}` is frozen, so it has no gradient by which entries could be chosen"
            )
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        yield from vector_problems(bound, self.granularity)
        if bound.steps is not None and self.batches >= bound.steps:
            yield Problem(
                "never-acts",
                f"the entries that train are chosen after {self.batches} steps, and {bound.steps:g} steps are left of"
                " the run: nothing selected would train",
                field="batches",
                help="write fewer `batches`",
            )

    def count(self, numel: int) -> int:
        """Return how many of `numel` entries, rows or columns train."""
        return min(int(self.density * numel) + 1, numel)

    def lower(self, to: Lowering) -> None:
        """Give the optimizer selected entries in place of the tensors, and choose the entries when due."""
        from trainc.runtime.mask.entry_choice import Choices

        to.refuse_times(f"`{to.label}` chooses once, for the rest of the run", "until", "every")
        sizes = {}
        for entry in to.parameters():
            choices = Choices(self.granularity, entry.shape)
            known = self.scope == "tensor"
            sizes[entry.name] = self.count(choices.count) * choices.size if known else 0
        selected = to.select_entries(sizes)
        if self.rest == "freeze":
            kept = {entry.name for entry in to.parameters()}
            to.freeze(p.name for p in to.inventory.trainable if p.name not in kept)
        to.action(Choose(to.label, selected, self, to.gate()))

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


class Choose(Action):
    """Phase 8, before clipping: sum gradients until the entries are chosen, then gather those entries only."""

    phase = Phase.GRADIENTS

    def __init__(
        self, label: str, selected: Sequence[SelectedEntries], rule: Sift, start: Gate | None
    ) -> None:
        from trainc.runtime.schedule.gate import Gate

        self.label, self.name = label, f"{label} choice"
        self.selected = {entries.name: entries for entries in selected}
        self.rule = rule
        self.start = start
        # The weights wait for `from` as well, so the action itself always runs.
        self.gate = Gate()
        self.sums: dict[str, Tensor] = {}
        self.seen = dict.fromkeys(self.selected, 0)

    def run(self, step: Step) -> None:
        import torch

        for entries in self.selected.values():
            entries.read()
        waiting = [c for c in self.selected.values() if c.index is None]
        found = {c.name: g for c in waiting if (g := c.parameter.grad) is not None}
        for entries in waiting:
            entries.discard()
        if not found or (self.start is not None and not self.start.fires(step.clock)):
            return
        dense = {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}
        if not torch.stack([g.isfinite().all() for g in dense.values()]).all():
            step.notes.append(f"{self.name}: a gradient is not finite, so this step is not counted")
            return
        self._add(dense)
        groups = [waiting] if self.rule.scope == "global" else [[c] for c in waiting]
        for group in groups:
            if all(self.seen[entries.name] >= self.rule.batches for entries in group):
                self._choose(group)

    def _add(self, found: Mapping[str, Tensor]) -> None:
        import torch

        for name, gradient in found.items():
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide
        for name in self.selected if self.rule.scope == "global" else found:
            self.seen[name] += 1

    def _choose(self, group: Sequence[SelectedEntries]) -> None:
        import torch

        from trainc.runtime.mask.entry_choice import Choices, largest

        choices = [Choices(self.rule.granularity, tuple(c.parameter.shape)) for c in group]
        sums = [self.sums.pop(c.name, None) for c in group]
        scores = [
            torch.zeros(some.count, device=c.parameter.device) if s is None else some.score(s)
            for c, some, s in zip(group, choices, sums, strict=True)
        ]
        count = self.rule.count(sum(len(score) for score in scores))
        for entries, some, chosen in zip(group, choices, largest(scores, count), strict=True):
            entries.choose(some.entries(chosen))

    def memory(self) -> int:
        """Return the bytes held besides the weights."""
        sums = sum(tensor.numel() * tensor.element_size() for tensor in self.sums.values())
        return sums + sum(entries.memory() for entries in self.selected.values())

    def state_dict(self) -> ActionState:
        state: ActionState = {f"sum/{name}": tensor for name, tensor in self.sums.items()}
        state |= {f"seen/{name}": seen for name, seen in self.seen.items() if seen}
        for name, entries in self.selected.items():
            if entries.index is not None:
                state |= {f"index/{name}": entries.index, f"values/{name}": entries.values.detach()}
        return state

    def state_form(self) -> Form:
        import torch

        found: dict[str, Form] = {}
        for name, entries in self.selected.items():
            whole, some = entries.parameter, entries.values
            wide = str(torch.promote_types(whole.dtype, torch.float32)).removeprefix("torch.")
            integer = "int32" if whole.numel() <= torch.iinfo(torch.int32).max else "int64"
            found[f"seen/{name}"] = Count(1)
            found[f"sum/{name}"] = Values(whole.shape, wide, finite=True)
            found[f"index/{name}"] = Values(some.shape, integer, low=0, high=whole.numel() - 1)
            found[f"values/{name}"] = Values.like(some, finite=True)
        return Record(optional=found)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import torch

        foreign = {key.partition("/")[2] for key in state} - set(self.selected)
        if foreign:
            raise ValueError(
                f"{self.name}: the checkpoint has a mask of `{min(foreign)}`, which this clause does not select"
            )
        self.seen = {name: int(state.get(f"seen/{name}", 0)) for name in self.selected}
        self.sums = {}
        for name, entries in self.selected.items():
            device = entries.parameter.device
            if f"sum/{name}" in state:
                self.sums[name] = state[f"sum/{name}"].to(device, copy=True)
            if f"index/{name}" not in state:
                entries.forget()
                continue
            entries.choose(state[f"index/{name}"])
            with torch.no_grad():
                entries.values.copy_(state[f"values/{name}"])

    def summary(self) -> str | None:
        numel = sum(entries.parameter.numel() for entries in self.selected.values())
        chosen = [c for c in self.selected.values() if c.index is not None]
        trained = sum(entries.values.numel() for entries in chosen)
        waiting = len(self.selected) - len(chosen)
        tail = f"; {waiting} had no gradient to choose by and did not train" if waiting else ""
        return f"{self.label}: {trained} of {numel} entries in {len(chosen)} tensors train{tail}"
