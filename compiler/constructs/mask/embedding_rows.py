"""Rows: train some rows of a parameter, such as those of new tokens, and leave the others as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.mask._base import EntryMask
from trainc.dsl.reading.construct import Effect, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class EmbeddingRows(EntryMask):
    """Trains some rows of each selected parameter, indices of its axis 0: of an embedding, the vectors of some tokens.

    `rows` lists them, from 0 on, or `last` says how many there are at the end, where `resize_token_embeddings` and its
    like put new tokens. The optimizer has these rows alone: moments, weight decay and clipping act on them, and the
    other rows stay as they are, bit for bit. A weight that embedding and head share has one choice of rows for both.
    """

    cite: ClassVar = (
        "Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021,"
        " nlp.stanford.edu/~johnhew/vocab-expansion.html, for rows that are new; the mask is that of Song et al.,"
        " arXiv:2312.11875, with rows that are given"
    )
    usage: ClassVar = 'mask embedding_rows on "embed.token" { last = 2 }'
    targets: ClassVar = "parameters"
    effects: ClassVar = (
        Effect(
            "perturb", "tell which rows train", ("params", "clock"), ("optimizer_state", "metrics")
        ),
        Effect(
            "gradients",
            "gather the rows that train",
            ("gradient", "params"),
            ("gradient",),
            lasting=True,
        ),
        Effect(
            "deltas",
            "write the trained rows into the weights",
            ("delta",),
            ("params", "metrics"),
            lasting=True,
        ),
    )

    rows: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="the rows that train, such as `[50257, 50258]`"
    )
    last: int | None = Field(
        default=None, ge=1, description="how many rows at the end train, in place of `rows`"
    )
    rest: Literal["train", "freeze"] = Field(
        default="train", description="whether parameters that are not selected train or are frozen"
    )

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if (self.rows is None) == (self.last is None):
            raise ValueError("write either `rows`, a list of them, or `last`, how many at the end")
        if self.rows is not None and len({*self.rows}) < len(self.rows):
            twice = next(row for row in self.rows if self.rows.count(row) > 1)
            raise ValueError(f"row {twice} is listed twice: remove one")
        return self

    def of(self, length: int) -> list[int]:
        """Return the rows that train of a parameter with so many rows."""
        return [*range(length)][-self.last :] if self.last is not None else [*(self.rows or ())]

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report parameters that are frozen or have no such rows."""
        yield from super().validate_targets(bound)
        field = "last" if self.rows is None else "rows"
        largest = self.last if self.last is not None else 1 + max(self.rows or (0,))
        for entry in bound.parameters:
            if not entry.trainable:
                yield Problem(
                    "selector-matches-frozen",
                    f"`{entry.name}` is frozen, so none of its rows can train",
                    help="set `requires_grad = True` on it, or select among `trainable`",
                )
            elif entry.ndim < 2:
                yield Problem(
                    "wrong-target-kind",
                    f"`{entry.name}` is not a matrix, so it has no rows",
                    help="select the weight alone, such as `& ndim(2)`",
                )
            elif largest > entry.shape[0]:
                yield Problem(
                    "bad-value",
                    f"`{entry.name}` has {entry.shape[0]} rows, from 0 to {entry.shape[0] - 1}",
                    field=field,
                    help="give rows that it has",
                )

    def lower(self, to: Lowering) -> None:
        """Give the optimizer the rows in place of the tensors."""
        from trainc.runtime.mask.entry_choice import Choice
        from trainc.runtime.mask.structures import Structure

        to.refuse_times("the rows that train are listed, once for all", "every")
        entries = to.parameters()
        # All have as many rows that train, however many they have.
        count = self.last or len(self.rows or ())
        choice = Choice(Structure("row"), count=lambda units, density: count)
        names = [entry.name for entry in entries]
        to.select_entries(names, self.score, choice, 1.0, master=self.master is not False)
        if self.rest == "freeze":
            kept = {entry.name for entry in entries}
            to.freeze(p.name for p in to.inventory.trainable if p.name not in kept)

    def score(self, step: Step, name: str) -> Tensor:
        """Return 1 for the entries of the rows that train, and 0 for others."""
        import torch

        weight = step.parameters[name].detach()
        rows = torch.tensor(self.of(len(weight)), device=weight.device)
        return torch.zeros_like(weight, dtype=torch.float32).index_fill_(0, rows, 1.0)

    def reference(
        self,
        weight: Tensor,
        gradients: Sequence[Tensor],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
    ) -> Tensor:
        """Return a parameter after steps with these gradients: its rows are a tensor of their own."""
        import torch

        rows = self.of(len(weight))
        trained = weight[rows].clone().requires_grad_()
        optimizer = make([trained])
        for gradient in gradients:
            trained.grad = gradient[rows]
            optimizer.step()
        found = weight.clone()
        with torch.no_grad():
            found[rows] = trained
        return found
