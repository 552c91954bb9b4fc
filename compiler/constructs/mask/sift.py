"""SIFT: train only the entries whose gradient was largest at the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainc.dsl.reading.construct import Construct, Effect, Fraction, Problem
from trainc.runtime.schedule.clock import Gate
from trainc.runtime.step.action import Action, Phase, State
from trainc.runtime.step.update_mask import SelectedEntries, largest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step

Granularity = Literal["element", "row", "column"]


class Sift(Construct):
    """Trains the k entries of each tensor whose accumulated gradient g is largest in magnitude.

    k = min(int(density * numel) + 1, numel), as published; g is the sum over the first `batches`
    steps, which leave the selected tensors as they are. From the next step on the optimizer has the
    k entries only: its moments, weight decay and clipping act on them, the rest never moves.
    Of equal gradients the one at the lower position is taken.
    """

    cite: ClassVar = (
        "Song et al., Sparse is Enough in Fine-tuning Pre-trained Large Language Models, "
        "ICML 2024, arXiv:2312.11875"
    )
    usage: ClassVar = "mask sift on ndim(2) - type(Embedding) { density = 1% }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"density": "100%"}
    effects: ClassVar = (
        Effect("gradients", "keep the chosen entries", ("gradient", "params"), ("gradient",)),
        Effect("deltas", "write the entries back", ("delta",), ("params", "metrics")),
    )

    density: Fraction = Field(description="share of a tensor's entries that trains, above 0%")
    batches: int = Field(
        default=1, ge=1, description="optimizer steps whose gradients are summed to choose"
    )
    scope: Literal["tensor", "global"] = Field(
        default="tensor",
        description="whether every tensor trains `density` of its entries, or all of them together",
    )
    rest: Literal["train", "freeze"] = Field(
        default="train", description="what happens to the parameters that are not selected"
    )
    granularity: Granularity = Field(
        default="element",
        description="what is chosen: single entries, or whole rows or columns by their L2 norm",
    )

    @field_validator("density")
    @classmethod
    def _something(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("expected a share above 0%; to train nothing, freeze the parameters")
        return value

    @field_validator("granularity")
    @classmethod
    def _comparable(cls, value: Granularity, info: ValidationInfo) -> Granularity:
        if value != "element" and info.data.get("scope") == "global":
            raise ValueError("rows of different tensors differ in length: use `scope = tensor`")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Refuse frozen parameters, and vectors where rows or columns are to be chosen."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = f"`{frozen[0]}` is frozen: it gets no gradient to choose from"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        flat = [p.name for p in bound.parameters if p.ndim < 2]
        if flat and self.granularity != "element":
            message = f"`{flat[0]}` has no {self.granularity}s"
            yield Problem("wrong-target-kind", message, help="select among `ndim(2)`")

    def count(self, numel: int) -> int:
        """Return how many of `numel` units train."""
        return min(int(self.density * numel) + 1, numel)

    def lower(self, to: Lowering) -> None:
        """Hand the optimizer the entries in place of the tensors, and choose them when due."""
        if to.clause.stop or to.clause.every:
            raise ValueError(f"`{to.label}` is chosen for good: it takes no `until` or `every`")
        compacts = []
        for entry in to.parameters():
            units = _Units(self.granularity, entry.shape)
            size = self.count(units.count) * units.size if self.scope == "tensor" else 0
            compacts.append(SelectedEntries(entry.name, to.tensor(entry.name), size))
            to.compact(entry.name, compacts[-1])
        if self.rest == "freeze":
            kept = {entry.name for entry in to.parameters()}
            to.freeze(p.name for p in to.inventory.trainable if p.name not in kept)
        to.action(Choose(to.label, compacts, self, to.gate()))
        to.action(WriteBack(to.label, compacts))

    def reference(
        self,
        weights: Mapping[str, Tensor],
        gradients: Sequence[Mapping[str, Tensor]],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
    ) -> dict[str, Tensor]:
        """Return the weights after a run with these dense gradients, by dense masks.

        A copy trains on the masked gradient; after each step what the mask leaves out is put back.
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


@dataclass(frozen=True, slots=True)
class _Units:
    """What is chosen in a tensor of `shape`: `count` units of `size` entries."""

    granularity: Granularity
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape) // self.size

    @property
    def size(self) -> int:
        axis = {"row": 0, "column": 1}.get(self.granularity)
        return 1 if axis is None else math.prod(self.shape) // self.shape[axis]

    def score(self, gradient: Tensor) -> Tensor:
        """Return the magnitude of each unit's gradient, shape (count,)."""
        if self.granularity == "element":
            return gradient.flatten().abs()
        across = gradient if self.granularity == "row" else gradient.transpose(0, 1)
        return across.flatten(1).square().sum(1).sqrt()

    def entries(self, units: Tensor) -> Tensor:
        """Return the sorted flat positions of the entries of some units."""
        import torch

        if self.granularity == "element":
            return units
        positions = torch.arange(math.prod(self.shape), device=units.device).view(self.shape)
        axis = int(self.granularity == "column")
        return positions.index_select(axis, units).flatten().sort().values


