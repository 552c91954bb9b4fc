"""Adversarial training: inputs, or what layers give, moved up the loss of each example, within a small ball."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.perturb._base import Mix, RepeatedPasses, trained_names
from trainc.compiler.errors import SiteError
from trainc.dsl.reading.construct import Effect, ModuleSelector, Schedule, SignedSchedule
from trainc.runtime.step.around import Around, Gradients

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.layer_shift import LayerShift
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step

PGD_STEP = 2.5
"""The length of a step, times the number of steps, relative to the radius, unless `step_size` says otherwise."""


class Adversarial(RepeatedPasses):
    """Trains at x + d, where d with |d| <= `radius` raises the loss of each example x.

    d comes from `steps` gradient steps up the loss: d <- P(d + step_size u(g)), with g the gradient
    of the example's loss in x + d, u(g) = sign g for `linf` and g / |g| for `l2`, and P the
    projection to the ball, for `linf` entry by entry. One step from d = 0 is FGSM, more are PGD,
    which may begin at a random point of the ball (`random_start`). |.| is over all entries of one
    example, of all inputs of floating point; those of other types, and an example whose g is 0 or
    not finite, stay. x + d stays between `low` and `high` where they are given. For a linear model of two
    classes one step finds the maximum: its loss is softplus(-(y w.x - radius |w|_q)), 1/p + 1/q = 1.

    With `at` d is added to what these layers give in place of the inputs, such as the embeddings of
    tokens; then the modules run, not a graph. What `forward` computes between layers has no name: an
    nn.Identity there can be selected. The weights are updated with (1 - mix) g(x) +
    mix g(x + d): with `mix` = 1, its default, by the adversarial loss alone. The loss reported is
    that at x + d. All passes have the same dropout and noise, and BatchNorm takes its running
    statistics from the last. A step costs `steps` + 1, with `mix` below 1 one more.
    """

    cite: ClassVar = (
        "Goodfellow, Shlens, Szegedy, Explaining and Harnessing Adversarial Examples, ICLR 2015, "
        "arXiv:1412.6572; Madry et al., Towards Deep Learning Models Resistant to Adversarial "
        "Attacks, ICLR 2018, arXiv:1706.06083; on embeddings: Miyato, Dai, Goodfellow, ICLR 2017, "
        "arXiv:1605.07725"
    )
    usage: ClassVar = "perturb adversarial { norm = linf, radius = 0.03 }"
    identity: ClassVar = {"radius": "0", "mix": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "move the inputs of each example up its loss",
            ("params", "inputs", "clock"),
            ("inputs",),
        ),
        Effect("gradients", "mix in the gradient at the inputs", ("gradient",), ("gradient",)),
    )

    norm: Literal["l2", "linf"] = Field(description="the norm of what is added to an example")
    radius: Schedule = Field(description="largest norm of what is added, 0 or more")
    steps: int = Field(default=1, ge=1, description="number of gradient steps, each a pass")
    step_size: Schedule | None = Field(
        default=None,
        description=f"length of one of them; the radius of one step, else {PGD_STEP} radius / steps",
    )
    random_start: bool = Field(
        default=False, description="begin at a random point of the ball, uniform in it"
    )
    mix: float = Field(default=1.0, ge=0, le=1, description="part of the adversarial loss, 0 to 1")
    at: ModuleSelector | None = Field(
        default=None, description="layers whose outputs are moved, in place of the inputs"
    )
    low: SignedSchedule | None = Field(
        default=None, description="smallest value that an input may have, such as 0 of pixels"
    )
    high: SignedSchedule | None = Field(
        default=None, description="largest value that an input may have, such as 1 of pixels"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.at is not None and not (self.low is None and self.high is None):
            raise ValueError("`low` and `high` are of inputs: remove them, or `at`")
        return self

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it mixes gradients only with `mix` below 1."""
        return effect.phase != "gradients" or self.mix < 1

    def lower(self, to: Lowering) -> None:
        """Surround the passes of each step with the change of their inputs."""
        from trainc.compiler.method.layer_shift import LayerShift

        shifts: list[LayerShift] = []
        for module in () if self.at is None else to.select(self.at, "modules"):
            shifts.append(LayerShift())
            to.layer(module, shifts[-1])
        written = (self.radius, self.step_size, self.low, self.high)
        numbers = [None if one is None else to.schedule(one) for one in written]
        attack = Attack(to.label, self, numbers, shifts)
        to.around(attack)
        if self.mix < 1:
            mix = Mix(f"{to.label}.mix", self.mix, attack, to.trained_entries())
            to.gradient(mix, trained_names(to))

    def reference(
        self, moves: Sequence[Tensor], gradients: Sequence[Tensor], size: float, radius: float
    ) -> list[Tensor]:
        """Return d after a step of length `size`, of tensors with the examples along their first axes."""
        import torch

        grown = [d + size * u for d, u in zip(moves, self._upward(gradients), strict=True)]
        if self.norm == "linf":
            return [d.clamp(-radius, radius) for d in grown]
        norms = example_norms(grown)
        factor = torch.where(norms > radius, radius / norms.clamp(min=1e-300), 1.0)
        return [d * _of_examples(factor, d) for d in grown]

    def _upward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return u(g); 0 for an example whose gradient is 0 or not finite."""
        import torch

        norms = example_norms(gradients)
        known = (norms > 0) & norms.isfinite()
        if self.norm == "linf":
            return [torch.where(_of_examples(known, g), g.sign(), 0) for g in gradients]
        factor = torch.where(known, 1 / norms, 0.0)
        return [(g * _of_examples(factor, g)).nan_to_num(0, 0, 0) for g in gradients]


def example_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each example over tensors with the examples along their first axes, float64 (B,)."""
    import torch

    squares = [torch.linalg.vector_norm(t.flatten(1).double(), dim=1).square() for t in tensors]
    return torch.stack(squares).sum(0).sqrt()


