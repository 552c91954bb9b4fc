"""The module that capture front ends trace: the user's model on every view, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from trainc.compiler.method.layer_hook import KeepOutput
from trainc.compiler.method.loss import loss_of_views
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.total_loss import losses_of_views
from trainc.runtime.data.batch import call_model, extract_logits, repeat_views

LossFunction = Losses | Callable[[Tensor, Tensor], Tensor]
"""The losses of a program, or a function of logits and targets."""
CaptureFrontEnd = Callable[["WrappedModel", tuple[Any, ...]], fx.GraphModule]
"""Returns the flat forward graph of a wrapped model and its arguments, with the user's tensors as attributes."""

PREFIX = "user"
"""The name under which a captured graph holds the user's model."""


@dataclass(frozen=True, slots=True)
class HooksInPlace:
    """The hooks that stand in the model while it is captured.

    `open` lets them run with these scalars and inputs; `scalars` are the names of those that they use, `modules` the
    layers whose behaviour they change. `captures` keep the results of layers; `calls` is then how often each ran in the
    last pass.
    """

    open: Callable[[Mapping[str, Tensor], Any], None]
    scalars: tuple[str, ...]
    modules: tuple[str, ...]
    captures: Mapping[str, KeepOutput] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Keep results from now on."""
        for keep in self.captures.values():
            keep.begin()

    def take(self) -> list[Tensor]:
        """Return what the captured layers gave, layer by layer."""
        found = {module: keep.take() for module, keep in self.captures.items()}
        self.calls.update({module: len(tensors) for module, tensors in found.items()})
        return [tensor for tensors in found.values() for tensor in tensors]


class WrappedModel(nn.Module):
    """The model on every view of the inputs, and the loss of the first view or, with `mean_loss`, of all."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        views: int,
        mean_loss: bool = False,
        hooks: HooksInPlace | None = None,
        numbers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.user = model
        self.loss = loss
        self.views = views
        self.mean_loss = mean_loss
        self.hooks = hooks
        self.numbers = tuple(numbers)
        self.training = model.training

    def forward(self, inputs: Any, targets: Any, *scalars: Tensor) -> tuple[Tensor, ...]:
        """Return the first loss, its logits of every view, the other losses, and what is captured.

        `scalars` are the `numbers` of the hooks and the losses.
        """
        given = dict(zip(self.numbers, scalars, strict=True))
        if self.hooks is not None:
            self.hooks.open({name: given[name] for name in self.hooks.scalars}, inputs)
            self.hooks.begin()
        if not isinstance(self.loss, Losses):
            output = call_model(self.user, repeat_views(inputs, self.views))
            captured = [] if self.hooks is None else self.hooks.take()
            logits = extract_logits(output)
            loss = loss_of_views(self.loss, logits, targets, self.views, self.mean_loss)
            return loss, logits, *captured
        read = self.loss.run(self.user, (inputs, targets), self.views, self.mean_loss)
        captured = [] if self.hooks is None else self.hooks.take()
        self.loss.use(given)
        found = losses_of_views(self.loss, read.of, targets, self.views, self.mean_loss)
        first, *others = found.values()
        return first, read.logits, *others, *captured
