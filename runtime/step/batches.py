"""Changes of inputs and targets, made before the passes of each micro-batch, with random numbers of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch, check_batch, copy_inputs, describe_parts
from trainc.runtime.step.action import Action, Phase, failures_of
from trainc.runtime.storage.random_streams import derive_seed

if TYPE_CHECKING:
    from trainc.runtime.step.record import Step


@dataclass(frozen=True, slots=True)
class StepDraws:
    """Streams of random numbers of one clause and step, the same for all of its micro-batches.

    `seed` is the program's, `first_example` the number of the micro-batch's first example in the step of its replica.
    """

    seed: int
    clause: str
    replica: int
    step: int
    first_example: int

    def of_step(self) -> np.random.Generator:
        """Return a stream that all micro-batches and replicas of the step begin anew."""
        return self._stream("step")

    def of_examples(self) -> np.random.Generator:
        """Return the same of this replica: draw for all examples up to the micro-batch's last, in order."""
        return self._stream("examples", self.replica)

    def _stream(self, *purpose: str | int) -> np.random.Generator:
        seed = derive_seed(self.seed, "batch", self.clause, *purpose, self.step)
        return np.random.Generator(np.random.Philox(seed))


class BatchTransform(Action):
    """Changes the inputs and targets of every micro-batch of a step, before its first pass, in train mode.

    All passes of the step see the same changed batch. Its loss weight in the step is computed from the changed targets.
    """

    phase = Phase.PERTURB
    sample_ids: ClassVar[bool] = False
    """Whether it reads which samples the examples are: a step without sample ids is then an error."""
    mixes_classes: ClassVar[bool] = False
    """Whether its targets are probabilities of classes (B, classes) where it was given indices (B,)."""
    classes: int | None = None
    """How many classes the model has logits of, where it mixes them and the loss is of classes."""
    draws: StepDraws
    """Streams that do not depend on how the step is divided, set for each micro-batch."""

    @abstractmethod
    def change(
        self, batch: Batch, step: Step, draw: torch.Generator, sample_ids: Tensor | None
    ) -> Batch:
        """Return the changed micro-batch; `batch` holds copies, which may be changed in place.

        `draw` is a stream of random numbers for this clause, step and micro-batch, on the device of the targets.
        `sample_ids` say which sample each example is, where the class asks for them. The inputs may get other shapes
        and dtypes. The targets keep the examples along the first axis, in their order, their dtype and the number of
        their axes, unless the class `mixes_classes`.
        """

    def run(self, step: Step) -> None:
        """Raise TypeError: it changes one micro-batch at a time."""
        raise TypeError(f"`{self.name}` changes micro-batches: it is given each of them, not run")


def change_batch(
    transforms: Sequence[BatchTransform],
    batch: Batch,
    step: Step,
    seed: int,
    first_example: int,
    sample_ids: Tensor | None,
) -> Batch:
    """Return a micro-batch as the transforms that are due make it, one after the other.

    The random numbers follow from the seed, the clause, the replica, the step and the number of the micro-batch's first
    example in it, so that a resumed run draws those of the uninterrupted one. Raises ClauseFailed where a transform
    gives the targets another form.
    """
    due = [transform for transform in transforms if transform.is_due(step)]
    if not due:
        return batch
    targets = batch[1]
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"{due[0].name} changes the targets of a batch, and needs one tensor of them: the data gives"
            f" {describe_parts(targets)}. Remove the clause"
        )
    changed = copy_inputs(batch)[0], targets.clone()
    with torch.no_grad():
        for one in due:
            draw = torch.Generator(targets.device)
            place = step.clock.steps, first_example
            draw.manual_seed(derive_seed(seed, "batch", one.name, step.process, *place))
            one.draws = StepDraws(seed, one.name, step.process, *place)
            ids = sample_ids if one.sample_ids else None
            with failures_of(one.name):
                changed = _checked(one, one.change(changed, step, draw, ids), changed[1])
    return changed


def _checked(one: BatchTransform, found: Batch, before: Tensor) -> Batch:
    """Return a changed batch; raises ValueError where its targets have another form than those before."""
    name = one.name
    try:
        inputs, targets = check_batch(found)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    if len(targets) != len(before):
        raise ValueError(
            f"{name}: {len(before)} examples became {len(targets)}: a change of a batch must keep their number, which"
            " the clock counts"
        )
    mixed = one.mixes_classes and targets.is_floating_point() and targets.dim() == 2
    indices = before.dim() == 1 and not before.is_floating_point()
    if (targets.dtype, targets.dim()) != (before.dtype, before.dim()) and not (mixed and indices):
        raise ValueError(
            f"{name}: the targets became {_form(targets)}, and the loss takes {_form(before)}: return targets of the"
            " same dtype and number of axes. A class that turns class indices into probabilities of classes says"
            " `mixes_classes = True`"
        )
    return inputs, targets


def _form(targets: Tensor) -> str:
    return f"{str(targets.dtype).removeprefix('torch.')}{list(targets.shape)}"
