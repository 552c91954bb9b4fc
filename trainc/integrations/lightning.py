"""A spec in the Trainer of Lightning: `configure_optimizers` returns `spec_optimizer(self, "spec.train")`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainc.compiler.program.as_optimizer import ProgramOptimizer, count_examples
from trainc.compiler.program.own_loss import asked_in_call
from trainc.dsl.resolve.spec import Spec
from trainc.integrations.shared import (
    READ,
    FrameworkClip,
    compile_for,
    stop_before_next,
    tell_length,
)
from trainc.runtime.soundness.loss_graph import operations_of

_logger = logging.getLogger(__name__)
_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}


def spec_optimizer(
    module: Any,
    spec: str | Path | Spec,
    *,
    model: nn.Module | None = None,
    overrides: Mapping[str, str] | None = None,
    examples: Callable[[Any], int] | None = None,
    weights: Callable[[Any], Sequence[float] | Tensor] | None = None,
    tokens: Callable[[Any], int] | None = None,
    accumulation: int = 1,
) -> ProgramOptimizer:
    """Return what `configure_optimizers` of a LightningModule returns to train by a spec; `.program` is the program.

    The spec's names are those of `model`, the whole LightningModule unless given. Each `training_step` is a
    micro-batch: `examples(batch)` is the number of its examples where the tensors of the batch have different first
    axes, `weights(batch)` are their weights in the loss where these are not equal, `tokens(batch)` is what the clock
    counts. `gradient_clip_val` becomes the spec's clip, where that has none. `accumulation` is for manual
    optimization: the number of `manual_backward` in a step, by which the module divides their losses. Raises
    ValueError where both say how to train or the strategy is neither of one device nor DDP, and SpecError as
    `trainc.compile` does.
    """
    if (before := _bound(module)) is not None:
        before.optimizer.program.unbind()
    trainer = module.trainer
    _refuse_strategy(trainer.strategy)
    own = _own_class(type(module))
    say = _logger.warning if trainer.is_global_zero else _silent
    program = compile_for(
        module if model is None else model, spec, overrides, _clip_of(trainer, own), say
    )
    if (wrapper := trainer.strategy.model) is not module:
        program.forward = wrapper
    automatic = module.automatic_optimization
    optimizer = program.as_optimizer(
        trainer.accumulate_grad_batches if automatic else accumulation, watch=False
    )
    optimizer.allow_short_steps()
    optimizer.asked = _asked_in_output if automatic else asked_in_call("self.manual_backward")
    optimizer.takes_loss = "Call `self.manual_backward(loss)`, not `loss.backward()`"
    module.__class__ = _by_spec(own)
    module.__dict__["trainc_spec"] = _Bound(
        optimizer,
        say,
        examples or _examples,
        weights,
        tokens,
        program.module is not module,
        _compiled_step(module),
    )
    return optimizer


@dataclass(eq=False)
class _Bound:
    """A program in one LightningModule, and the micro-batch that its `training_step` is in."""

    optimizer: ProgramOptimizer
    say: Callable[[str], object]
    examples: Callable[[Any], int]
    weights: Callable[[Any], Sequence[float] | Tensor] | None
    tokens: Callable[[Any], int] | None
    part: bool
    """Whether the model is a part of the module only: other losses may train other parts."""
    compiled_step: Callable[..., Any] | None = None
    """What `torch.compile` made of `training_step`."""
    open: AbstractContextManager[None] | None = None
    steps: int = field(default=-1)
    """The steps at the end of the last batch."""

    def micro_batch(self, batch: Any, part: float = 1.0) -> AbstractContextManager[None]:
        weights = None if self.weights is None else self.weights(batch)
        tokens = None if self.tokens is None else self.tokens(batch)
        return self.optimizer.micro_batch(self.examples(batch), weights, part, tokens)

    def automatic(self, step: Callable[[], Any], batch: Any) -> Any:
        """Run a `training_step` whose loss Lightning differentiates; return its output with the terms added."""
        with self.micro_batch(batch):
            output = step()
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is None:
                raise ValueError(
                    "`training_step` returned no loss, and the spec needs one for each micro-batch: leave batches out"
                    " in the data loader, or return `loss * 0`"
                )
        if not isinstance(output, Mapping):
            return self.optimizer.loss(loss)
        read = {name: output[name] for name in READ if name in output}
        return {**output, "loss": self.optimizer.loss(loss, **read)}

    def manual(self, step: Callable[[], Any], batch: Any) -> Any:
        """Run a `training_step` that calls `manual_backward`; without a call it trained nothing."""
        # The module divides the loss before `manual_backward` has it.
        self.open = self.micro_batch(batch, 1 / self.optimizer.accumulation)
        self.open.__enter__()
        try:
            output = step()
        except BaseException:
            if (opened := self._closing()) is not None:
                opened.__exit__(*sys.exc_info())
            raise
        self.leave_out()
        return output

    def leave_out(self) -> None:
        """Forget the micro-batch that is open: no loss of it was differentiated."""
        if (opened := self._closing()) is not None:
            with suppress(_LeftOut):
                opened.__exit__(_LeftOut, _LeftOut(), None)

    def loss(self, loss: Tensor, read: Mapping[str, Any]) -> Tensor:
        """Return what `manual_backward` differentiates."""
        if (opened := self._closing()) is not None:
            opened.__exit__(None, None, None)
        elif not self.optimizer.waits_for_loss:
            raise RuntimeError(
                "`manual_backward` was called again in one `training_step`, and the program does not know which"
                " forward pass it is of: write `with self.optimizers().micro_batch(examples=len(x)):` around each"
                " forward pass after the first"
            )
        return self.optimizer.loss(loss, **read)

    def trains(self, loss: Tensor) -> bool:
        """Say whether a loss trains the program's model, or another part of the module alone."""
        if not self.part:
            return True
        own = {id(one) for one in self.optimizer.program.module.parameters()}
        return any(id(getattr(node, "variable", None)) in own for node in operations_of(loss))

    def _closing(self) -> AbstractContextManager[None] | None:
        opened, self.open = self.open, None
        return opened


