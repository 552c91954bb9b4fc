"""How examples are mixed: with whom, in what part, and their targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trainc.compiler.errors import SiteError
from trainc.runtime.step.batches import BatchTransform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.compiler.constructs.regularize.activations._mixtures import Share
    from trainc.compiler.method.lowered_method import Scheduled
    from trainc.runtime.data.batch import Batch
    from trainc.runtime.step.record import Step

Mix = Callable[[str, "list[Tensor]", "Tensor", "Tensor"], "list[Tensor]"]
"""Returns which part of each example stays, (1,) or (B,), and the mixed inputs, for the clause of a name.

It is given the inputs, the partners (B,), and numbers (1 or B, 3): a draw of Beta(alpha, alpha) and two in [0, 1).
"""


class MixPairs(BatchTransform):
    """Mixes every example with the one that a permutation of the micro-batch puts in its place."""

    mixes_classes: ClassVar = True

    def __init__(
        self, name: str, alpha: Scheduled, probability: float, share: Share, mix: Mix
    ) -> None:
        self.name, self.alpha, self.probability = name, alpha, probability
        self.share, self.mix = share, mix

    def change(
        self, batch: Batch, step: Step, draw: torch.Generator, sample_ids: Tensor | None
    ) -> Batch:
        """Return the mixed micro-batch; raises SiteError for inputs and targets that cannot be mixed."""
        import torch

        inputs, targets = batch
        alpha, of_step = self.alpha(step.clock), self.draws.of_step()
        if alpha == 0 or of_step.random() >= self.probability:
            return batch
        given = self._tensors(inputs)
        rows, first = len(targets), self.draws.first_example
        drawn, size = of_step, 1
        if self.share == "example":
            drawn, size = self.draws.of_examples(), first + rows
        # A beta and two places an example, in one stream: what an example gets does not depend on the division.
        numbers = torch.tensor(
            [(drawn.beta(alpha, alpha), drawn.random(), drawn.random()) for _ in range(size)],
            dtype=torch.float64,
        )[-rows:].to(targets.device)
        order = torch.randperm(rows, generator=draw, device=targets.device)
        kept, *mixed = self.mix(self.name, given, order, numbers)
        made: Any = mixed[0] if isinstance(inputs, torch.Tensor) else tuple(mixed)
        if isinstance(inputs, Mapping):
            made = dict(zip(inputs, mixed, strict=True))
        return made, self._targets(targets, order, kept, given[0].dtype)

    def _tensors(self, inputs: Any) -> list[Tensor]:
        """Return the inputs as a list; raises SiteError for one that is no floating-point tensor."""
        from torch import Tensor

        if isinstance(inputs, Tensor):
            parts: dict[Any, Any] = {"": inputs}
        else:
            parts = dict(inputs if isinstance(inputs, Mapping) else enumerate(inputs))
        for name, tensor in parts.items():
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                found = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
                which = "the inputs are" if name == "" else f"the input `{name}` is"
                raise SiteError(
                    f"`{self.name}` mixes examples, and {which} {found}: ids of tokens, masks and images of whole"
                    " numbers cannot be averaged. Remove the clause, or let the data give floating-point numbers",
                    self.name,
                )
        return [*parts.values()]

    def _targets(self, targets: Tensor, order: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mixed targets: numbers in their own dtype, class indices as probabilities."""
        import torch
        from torch.nn.functional import one_hot

        if not targets.is_floating_point():
            self._check_indices(targets)
            targets = one_hot(targets.long(), self.classes or 0)
            targets = targets.to(torch.promote_types(dtype, torch.float32))
        part = kept.view(-1, *[1] * (targets.dim() - 1)).to(targets.dtype)
        return part * targets + (1 - part) * targets[order]

    def _check_indices(self, targets: Tensor) -> None:
        """Raise SiteError for integers that are not one class an example, each of them a class."""
        if self.classes is None:
            raise SiteError(
                f"`{self.name}` mixes targets, and these are integers, which the spec's loss does not"
                " read as classes: let the data give floating-point targets, or remove the clause",
                self.name,
            )
        if targets.dim() != 1:
            raise SiteError(
                f"`{self.name}` needs one class an example, and the targets are {list(targets.shape)}: a mixture of"
                " examples has no class at each token or pixel. Remove the clause",
                self.name,
            )
        wrong = targets[(targets < 0) | (targets >= self.classes)]
        if len(wrong):
            raise SiteError(
                f"`{self.name}` needs a class for every example, from 0 to {self.classes - 1}, and a target is"
                f" {int(wrong[0])}: a mixture with a target that does not count is not defined. Leave such examples out"
                " of the data",
                self.name,
            )
