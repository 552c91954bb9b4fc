"""SIFT: train only the entries with the largest gradients, or with the largest of another score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.mask._base import ChoosingMask, EntryMask
from trainc.dsl.reading.construct import Effect, Fraction, Problem
from trainc.dsl.reading.field_types import word_or_call
from trainc.dsl.values.functions import Function
from trainc.dsl.values.value_json import Call, Number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.mask.entry_choice import Choice
    from trainc.runtime.mask.scores import Score, SummedScores

_BY_GRADIENTS = ("gradient", "movement")
Select = Annotated[
    str | Call,
    word_or_call(
        "score",
        (*_BY_GRADIENTS, "magnitude", "smallest", "random", "alpha"),
        {"principal": Function({"rank": "plain"}, 1, 1)},
    ),
]


def rank_of(select: Call) -> int:
    """Return r of `principal(rank = r)`; raises ValueError unless it is a whole number, 1 or more."""
    given = [*select.args, *dict(select.kwargs).values()][0]
    if not isinstance(given, Number) or given.value < 1 or given.value != int(given.value):
        raise ValueError(f"`{select}`: expected a whole number, 1 or more, as in `principal(128)`")
    return int(given.value)


def _rank(parameter: ParameterEntry) -> int:
    """Return the highest rank of a parameter as a matrix: axis 0 by all other axes."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return min(rows, parameter.numel // max(1, rows))