class Choose(Action):
    """Phase 8, before clipping: sum gradients until the entries are chosen, then keep to those."""

    phase = Phase.GRADIENTS
    reads = ("gradient", "params")
    writes = ("gradient",)

    def __init__(
        self, label: str, compacts: Sequence[SelectedEntries], rule: Sift, start: Gate | None
    ) -> None:
        self.label, self.name = label, f"{label} choice"
        self.compacts = {compact.name: compact for compact in compacts}
        self.rule = rule
        self.start = start
        # The weights wait for `from` as well, so the action itself always runs.
        self.gate = Gate()
        self.sums: dict[str, Tensor] = {}
        self.seen = dict.fromkeys(self.compacts, 0)

    def run(self, step: Step) -> None:
        import torch

        for compact in self.compacts.values():
            compact.read()
        waiting = [c for c in self.compacts.values() if c.index is None]
        found = {c.name: g for c in waiting if (g := c.parameter.grad) is not None}
        for compact in waiting:
            compact.discard()
        if not found or (self.start is not None and not self.start.fires(step.clock)):
            return
        dense = {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}
        if not torch.stack([g.isfinite().all() for g in dense.values()]).all():
            step.notes.append(f"{self.name}: a gradient is not finite, the step does not count")
            return
        self._add(dense)
        groups = [waiting] if self.rule.scope == "global" else [[c] for c in waiting]
        for group in groups:
            if all(self.seen[compact.name] >= self.rule.batches for compact in group):
                self._choose(group)

    def _add(self, found: Mapping[str, Tensor]) -> None:
        import torch

        for name, gradient in found.items():
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide
        for name in self.compacts if self.rule.scope == "global" else found:
            self.seen[name] += 1

    def _choose(self, group: Sequence[SelectedEntries]) -> None:
        import torch

        units = [_Units(self.rule.granularity, tuple(c.parameter.shape)) for c in group]
        sums = [self.sums.pop(c.name, None) for c in group]
        scores = [
            torch.zeros(u.count, device=c.parameter.device) if s is None else u.score(s)
            for c, u, s in zip(group, units, sums, strict=True)
        ]
        count = self.rule.count(sum(len(score) for score in scores))
        for compact, unit, chosen in zip(group, units, largest(scores, count), strict=True):
            compact.choose(unit.entries(chosen))

    def memory(self) -> int:
        """Return the bytes held beside the weights."""
        sums = sum(tensor.numel() * tensor.element_size() for tensor in self.sums.values())
        return sums + sum(compact.memory() for compact in self.compacts.values())

    def state_dict(self) -> State:
        state: State = {f"sum/{name}": tensor for name, tensor in self.sums.items()}
        state |= {f"seen/{name}": seen for name, seen in self.seen.items() if seen}
        for name, compact in self.compacts.items():
            if compact.index is not None:
                state |= {f"index/{name}": compact.index, f"values/{name}": compact.values.detach()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import torch

        foreign = {key.partition("/")[2] for key in state} - set(self.compacts)
        if foreign:
            raise ValueError(f"{self.name}: `{min(foreign)}` of the checkpoint is not masked here")
        self.seen = {name: int(state.get(f"seen/{name}", 0)) for name in self.compacts}
        self.sums = {}
        for name, compact in self.compacts.items():
            device = compact.parameter.device
            if f"sum/{name}" in state:
                self.sums[name] = state[f"sum/{name}"].to(device, copy=True)
            if f"index/{name}" not in state:
                compact.forget()
                continue
            compact.choose(state[f"index/{name}"])
            with torch.no_grad():
                compact.values.copy_(state[f"values/{name}"])

    def summary(self) -> str | None:
        numel = sum(compact.parameter.numel() for compact in self.compacts.values())
        chosen = [c for c in self.compacts.values() if c.index is not None]
        trained = sum(compact.values.numel() for compact in chosen)
        waiting = len(self.compacts) - len(chosen)
        tail = f", {waiting} got no gradient to choose from and did not train" if waiting else ""
        return f"{self.label}: {trained} of {numel} entries in {len(chosen)} tensors train{tail}"


class WriteBack(Action):
    """Phase 10: put the updated entries into the weights."""

    phase = Phase.DELTAS
    reads = ("delta",)
    writes = ("params", "metrics")

    def __init__(self, label: str, compacts: Sequence[SelectedEntries]) -> None:
        self.name = f"{label} write"
        self.metric = f"{label}.moved"
        self.compacts = tuple(compacts)
        self.gate = Gate()

    def run(self, step: Step) -> None:
        import torch

        chosen = [compact for compact in self.compacts if compact.index is not None]
        changed = [compact.write() for compact in chosen]
        total = sum(compact.values.numel() for compact in chosen)
        # Entries of 16-bit weights may stay where they are although their master copy moves.
        step.metrics[self.metric] = float(torch.stack(changed).sum()) / total if total else 0.0
