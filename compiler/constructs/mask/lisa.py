"""LISA: a few blocks train at a time, drawn anew again and again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Flag, Form, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.gradients import Paused
    from trainc.runtime.step.record import Step


class Lisa(Construct):
    """Trains `active` blocks of the model at a time, drawn at random without repeats, and leaves the others frozen.

    The blocks are those of the selected parameters. What is in no block, embeddings, head and the norm before it as
    published, trains in every step, and so does what `on` leaves out. Blocks are drawn at `from` and again `every`;
    before and after the clause's times all of them train. The draw follows from the run's seed and the step, so that
    replicas draw the same blocks, and so does a resumed run. A frozen block has no gradient: weights and optimizer
    state stay as they are, it does not decay, and it is not part of the norm that clipping reads. With `state = drop`
    the optimizer forgets a block when it is frozen and begins anew with it later, so that it holds the moments of
    `active` blocks alone. Gradients of frozen blocks are computed, and freed before the optimizer steps.
    """

    cite: ClassVar = (
        "Pan et al., LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, NeurIPS"
        " 2024, arXiv:2403.17919, algorithm 1"
    )
    usage: ClassVar = "mask lisa every 20 steps"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {"trained": "fraction of the entries of the blocks that train, 0 to 1"}
    without_gradient: ClassVar = "a block that is frozen has no gradient until it is drawn"
    effects: ClassVar = (
        Effect("perturb", "draw the blocks that train", ("clock",), ("optimizer_state",)),
        Effect(
            "gradients",
            "drop the gradients of the others",
            ("gradient",),
            ("gradient",),
            lasting=True,
        ),
    )

    active: int = Field(default=1, ge=1, description="how many blocks train at a time")
    state: Literal["drop", "keep"] = Field(
        default="drop",
        description="what becomes of the optimizer's state of a block that is frozen: it is freed, or kept until the"
        " block trains again",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report models without blocks, and a number of blocks of which none is frozen."""
        found = blocks(bound.parameters)
        if not found:
            yield Problem(
                "wrong-target-kind",
                f"`{bound.parameters[0].name}` is in no block of the model, and neither is any other selected"
                " parameter",
                help='select parameters of blocks, such as `"blocks.**"`',
            )
        elif self.active >= len(found):
            yield Problem(
                "never-acts",
                f"all of the {len(found)} selected blocks would train in every step",
                field="active",
                help=f"write fewer than {len(found)}, or remove the clause",
            )

    def lower(self, to: Lowering) -> None:
        """Pause the blocks that are not drawn."""
        from trainc.runtime.schedule.gate import Gate

        found = blocks(to.parameters())
        sizes = {n: to.inventory.parameter[n].numel for block in found for n in block}
        window = to.gate() or Gate()
        held = 1.0
        if self.state == "drop" and window.span() == Gate():
            largest = sorted(sum(sizes[name] for name in block) for block in found)[-self.active :]
            held = sum(largest) / sum(sizes.values())
        paused = to.pause(sizes, held)
        to.action(DrawBlocks(to.label, found, sizes, self, paused, window, to.seed))

    @staticmethod
    def reference(
        weights: Mapping[str, Tensor],
        gradients: Sequence[Mapping[str, Tensor]],
        trained: Sequence[Iterable[str]],
        lr: float,
    ) -> dict[str, Tensor]:
        """Return the weights after steps of gradient descent, each of which moves the parameters in `trained` alone."""
        found = dict(weights)
        for names, gradient in zip(trained, gradients, strict=True):
            found |= {name: found[name] - lr * gradient[name] for name in names}
        return found


def blocks(parameters: Iterable[ParameterEntry]) -> list[tuple[str, ...]]:
    """Return the parameters of each block, from the input on; those of no block are left out."""
    found: dict[int, list[str]] = {}
    for entry in parameters:
        if entry.place.inner_level is not None:
            found.setdefault(entry.place.inner_level, []).append(entry.name)
    return [tuple(found[level]) for level in sorted(found)]


class DrawBlocks(Action):
    """Phase 3: draw the blocks that train when the clause's time has come, and free what optimizers keep of others."""

    phase = Phase.PERTURB
    figures = ("drawn",)

    def __init__(
        self,
        label: str,
        found: Sequence[Sequence[str]],
        sizes: Mapping[str, int],
        rule: Lisa,
        paused: Paused,
        window: Gate,
        seed: Callable[..., int],
    ) -> None:
        from trainc.runtime.schedule.gate import Gate

        self.label, self.name, self.metric = label, f"{label} draw", f"{label}.trained"
        self.blocks, self.sizes, self.rule = found, sizes, rule
        self.paused, self.seed = paused, seed
        self.window, self.span = window, window.span()
        self.gate = Gate()  # all blocks train again when the time is over
        self.active: frozenset[int] | None = None
        self.drawn = [0] * len(found)

    def run(self, step: Step) -> None:
        import random

        if not self.span.fires(step.clock):
            self.active = None
        elif self.active is None or (self.window.every and self.window.fires(step.clock)):
            draw = random.Random(self.seed(step.clock.steps))
            self.active = frozenset(draw.sample(range(len(self.blocks)), self.rule.active))
            self.drawn = [count + (i in self.active) for i, count in enumerate(self.drawn)]
        self._pause()
        if self.rule.state == "drop":
            for name in self.paused.now:
                step.forget_optimizer_state(name)
        every = sum(self.sizes.values())
        rests = sum(self.sizes[name] for name in self.paused.now)
        step.metrics[self.metric] = step.signals[self.metric] = 1 - rests / every

    def _pause(self) -> None:
        """Pause the blocks that are not drawn."""
        active = range(len(self.blocks)) if self.active is None else self.active
        rest = [block for i, block in enumerate(self.blocks) if i not in active]
        self.paused.now = frozenset(name for block in rest for name in block)

    def state_dict(self) -> ActionState:
        if self.active is None:
            return {}
        return {self.blocks[i][0]: i in self.active for i in range(len(self.blocks))}

    def state_form(self) -> Form:
        return Record(dict.fromkeys((block[0] for block in self.blocks), Flag()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = [i for i, block in enumerate(self.blocks) if state.get(block[0])]
        self.active = frozenset(found) if state else None
        self._pause()

    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        names = {block[0] for block in self.blocks}
        if not state or (
            state.keys() == names and sum(map(bool, state.values())) == self.rule.active
        ):
            self.load_state_dict(state)
            return None
        self.load_state_dict({})
        return f"{self.label}: draws blocks again in the next step, because its fields or its selection changed"

    def summary(self) -> str | None:
        if not sum(self.drawn):
            return f"{self.label}: no blocks were drawn, so all of them trained"
        counts = ", ".join(map(str, self.drawn))
        return (
            f"{self.label}: {self.rule.active} of {len(self.blocks)} blocks trained at a time, each drawn so often:"
            f" {counts}"
        )