class Sift(EntryMask, ChoosingMask):
    """Trains the k entries of each tensor whose accumulated gradient g is largest in magnitude.

    k = min(int(density * numel) + 1, numel), as published; of `structure = n_m(n, m)` n of each m. g is the sum over
    the first `batches` steps, in which the selected tensors do not change. From the next step on, the optimizer has
    these k entries only: its moments, weight decay and clipping act on them, and the other entries never change. Of
    equal gradients, the one at the lower position is chosen.

    `select` takes another score: `movement`, the sum of - w g over these steps, largest where weights move away from
    zero; or of the weights alone, which are chosen before the first step and train in it: `magnitude`, |w|;
    `smallest`, -|w|; `principal(rank)`, the magnitude in the best approximation of that rank, as LIFT does; `random`,
    numbers that follow from the seed and the parameter's name; and for whole tensors `alpha`, the exponent of the tail
    of the spectrum, from its median: largest where training has formed a weight least. With `every` the entries are
    chosen again until `until`: those that stay keep what the optimizer has of them, and it begins new ones as it begins
    a parameter: Adam with moments of 0, Rprop with steps of the rate. Only its count of steps is the tensor's, so that
    Adam corrects the bias of new moments as if they were old: with betas 0.9 and 0.999 an entry whose gradient stays
    the same moves by 3.2 times the rate at first, and by up to 6.6 times, twelve steps later. While gradients are
    summed for a choice, the entries of before train.

    One dense gradient is held at a time, also in a step that chooses: entries are found as a gradient arrives, and
    switched to after the update, unless the step is left out. It holds those of all selected tensors at once where a
    choice needs them: with `scope = global`, `erk` or by spectra; in all but the last of `batches`, whose sums are held
    besides; in a step of several micro-batches, which are summed, and in a loop of your own, which may have more of
    them (`trainc run` and `program.step` know); with replicas; beside clauses that run passes before the step's; and of
    tensors that a `noise_scale` measures, or that get their gradient in parts, as from a reentrant checkpoint, which a
    note says. A choice by weights alone needs none. Rows, columns and blocks are chosen by the L2 norm of their scores,
    with `movement` and `smallest` by the mean.
    """

    cite: ClassVar = (
        "Song et al., Sparse is Enough in Fine-tuning Pre-trained Large Language Models, "
        "ICML 2024, arXiv:2312.11875; of `principal`: Liu et al., LIFT, ICML 2025, arXiv:2506.00772; a mask by"
        " magnitudes alone: Liao, Meng and Monz, Parameter-Efficient Fine-Tuning without Introducing New Latency, ACL"
        " 2023, arXiv:2305.16742"
    )
    usage: ClassVar = "mask sift on ndim(2) - type(Embedding) { density = 1% }"
    identity: ClassVar = {"density": "100%"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "see when entries are to be chosen, and choose them by weights",
            ("params", "clock"),
            ("optimizer_state", "metrics", "signal:overlap"),
        ),
        Effect(
            "gradients",
            "gather the entries that train",
            ("gradient", "params"),
            ("gradient",),
            lasting=True,
        ),
        Effect(
            "deltas",
            "write the trained entries into the weights, choose others by gradients",
            ("delta", "gradient"),
            ("params", "optimizer_state", "metrics", "signal:overlap"),
            lasting=True,
        ),
    )

    density: Fraction | None = Field(
        default=None,
        description="fraction of the entries that trains, above 0%; `n_m(n, m)` needs none, others do",
    )
    select: Select = Field(
        default="gradient",
        description="by what entries are chosen: the largest |sum of g|, -sum of w g (`movement`), |w| (`magnitude`),"
        " -|w| (`smallest`), entries of the approximation of a rank (`principal(rank)`), tails of spectra (`alpha`), or"
        " none (`random`)",
    )
    batches: int = Field(
        default=1, ge=1, description="optimizer steps whose gradients are summed before a choice"
    )
    rest: Literal["train", "freeze"] = Field(
        default="train", description="whether parameters that are not selected train or are frozen"
    )

    @field_validator("density")
    @classmethod
    def _is_positive(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(
                "expected a fraction above 0%; to train nothing, freeze the parameters"
            )
        return value

    @field_validator("select")
    @classmethod
    def _has_a_rank(cls, value: str | Call) -> str | Call:
        if isinstance(value, Call):
            rank_of(value)
        return value

    @model_validator(mode="after")
    def _spectra_are_of_whole_tensors(self) -> Self:
        if self.select == "alpha" and self.structure != "layer":
            raise ValueError(
                "a spectrum is of a whole tensor: add `structure = layer` and `scope = global`, or select by another"
                " score"
            )
        return self

    @property
    def by_gradients(self) -> bool:
        """Say whether the score is of gradients, not of the weights alone."""
        return self.select in _BY_GRADIENTS

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report frozen parameters, tensors that the structure does not fit, and choices that come too late."""
        frozen = [p.name for p in bound.parameters if not p.trainable]
        if frozen:
            message = f"`{frozen[0]}` is frozen, so none of its entries can train"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        yield from super().validate_targets(bound)
        if self.select == "alpha":
            yield from self.without_spectrum(bound, "select")
        if isinstance(self.select, Call) and all(
            rank_of(self.select) >= _rank(p) for p in bound.parameters
        ):
            yield Problem(
                "no-effect",
                f"no selected parameter has a higher rank than {rank_of(self.select)}, so that each is its own"
                " approximation",
                field="select",
                severity="warning",
                help="write a smaller rank, or `select = magnitude`",
            )
        if not self.by_gradients and self.batches != 1:
            message = (
                f"`select = {self.select}` reads the weights alone, and `batches` counts gradients"
            )
            yield Problem("bad-value", message, field="batches", help="remove `batches`")
        if bound.steps is not None and self.by_gradients and self.batches >= bound.steps:
            yield Problem(
                "never-acts",
                f"the entries that train are chosen after {self.batches} steps, and {bound.steps:g} steps are left of"
                " the run: nothing selected would train",
                field="batches",
                help="write fewer `batches`",
            )

    def count(self, units: int, density: float) -> int:
        """Return how many of `units` entries, rows, columns or blocks train."""
        return min(int(density * units) + 1, units)

    def lower(self, to: Lowering) -> None:
        """Give the optimizer selected entries in place of the tensors, chosen when due."""
        names = [entry.name for entry in to.parameters()]
        density = self.exact or self.density
        assert density is not None
        to.select_entries(
            names,
            self._score(to),
            self._choice(to),
            density,
            batches=self.batches,
            master=self.master is not False,
        )
        if self.rest == "freeze":
            others = (p.name for p in to.inventory.trainable if p.name not in {*names})
            to.freeze(others, rest=True)

    def _choice(self, to: Lowering) -> Choice:
        from trainc.runtime.mask.structures import mean

        signed = {"reduce": mean} if self.select in ("movement", "smallest") else {}
        return self.choice(to, count=self.count, **signed)

    def _score(self, to: Lowering) -> Score | SummedScores:
        from trainc.runtime.mask import scores

        if isinstance(self.select, Call):
            return scores.Principal(rank_of(self.select))
        if self.select == "random":
            return scores.Random(to.seed())
        if self.select == "alpha":
            weights = {p.name: to.inventory.weight_of[p.name] for p in to.parameters()}
            return scores.Alpha(partial(self._alphas, to.model, weights))
        if self.select in ("magnitude", "smallest"):
            return scores.magnitude if self.select == "magnitude" else scores.smallness
        return scores.summed_gradients() if self.select == "gradient" else scores.summed_movement()

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
            k = self.count(len(scores), self.density or 0)
            order = scores.argsort(descending=True, stable=True)[:k]
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
