"""What is checked of three steps of a program: numbers, what moved and what did not, and what was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainc.compiler.program.program import Program
from trainc.dsl.reading.signal import full_name
from trainc.dsl.resolve.statements import Clause
from trainc.runtime.step.optimizer import OptimizerStep

DIVERGED = 1e4
"""A loss that no model of the zoo has unless its weights are lost."""
SINGLE = 1e-6
"""How far apart two ways to compute a weight of single precision may be at least."""
SMALLEST_GRADIENT = {torch.float32: 1e-3}
"""What is smaller, by dtype, may move a weight by less than its rounding; 1e-6 in other dtypes."""


class Wrong(Exception):
    """What a case did is not what trainc promises."""


@dataclass
class Trained:
    """A program after its steps.

    `metrics` are those of each step, `before` the weights before the first, `measured` the names of all signals that
    had a value, `with_gradient` the parameters that an optimizer was given a gradient of, `notes` those of all steps.
    """

    program: Program
    metrics: list[dict[str, float]]
    before: Mapping[str, Tensor]
    measured: set[str]
    with_gradient: set[str]
    notes: Sequence[str] = ()

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [one["loss"] for one in self.metrics]


def optimizer_steps(program: Program) -> list[OptimizerStep]:
    """Return the actions that move weights."""
    return [a for a in program.execution.method.actions if isinstance(a, OptimizerStep)]


def note_gradients(action: OptimizerStep, found: set[str]) -> Any:
    """Return a hook that notes which parameters an optimizer is given a gradient of."""

    def note(*_: Any) -> None:
        for slot in action.slots:
            gradient = slot.tensor.grad
            if gradient is not None:
                size = (gradient.to_dense() if gradient.is_sparse else gradient).abs()
                if bool((size > SMALLEST_GRADIENT.get(gradient.dtype, 1e-6)).any()):
                    found.add(slot.name)

    return note


def check_finite(trained: Trained) -> None:
    """Raise Wrong for a loss that is not finite, or that is lost."""
    for number, loss in enumerate(trained.losses, 1):
        if not abs(loss) < DIVERGED:
            raise Wrong(f"the loss of step {number} is {loss}")


def check_equal(one: Trained, two: Trained, near: float) -> None:
    """Raise Wrong where metrics or weights of modules and graph differ by more than rounding, `near`."""
    for step, (mine, theirs) in enumerate(zip(one.metrics, two.metrics, strict=True), 1):
        if mine.keys() != theirs.keys():
            only = sorted(mine.keys() ^ theirs.keys())
            raise Wrong(f"step {step} has {only} by one executor only")
        for name, value in mine.items():
            # What is measured may be a ratio of small numbers.
            loose = near if name == "loss" else 100 * near
            if not _close(value, theirs[name], loose):
                raise Wrong(
                    f"`{name}` of step {step} is {value} by the modules, {theirs[name]} by the graph"
                )
    state = two.program.module.state_dict()
    for name, tensor in one.program.module.state_dict().items():
        within = max(near, SINGLE) if tensor.dtype in (torch.float32, torch.complex64) else near
        if not torch.allclose(tensor, state[name], within, within, equal_nan=True):
            gap = float((tensor - state[name]).abs().max())
            raise Wrong(f"`{name}` of modules and graph are {gap:.2g} apart")


def _close(one: float, two: float, near: float) -> bool:
    both_nan = math.isnan(one) and math.isnan(two)
    return both_nan or math.isclose(one, two, rel_tol=near, abs_tol=near)


def stays(optimizer: Any) -> bool:
    """Say whether a step of an optimizer may leave the weights where they are."""
    return bool(getattr(optimizer, "may_stay", False))


def check_moves(trained: Trained) -> None:
    """Raise Wrong where a parameter without an optimizer moved, or one with a gradient and an optimizer did not."""
    method = trained.program.execution.method
    claimed = {slot.name for action in optimizer_steps(trained.program) for slot in action.slots}
    may_stay = {n for part in method.optimizers if stays(part.construct) for n in part.targets}
    for name, tensor in trained.program.module.named_parameters():
        changed = tensor.detach() != trained.before[name]
        mask: Any = method.masks.get(name)
        if name not in claimed and changed.any():
            raise Wrong(f"`{name}` has no optimizer, and moved")
        if mask is None:
            if name in claimed & trained.with_gradient - may_stay and not changed.any():
                raise Wrong(f"`{name}` has a gradient and an optimizer, and did not move")
        elif mask.separate:
            if int(changed.sum()) > mask.values.numel():
                raise Wrong(
                    f"more entries of `{name}` moved than the {mask.values.numel()} that train"
                )
        elif tensor.detach()[~mask.kept_entries()].any():
            raise Wrong(f"entries of `{name}` that are to be zero are not")


def check_signals(trained: Trained, clause: Clause) -> None:
    """Raise Wrong for a signal that the clause declares and no step measured, where no note of the clause says why."""
    construct = clause.construct
    if any(note.startswith(f"{clause.name}: ") for note in trained.notes):
        return
    for signal in type(construct).declared_signals():
        name = full_name(clause.name, signal)
        if signal in construct.repeated and clause.every is None:
            continue
        if name not in trained.measured and construct.unmeasured_reason(signal) is None:
            raise Wrong(f"`{name}` is declared, and was never measured")


def only_observes(clause: Clause) -> bool:
    """Say whether a clause by its effects changes no number of the training itself."""
    written = {w for effect in type(clause.construct).effects for w in effect.writes}
    return all(w == "metrics" or w.startswith("signal:") for w in written)