class _LeftOut(Exception):
    """Ends the block of a micro-batch that has no loss."""


class _BySpec:
    """What a LightningModule does otherwise under a spec, whatever its class does."""

    trainc_own: type
    trainc_spec: _Bound

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        read = {name: kwargs.pop(name) for name in READ if name in kwargs}
        if (bound := _bound(self)) is not None and bound.trains(loss):
            loss = bound.loss(loss, read)
        super().manual_backward(loss, *args, **kwargs)  # type: ignore[misc]

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the spec clips."""

    def clip_gradients(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip at the update, after what the spec measures of the gradients."""
        if (bound := _bound(self)) is None or not gradient_clip_val:
            return
        _require_norm(gradient_clip_algorithm)
        bound.optimizer.clip(float(gradient_clip_val), "clip_gradients")

    def on_train_start(self) -> None:
        super().on_train_start()  # type: ignore[misc]
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        if (bound := _bound(self)) is not None:
            bound.steps = bound.optimizer.program.clock.steps
            if trainer.max_steps > 0:
                tell_length(bound.optimizer.program, "the Trainer", trainer.max_steps, bound.say)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)  # type: ignore[misc]
        if (bound := _bound(self)) is None:
            return
        program = bound.optimizer.program
        if program.clock.steps == bound.steps:
            return
        bound.steps = program.clock.steps
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        for note in program.report().notes:
            bound.say(note)
        if not trainer.barebones:
            shown = {name: v for name, v in bound.optimizer.metrics.items() if name != "loss"}
            self.log_dict(shown)  # type: ignore[attr-defined]
        if (stop := stop_before_next(program)) is not None:
            bound.say(f"{stop}, after {bound.steps} steps")
            trainer.should_stop = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the user's own class, without the program."""
        state: Any = super().__reduce_ex__(protocol)
        kept = {name: value for name, value in state[2].items() if name != "trainc_spec"}
        return _made_again, (self.trainc_own,), kept, *state[3:]