def _of_examples(values: Tensor, like: Tensor) -> Tensor:
    """Return one value of each example in a shape that multiplies a tensor of them, and in its dtype."""
    shaped = values.view(-1, *[1] * (like.dim() - 1))
    return shaped if values.dtype.is_floating_point is False else shaped.to(like.dtype)


class Attack(Around):
    """Runs the passes of a step at moved inputs; keeps nothing from step to step but counts for the summary."""

    takes_shards = True
    figures = ("moved",)

    def __init__(
        self,
        name: str,
        method: Adversarial,
        numbers: Sequence[Callable[[Clock], float] | None],
        shifts: Sequence[LayerShift],
    ) -> None:
        self.name, self.method, self.numbers = name, method, tuple(numbers)
        self.bounds: tuple[float | None, float | None] = (None, None)
        self.shifts = tuple(shifts)
        self.first: dict[str, Tensor] = {}
        self.moved = 0

    def forget(self) -> None:
        """Forget the gradients at the inputs."""
        self.first = {}

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Let the passes inside have moved inputs."""
        self.forget()
        given = [None if one is None else one(step.clock) for one in self.numbers]
        radius, size, *_ = given
        self.bounds = given[2], given[3]
        if radius:
            if self.method.mix < 1:
                self.first = gradients()
            steps = self.method.steps
            default = radius * (PGD_STEP / steps if steps > 1 else 1)
            self._attack(gradients, radius, default if size is None else size)
            self.moved += 1
        try:
            yield
        finally:
            for shift in self.shifts:
                shift.clear()

    def _attack(self, gradients: Gradients, radius: float, size: float) -> None:
        """Move inputs, or the outputs of layers, of every micro-batch."""
        places: list[list[Tensor]] = []
        if self.shifts:
            found = self._of_layers(gradients)
        else:
            places = [_floats(inputs) for inputs in gradients.inputs]
            found = self._of_inputs(gradients)
        clean = [[x.clone() for x in one] for one in places]
        moves = self._starts(gradients, found, radius)
        for number in range(self.method.steps):
            if number or self.method.random_start:
                self._place(moves, clean, places)
                found = self._of_layers(gradients) if self.shifts else self._of_inputs(gradients)
            moves = [
                self.method.reference(d, g, size, radius) for d, g in zip(moves, found, strict=True)
            ]
        self._place(moves, clean, places)

    def _starts(
        self, gradients: Gradients, like: Sequence[Sequence[Tensor]], radius: float
    ) -> list[list[Tensor]]:
        """Return where d begins, for each micro-batch: 0, or a random point of the ball."""
        import torch

        if not self.method.random_start:
            return [[torch.zeros_like(g) for g in one] for one in like]
        draw = gradients.draw(self.name, like[0][0].device)
        found = []
        for one in like:
            if self.method.norm == "linf":
                found.append(
                    [torch.empty_like(g).uniform_(-radius, radius, generator=draw) for g in one]
                )
                continue
            normal = [torch.empty_like(g).normal_(generator=draw) for g in one]
            entries = sum(g[0].numel() for g in one)
            part = torch.empty(len(one[0]), dtype=torch.float64, device=draw.device)
            lengths = radius * part.uniform_(generator=draw) ** (1 / entries)
            factor = lengths / example_norms(normal)
            found.append([g * _of_examples(factor, g) for g in normal])
        return found

    def _place(
        self,
        moves: Sequence[Sequence[Tensor]],
        clean: Sequence[Sequence[Tensor]],
        places: Sequence[Sequence[Tensor]],
    ) -> None:
        """Let the next passes have these moves."""
        for number, shift in enumerate(self.shifts):
            shift.set([one[number] for one in moves])
        low, high = self.bounds
        for one, starts, inputs in zip(moves, clean, places, strict=True) if places else ():
            for d, start, x in zip(one, starts, inputs, strict=True):
                x.copy_(start + d)
                if not (low is None and high is None):
                    x.clamp_(low, high)

    def _of_inputs(self, gradients: Gradients) -> list[list[Tensor]]:
        """Return the gradients of the inputs of each micro-batch, without those that can have none."""
        try:
            found = gradients(of="inputs")
        except ValueError as error:
            raise SiteError(
                f"`{self.name}` moves inputs of floating point, and the model is given none. Let it move what layers"
                ' give instead, such as the embeddings of tokens: `at = type(Embedding)`, or `at = "embed"`',
                self.name,
            ) from error
        return [_floats(tree) for tree in found]

    def _of_layers(self, gradients: Gradients) -> list[list[Tensor]]:
        """Return the gradients of what is added to the layers' outputs, by micro-batch and layer."""

        def begin(first_example: int) -> dict[str, Tensor]:
            leaves: dict[str, Tensor] = {}
            for number, shift in enumerate(self.shifts):
                shift.watch(f"{number}", leaves, first_example)
            return leaves

        found = gradients.of_tensors(begin)
        for shift in self.shifts:
            shift.watch("", None)
        return [[one[f"{number}"] for number in range(len(self.shifts))] for one in found]

    def memory(self) -> int:
        """Return 0: what it holds is of the size of the batch."""
        return 0

    def summary(self) -> str | None:
        """Say in how many steps inputs moved."""
        what = "what layers give" if self.shifts else "inputs"
        steps = f"{self.moved} step{'s' * (self.moved != 1)}"
        return (
            f"{self.name}: moved {what} for the passes of {steps}"
            if self.moved
            else f"{self.name}: moved nothing"
        )


def _floats(tree: Any) -> list[Tensor]:
    """Return the tensors of floating point of an input, in their order."""
    leaves = (
        tree.values()
        if isinstance(tree, dict)
        else tree
        if isinstance(tree, tuple | list)
        else (tree,)
    )
    found = []
    for leaf in leaves:
        if isinstance(leaf, dict | tuple | list):
            found += _floats(leaf)
        elif leaf is not None and leaf.is_floating_point():
            found.append(leaf)
    return found
