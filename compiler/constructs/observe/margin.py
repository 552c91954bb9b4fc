"""Margin: by how much the right class is ahead of the next, or how far an example is from another class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import Construct, Effect, ModuleSelector, Signal
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.storage.form import Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.dsl.values.selectors import Selector
    from trainc.runtime.processes.replica_group import ReplicaGroup


class Margin(Construct):
    """Reports the margins of a classifier, on evaluations or on training steps; changes nothing.

    The margin of a prediction is z_y - max z_j over the classes j other than the target y: positive
    where it is right. With `layer`, the linear layer of weights W that gives the logits, it is the
    distance to the nearest example of another class: min over j of (z_y - z_j) / |W_y - W_j|_q,
    where distances of what the layer is given are in the norm p of `norm` and 1/p + 1/q = 1. For a
    linear model that is the distance of the inputs, and no change of an input that is shorter than
    `min` makes the prediction wrong. A class whose weights are those of y is at no distance where
    z_j = z_y, as all are in a head of zeros, else infinitely far. Targets that do not count are left out.
    """

    cite: ClassVar = (
        "Li, Fang, Xu, Zhao, Implicit Bias of Gradient Descent based Adversarial Training on "
        "Separable Data, ICLR 2020, arXiv:1906.02931"
    )
    usage: ClassVar = "observe margin { of = training }"
    signals: ClassVar = {
        "min": Signal("smallest margin", title="smallest"),
        "mean": Signal("mean margin", title="mean"),
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "measure margins",
            ("forward", "params", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    of: Literal["evaluation", "training"] = Field(
        default="evaluation",
        description="whose predictions: of evaluations, or of training steps, which have dropout and noise",
    )
    layer: ModuleSelector | None = Field(
        default=None,
        description="the linear layer that gives the logits, by whose weights margins are distances",
    )
    norm: Literal["l2", "linf"] = Field(
        default="l2", description="with `layer`, the norm of distances"
    )

    def lower(self, to: Lowering) -> None:
        """Read evaluations or training steps; raises FieldError unless `layer` is one linear layer that is whole."""
        weight = None if self.layer is None else self._weight(to, self.layer)
        to.observe(Margins(to.label, self, weight), self.of)

    def _weight(self, to: Lowering, layer: Selector) -> str:
        """Return the name of the weight of the layer; raises FieldError where the logits are not of a whole weight."""
        found = to.select(layer, "modules")
        held = to.inventory.module[found[0]] if len(found) == 1 else None
        if held is None or "Linear" not in held.types:
            raise FieldError("layer", f"`layer` selects {_said(found)}: select one Linear layer")
        called = f"{found[0]}.weight" if found[0] else "weight"
        every = to.inventory.parameters
        weight = next((p.name for p in every if called in (p.name, *p.aliases)), None)
        if weight is None or "adapter" in held.roles:
            made = "computed" if weight is None else "changed by an adapter"
            raise FieldError(
                "layer",
                f"the weight of `{found[0]}` is {made}, and distances are by a weight that is there: remove `layer`, or"
                " let a plain Linear layer give the logits",
            )
        if to.is_sharded(weight):
            raise FieldError(
                "layer",
                f"`{weight}` is sharded over processes (FSDP2): remove `layer`, or use DistributedDataParallel",
            )
        instead = "Remove `layer`, or use DistributedDataParallel"
        to.refuse_shards((weight,), "`layer` reads its weight", instead)
        return weight

    def reference(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the margin of each prediction, (n,), of logits (n, C), targets (n,) and weights (C, features)."""
        import torch

        right = logits.gather(1, targets[:, None])
        gaps = right - logits
        if weight is not None:
            q = 2.0 if self.norm == "l2" else 1.0
            between = torch.cdist(weight, weight, p=q, compute_mode="donot_use_mm_for_euclid_dist")
            distances = gaps / between[targets]
            gaps = distances.masked_fill((gaps == 0) & (between[targets] == 0), 0)  # both the same
        own = torch.nn.functional.one_hot(targets, logits.shape[1]).bool()
        return gaps.masked_fill(own, float("inf")).amin(1)


def _said(found: tuple[str, ...]) -> str:
    """Return what a selector found, in words."""
    return f"{len(found)} modules" if len(found) != 1 else f"`{found[0]}`, which is no linear layer"


class Margins(Observer):
    """Phase 12: keeps the margins of all predictions until they are measured."""

    of_classes = True

    def __init__(self, name: str, construct: Margin, weight: str | None) -> None:
        self.name, self.construct, self.weight = name, construct, weight
        self.seen: list[Tensor] = []
        self.first = self.last = float("nan")
        """The mean margin measured first and last, for the summary."""

    def see(self, forward: Seen) -> None:
        import torch

        logits, counted = forward.view(0)[forward.counted], forward.counted
        if logits.shape[-1] < 2:
            raise ValueError(
                "the logits are of one class, and a margin is between two: remove the clause, or let the model give a"
                " logit for each class"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = None
        if self.weight is not None:
            weight = forward.parameters[self.weight].detach().to(logits.dtype)
            if len(weight) != logits.shape[-1]:
                raise ValueError(
                    f"{self.name}: the logits have {logits.shape[-1]} classes, but `{self.weight}` has"
                    f" {len(weight)} rows: let `layer` be the layer that gives the logits"
                )
        self.seen.append(self.construct.reference(logits, forward.targets[counted], weight))

    def found(self, replicas: ReplicaGroup | None = None) -> dict[str, float]:
        import torch

        own = torch.cat(self.seen).double() if self.seen else torch.zeros(0)
        low = float(own.min()) if len(own) else float("inf")
        row = [low, float(own.sum()), float(len(own))]
        rows = (
            torch.tensor([row], dtype=torch.float64)
            if replicas is None
            else replicas.gather_rows(row)
        )
        count = float(rows[:, 2].sum())
        if not count:
            return {}
        self.last = float(rows[:, 1].sum()) / count
        self.first = self.last if self.first != self.first else self.first
        return {"min": float(rows[:, 0].min()), "mean": self.last}

    def forget(self) -> None:
        self.seen = []

    def state_dict(self) -> ActionState:
        return {"first": self.first, "last": self.last} if self.last == self.last else {}

    def state_form(self) -> Form:
        return Record({"first": Number(), "last": Number()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.last = (state.get(n, float("nan")) for n in ("first", "last"))

    def summary(self) -> str | None:
        if self.last != self.last:
            return None
        return (
            f"{self.name}: mean margin of {self.construct.of} {self.first:.4g} -> {self.last:.4g}"
        )