def _made_again(own: type) -> Any:
    make: Any = own.__new__
    return make(own)


def _by_spec(own: type) -> type:
    """Return a subclass of a LightningModule's class that trains by a spec."""
    steps = {
        "training_step": _training_step(own.training_step),  # type: ignore[attr-defined]
        **{
            name: _evaluating(getattr(own, name))
            for name in ("validation_step", "test_step", "predict_step")
        },
    }
    return type(
        own.__name__, (_BySpec, own), {"__module__": own.__module__, "trainc_own": own, **steps}
    )


def _own_class(found: type) -> type:
    """Return the user's class; raises ValueError where it clips gradients itself."""
    own: type = getattr(found, "trainc_own", found)
    base = next((c for c in own.__mro__ if c.__name__ == "LightningModule"), own)
    if getattr(own, "configure_gradient_clipping", None) is not getattr(
        base, "configure_gradient_clipping", None
    ):
        raise ValueError(
            f"`configure_gradient_clipping` of {own.__name__} clips gradients, and the spec says how to train: remove"
            " it, and write `clip` in the spec"
        )
    return own


def _training_step(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = _bound(self)
        if bound is None:
            return own(self, *args, **kwargs)

        def step() -> Any:
            inner = bound.compiled_step
            return own(self, *args, **kwargs) if inner is None else inner(*args, **kwargs)

        batch = args[0] if args else next(iter(kwargs.values()))
        if not self.automatic_optimization:
            return bound.manual(step, batch)
        bound.optimizer.accumulation = self.trainer.accumulate_grad_batches
        return bound.automatic(step, batch)

    return training_step


def _evaluating(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (bound := _bound(self)) is None:
            return own(self, *args, **kwargs)
        with bound.optimizer.program.evaluation_weights():
            return own(self, *args, **kwargs)

    return step


def _bound(module: Any) -> _Bound | None:
    found: _Bound | None = module.__dict__.get("trainc_spec")
    return found


def _compiled_step(module: Any) -> Callable[..., Any] | None:
    """Return what `torch.compile` of the module put in the place of `training_step`, and take it out."""
    found: Callable[..., Any] | None = module.__dict__.pop("training_step", None)
    return found


def _examples(batch: Any) -> int:
    """Return the number of examples of a batch; raises ValueError where its tensors do not agree."""
    try:
        return count_examples((dict(batch) if isinstance(batch, Mapping) else batch,), {})
    except ValueError as error:
        what = str(error).partition(". ")[0].replace("the model was called with", "a batch holds")
        raise ValueError(
            f'{what}. Say it: `spec_optimizer(self, "spec.train", examples=lambda batch: len(batch["x"]))`'
        ) from error


# who says what


def _clip_of(trainer: Any, own: type) -> FrameworkClip | None:
    if not trainer.gradient_clip_val:
        return None
    _require_norm(trainer.gradient_clip_algorithm)
    return FrameworkClip(
        float(trainer.gradient_clip_val),
        "gradient_clip_val",
        "the Trainer",
        "set `gradient_clip_val=None`",
    )


def _require_norm(algorithm: Any) -> None:
    if algorithm is not None and str(getattr(algorithm, "value", algorithm)) != "norm":
        raise ValueError(
            "`gradient_clip_algorithm = value` clips each entry of the gradients, and a spec clips their norm: leave it"
            " out, and write `clip` in the spec"
        )


def _refuse_strategy(strategy: Any) -> None:
    names = [one.__name__ for one in type(strategy).__mro__]
    if not _STRATEGIES & {*names}:
        raise ValueError(
            f'a Trainer with {names[0]} cannot train by a spec: use one device, or `strategy="ddp"`'
        )


def _asked_in_output(names: Sequence[str]) -> str:
    entries = ", ".join(f'"{name}": {name}' for name in names)
    return f'return `{{"loss": loss, {entries}}}` from `training_step`'


def _silent(text: str) -> None:
    """Say nothing: process 0 does."""
