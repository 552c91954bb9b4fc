"""Noised targets: a second branch of each step, at targets or proposals with noise around the true ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from trainc.compiler.constructs.perturb._base import RepeatedPasses, trained_names
from trainc.compiler.errors import SiteError, listed
from trainc.dsl.reading.construct import Effect, Schedule
from trainc.dsl.reading.field_types import call_of
from trainc.dsl.values.functions import Function
from trainc.dsl.values.value_json import Call, Number
from trainc.runtime.step.around import Around, Gradients
from trainc.runtime.step.gradients import GradientTransform, ParameterGradient

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.data.batch import Batch
    from trainc.runtime.mask.update_mask import TrainedEntries
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step

NOISES = {
    "normal": Function({"sigma": "number"}, 1, 1),
    "relative": Function({"sigma": "number"}, 1, 1),
    "box": Function({"sigmas": "numbers"}, 1, 1, schedule=False),
    "centered_box": Function({"sigmas": "numbers"}, 1, 1, schedule=False),
}
Noise = Annotated[Call, call_of("noise", NOISES, "normal(0.1)")]
Part = str | Annotated[int, Field(ge=0)] | None


class NoisedTargets(RepeatedPasses):
    """Updates the weights with g + `weight` g', where g' is the gradient of the loss at noised targets.

    With e ~ N(0, 1) in every entry, `normal(s)` makes a target y + s e, and `relative(s)` y (1 + s e).
    `box(sx, sy, sw, sh)` takes the last axis for the corners (x1, y1, x2, y2) of boxes: the centre c
    moves to c + (w, h) (sx, sy) e, and the size (w, h) becomes (w, h) (1 + (sw, sh) e), never below
    0. Boxes of n axes have 2 n numbers; `centered_box` takes centre and size in place of corners.

    With `input` the targets stay, and the noised values take the place of this input: a model that
    is given proposals by that name, and refines them to its targets, has them around the true ones.
    That input has the target's shape, or one axis more behind the examples, (B, P, ...): then each
    of the P proposals has noise of its own. The loss reported is that of the step's own
    batch. Both have the same dropout. A step costs 1 + `copies`.
    """

    name: ClassVar = "targets"
    cite: ClassVar = (
        "Li et al., Proposal Distribution Calibration for Few-Shot Object Detection, arXiv:2212.07618; of targets: "
        "Bishop, Training with Noise is Equivalent to Tikhonov Regularization, Neural Computation 7 (1995) 108"
    )
    usage: ClassVar = "perturb targets { noise = normal(0.1), weight = 0.1 }"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect(
            "perturb",
            "find the gradient at noised targets",
            ("params", "inputs", "clock"),
        ),
        Effect(
            "gradients", "add the gradient at noised targets", ("gradient", "clock"), ("gradient",)
        ),
    )

    noise: Noise = Field(
        description="what is put on a target: `normal(s)`, `relative(s)`, `box(sx, sy, sw, sh)` or `centered_box(...)`"
    )
    weight: Schedule = Field(
        description="coefficient of the loss at noised targets, 0.1 as published"
    )
    target: Part = Field(
        default=None,
        description="which part of the data's targets gets noise, by name or index, where they are several",
    )
    input: Part = Field(
        default=None,
        description="which input is given the noised values, by name or index, in place of the targets",
    )
    copies: int = Field(default=1, ge=1, description="number of draws in a step, each a pass")

    @field_validator("noise")
    @classmethod
    def _sigmas(cls, value: Call) -> Call:
        given = _numbers(value)
        if None in given or any(sigma is not None and sigma < 0 for sigma in given):
            raise ValueError(f"a standard deviation is a number of 0 or more, found `{value}`")
        if "box" in value.function and len(given) % 2:
            raise ValueError(
                "a box has as many numbers for its centre as for its size, such as"
                f" `{value.function}(0.05, 0.05, 0.07, 0.07)`, found `{value}`"
            )
        return value

    @property
    def sigmas(self) -> list[float]:
        """The standard deviations."""
        return [sigma for sigma in _numbers(self.noise) if sigma is not None]

    def lower(self, to: Lowering) -> None:
        """Run further passes before those of each step, and add what they found to its gradients."""
        branch = NoisedBranch(to.label, self, to.schedule(self.weight))
        to.around(branch)
        to.gradient(Added(f"{to.label}.added", branch, to.trained_entries()), trained_names(to))

    def reference(self, values: Tensor, drawn: Tensor) -> Tensor:
        """Return values with noise, of standard normal numbers `drawn` in their shape."""
        import torch

        sigmas = torch.tensor(self.sigmas, dtype=values.dtype, device=values.device)
        if self.noise.function == "normal":
            return values + sigmas * drawn
        if self.noise.function == "relative":
            return values * (1 + sigmas * drawn)
        one, two = values.chunk(2, -1)
        corners = self.noise.function == "box"
        centre, size = ((one + two) / 2, two - one) if corners else (one, two)
        of_centre, of_size = (sigmas * drawn).chunk(2, -1)
        centre, size = centre + size * of_centre, size * (1 + of_size).clamp(min=0)
        return torch.cat([centre - size / 2, centre + size / 2] if corners else [centre, size], -1)


def _numbers(call: Call) -> list[float | None]:
    """Return the arguments of a call; None for one that is no number."""
    given = *call.args, *(value for _, value in call.kwargs)
    return [one.value if isinstance(one, Number) else None for one in given]


class NoisedBranch(Around):
    """Keeps the gradient at noised targets for an action that adds it; and counts for the summary."""

    takes_shards = True
    figures = ("steps",)

    def __init__(self, name: str, method: NoisedTargets, weight: Callable[[Clock], float]) -> None:
        self.name, self.method, self.weight = name, method, weight
        self.found: dict[str, Tensor] = {}
        self.steps = 0

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Ask for the gradients at noised targets before the step's own passes."""
        self.found = {}
        factor = self.weight(step.clock) / self.method.copies
        for number in range(self.method.copies if factor else 0):
            more = gradients.of_changed(partial(self._noised, gradients, number))
            for name, gradient in more.items():
                kept = self.found.get(name)
                self.found[name] = (
                    gradient * factor if kept is None else kept.add_(gradient, alpha=factor)
                )
        self.steps += bool(factor)
        yield

    def forget(self) -> None:
        """Forget the gradients."""
        self.found = {}

    def _noised(self, gradients: Gradients, number: int, batches: Sequence[Batch]) -> list[Batch]:
        """Return all micro-batches of a step with noise: that of its replica, however the step is divided."""
        import torch

        values = [self._values(*batch) for batch in batches]
        draw = gradients.draw(f"{self.name} {number}", values[0].device)
        total = sum(one.numel() for one in values)
        numbers = torch.randn(total, generator=draw, device=draw.device, dtype=torch.float64)
        drawn = numbers.split([one.numel() for one in values])
        return [
            self._placed(*batch, self.method.reference(one, e.view(one.shape).to(one.dtype)))
            for batch, one, e in zip(batches, values, drawn, strict=True)
        ]

    def _values(self, inputs: Any, targets: Any) -> Tensor:
        """Return what gets noise, in the shape in which it is used; raises SiteError where that is not possible."""
        values: Tensor = self._part(targets, self.method.target, "target")
        if not values.is_floating_point():
            kind = str(values.dtype).removeprefix("torch.")
            raise SiteError(
                f"`{self.name}` puts noise on targets, and these are {kind}: classes and other whole numbers have no"
                " targets near them. Let the data give floating-point numbers, or remove the clause",
                self.name,
            )
        width = len(self.method.sigmas)
        if width > 1 and values.shape[-1:] != (width,):
            raise SiteError(
                f"`{self.name}` puts noise on boxes of {width} numbers, and the targets are {list(values.shape)}: give"
                " boxes along the last axis, two standard deviations for each of their axes",
                self.name,
                "noise",
            )
        if self.method.input is None:
            return values
        given = self._part(inputs, self.method.input, "input")
        if given.shape == values.shape:
            return values
        if given.dim() == values.dim() + 1 and given[:, 0].shape == values.shape:
            return values.unsqueeze(1).expand(given.shape)
        raise SiteError(
            f"`{self.name}` puts noised targets {list(values.shape)} in the place of an input, which is"
            f" {list(given.shape)}: it must have the same shape, or one axis more behind the examples",
            self.name,
            "input",
        )

    def _placed(self, inputs: Any, targets: Any, noised: Tensor) -> Batch:
        """Return a micro-batch with noised values in their place."""
        if self.method.input is None:
            return inputs, _with(targets, self.method.target, noised)
        given = self._part(inputs, self.method.input, "input")
        return _with(inputs, self.method.input, noised.to(given.dtype)), targets

    def _part(self, tree: Any, pick: str | int | None, field: str) -> Tensor:
        """Return a part of inputs or targets; raises SiteError where there is none of that name or index."""
        from torch import Tensor

        if isinstance(tree, Tensor):
            parts: dict[Any, Any] = {None: tree}
        else:
            parts = dict(tree if isinstance(tree, Mapping) else enumerate(tree))
        if isinstance(found := parts.get(pick), Tensor):
            return found
        names = listed(str(one) for one in parts if isinstance(parts[one], Tensor))
        have = "are one tensor" if None in parts else f"have {names}"
        lead = (
            f"finds no {field} `{pick}`"
            if pick is not None
            else f"needs to know which {field} it is of"
        )
        instead = (
            f"remove `{field}`"
            if None in parts and field == "target"
            else f"write `{field} = ...` with one of these"
        )
        if None in parts and field == "input":
            instead = "let the data give a dict or tuple of inputs, of which the model takes one as proposals"
        raise SiteError(
            f"`{self.name}` {lead}: the {field}s {have}. To go on, {instead}", self.name, field
        )

    def memory(self) -> int:
        """Return 0: gradients are counted with the step's own."""
        return 0

    def summary(self) -> str | None:
        """Say in how many steps the gradient at noised targets was added."""
        added = f"{self.steps} step{'s' * (self.steps != 1)}"
        return (
            f"{self.name}: added the gradient at noised targets in {added}" if self.steps else None
        )


class Added(GradientTransform):
    """Adds the gradients of the noised branch to those of the step's own passes."""

    takes_shards = True

    def __init__(self, name: str, branch: NoisedBranch, entries: TrainedEntries) -> None:
        self.name, self.branch, self.entries = name, branch, entries

    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        """Make each gradient g + weight g'."""
        for one in gradients:
            if (more := self.branch.found.get(one.name)) is not None:
                one.gradient.add_(self.entries.picked(one.name, more).to(one.gradient.dtype))
        self.branch.forget()


def _with(tree: Any, pick: str | int | None, tensor: Tensor) -> Any:
    """Return inputs or targets with another tensor in one place."""
    if pick is None:
        return tensor
    if isinstance(tree, Mapping):
        return {**tree, pick: tensor}
    kept = [tensor if i == pick else one for i, one in enumerate(tree)]
    return type(tree)(*kept) if hasattr(tree, "_fields") else type(tree)(kept)
