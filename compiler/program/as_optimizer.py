"""A program as a torch optimizer: what a framework gets that calls the model, `backward()` and `step()` itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.compiler.program.optimizer_groups import live_groups, optimized, optimizer_slots
from trainc.compiler.program.own_loss import OwnMicroBatch, Read, asked_in_call, example_weights
from trainc.compiler.program.step_runner import StepRunner
from trainc.runtime.step.gradients import CalledClip, Clip, ShortSteps

if TYPE_CHECKING:
    from trainc.compiler.program.program import Program

Examples = Callable[[tuple[Any, ...], dict[str, Any]], int]


class ProgramOptimizer(torch.optim.Optimizer):
    """What `Program.as_optimizer` returns: `step` is the program's `update`, `param_groups` are views of its groups.

    `metrics` are those of the last step. `zero_grad` does nothing, since `step` frees the gradients. The state has all
    of the program's but the weights, which the framework saves. A GradScaler may step it.
    """

    _step_supports_amp_scaling = True  # torch then leaves the scale, and overflows, to `step`

    def __init__(self, program: Program, runner: StepRunner, accumulation: int = 1) -> None:
        self.program, self._runner = program, runner
        if not runner.method.optimizers:
            raise ValueError(
                "the spec has no optimizer, so the program cannot be one: write an `optimizer` clause, or step your own"
                " optimizer after `program.update()`"
            )
        self.accumulation = accumulation
        self.metrics: dict[str, float] = {}
        self.asked = asked_in_call("loss = optimizer.loss")
        """How the logits of a pass are given, where a framework has another way than `loss`."""
        self.takes_loss = (
            "Write `loss = optimizer.loss(loss)` where your code computes it, before `backward()`"
        )
        """How the loss of a pass is given, likewise."""
        self._clip: CalledClip | None = None
        self._pass: ExitStack | None = None
        self._outside: object = None
        self._examples: Examples | None = None
        runner.check_framework()
        self._built = False
        groups = live_groups(runner.machine)
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups = cast("list[dict[str, Any]]", groups)
        self._built = True

    # what frameworks call

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the model with the micro-batches since the last step; return what the closure returned.

        The closure runs the step's passes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._runner.machine.current is None:
            raise RuntimeError(
                "`step` was called, but the model ran no forward pass in train mode, with gradients, since the last"
                " step: call `model.train()`, and the model itself rather than its parts or a copy"
            )
        if self.waits_for_loss:
            raise self._no_loss("`step` was called")
        scaler = None
        if hasattr(self, "found_inf"):  # a GradScaler is calling
            scaler = GivenScale(getattr(self, "grad_scale", None))
        try:
            self.metrics = self.program.update(cast("torch.amp.GradScaler | None", scaler))
        finally:
            if self._clip is not None:
                self._clip.called = False
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` frees the gradients, and those of micro-batches before it count."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError: the spec says what is trained."""
        if self._built:
            raise ValueError(
                "the spec's `optimizer` clauses say which parameters are trained: write them in its `on`"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the program without the weights of its model."""
        state = self.program.state_dict()
        state.pop("model")
        return {"state": state, "param_groups": []}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; load the weights into the model first. Raises as the program's does."""
        state = state_dict["state"]
        if "made_by" not in state:
            raise ValueError(
                "this is the state of another optimizer, not of a program: it can continue only what"
                " `program.as_optimizer()` saved"
            )
        self.program.load_state_dict({**state, "model": self.program.module.state_dict()})

    # micro-batches

    @contextmanager
    def micro_batch(
        self,
        examples: int,
        weights: Sequence[float] | Tensor | None = None,
        part: float = 1.0,
        tokens: int | None = None,
    ) -> Iterator[None]:
        """Inside this block run the model and compute its loss, then call `loss`: for adapters of frameworks.

        `examples` and `weights` are as in `Program.micro_batch`. `part` is what the loss in it is multiplied by: 1 for
        a mean, or its fraction of the step's targets for a sum divided by their number.
        """
        fraction = 1 / self.accumulation
        where = MicroBatchSlice(part, 1.0 if part == 1.0 else fraction)
        own = OwnMicroBatch(
            examples,
            example_weights(weights, examples, self._runner.execution.device),
            examples if tokens is None else tokens,
            where,
            framework=True,
            share=fraction,
            asked=self.asked,
        )
        with self._runner.micro_batch(own):
            yield

    def loss(
        self,
        loss: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        inputs: Any = None,
    ) -> Tensor:
        """Return the loss of the last forward pass with the terms that the spec adds: differentiate this one.

        Arguments are as in `Program.backward`. Where the model returns its loss, and no clause reads logits, this was
        done.
        """
        return self._runner.to_differentiate(loss, Read(logits, targets, inputs))

    @property
    def reads_logits(self) -> bool:
        """Whether a clause of this step reads the logits and targets of the passes: `loss` must be given them."""
        return bool(self._runner.own_loss.readers())

    def allow_short_steps(self) -> None:
        """Let a step have fewer micro-batches than `accumulation`, by which the framework divides losses all the same.

        Its update is by the smaller gradient; what is measured is of the mean over its micro-batches.
        """
        if self._runner.short_steps is None:
            machine = self._runner.machine
            short = ShortSteps(partial(optimized, machine), self._accumulation)
            self._runner.short_steps = short
            machine.add(short, first=True)

    @property
    def accumulation(self) -> int:
        """The number of micro-batches in a step."""
        return self._accumulation

    @accumulation.setter
    def accumulation(self, number: int) -> None:
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"`accumulation` is {number!r}: expected a number from 1")
        self._accumulation = number
        if self._runner.short_steps is not None:
            self._runner.short_steps.accumulation = number

    @property
    def waits_for_loss(self) -> bool:
        """Whether the last forward pass was a micro-batch whose loss is not known yet: give it to `loss`."""
        own = self._runner.own
        return own is not None and own.framework and own.complete

    def clip(self, limit: float, who: str) -> None:
        """Clip the gradients of the open step to this L2 norm at its update, as a framework's function `who` asks.

        Raises ValueError where the spec clips, too, to another norm.
        """
        own = [action for action in self._runner.machine.actions if isinstance(action, Clip)]
        for action in own:
            if action is not self._clip and action.limit == limit:
                return
            if action is not self._clip:
                raise ValueError(
                    f"`{who}` clips to {limit:g}, and the spec's `{action.name}` to {action.limit:g}: leave the call"
                    " out, or remove `clip` from the spec"
                )
        if self._clip is None:
            self._clip = CalledClip(who, limit, optimizer_slots(self._runner.machine))
            self._runner.machine.add(self._clip)
        self._clip.limit, self._clip.called = limit, True

    def watch_model(self, examples: Examples | None) -> None:
        """From now on let each call of the model in train mode be a micro-batch."""
        self._examples, self._runner.watched = examples, True
        module = self.program.module
        # `torch.compile` of the model would trace what stands around its pass.
        before, after = map(torch.compiler.disable, (self._before, self._after))
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        module.register_forward_hook(after, always_call=True)

    def _no_loss(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{what}, but the program does not know the loss of the model's last forward pass: the model returned none,"
            f" or a clause reads logits. {self.takes_loss}; for a pass that trains nothing use `torch.no_grad()` or"
            " `model.eval()`, and `program.discard_step()` to go on"
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        own = self._runner.own
        if own is not None and not own.complete:  # inside `micro_batch` of somebody else
            return
        if self.waits_for_loss:
            raise self._no_loss("the model was called again")
        if module._compiled_call_impl is not None and self._runner.execution.rewrite:
            raise ValueError(
                "`model.compile()` compiles what stands around a pass with it, so the layers that the spec measures or"
                " changes would not be seen: call what `torch.compile(model)` returns in place of the model"
            )
        if self._pass is not None:  # an interrupt ended the pass before
            stale, self._pass = self._pass, None
            with suppress(Exception):
                stale.__exit__(RuntimeError, RuntimeError(), None)
        read = self._examples or count_examples
        self._outside = sys.exc_info()[1]
        opened = ExitStack()
        opened.enter_context(self.micro_batch(read(args, kwargs)))
        self._pass = opened

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        opened, self._pass = self._pass, None
        if opened is None:
            return None
        failed = sys.exc_info()
        if failed[1] is not None and failed[1] is not self._outside:
            opened.__exit__(*failed)
            return None
        opened.close()
        if self.reads_logits:
            return None
        return with_loss(output, self.loss)


class GivenScale:
    """What an update needs of a GradScaler: the scale that it gave to the optimizer, None where it has unscaled."""

    def __init__(self, scale: Tensor | None) -> None:
        self.scale = None if scale is None else float(scale)

    def get_scale(self) -> float:
        """Return the scale; where it is not known, one at which an overflow is the scale's."""
        return self.scale or 2.0

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, where that was not done."""
        if self.scale is not None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(1 / self.scale)


def count_examples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the size of the first axis of a call's tensors; raises ValueError where they do not agree."""
    leaves = pytree.tree_leaves((args, kwargs))
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        found = ", ".join(map(str, sorted(sizes))) or "no tensors with axes"
        raise ValueError(
            f"the first axes of the tensors that the model was called with do not say how many examples there are:"
            f" {found}. Say it: `program.as_optimizer(examples=lambda args, kwargs: len(kwargs['input_ids']))`"
        )
    return int(sizes.pop())


def with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output with its loss changed; None where it has none, or stays the object that it is."""
    if isinstance(output, dict):
        if _is_loss(found := output.get("loss")):
            output["loss"] = change(found)
        return None
    if _is_loss(output):
        return change(output)
    if isinstance(output, tuple | list):
        places = [i for i, one in enumerate(output) if _is_loss(one)]
        if len(places) != 1:
            return None
        items = list(output)
        items[places[0]] = change(items[places[0]])
        if hasattr(output, "_fields"):
            return type(output)(*items)
        return type(output)(items)
    if _is_loss(found := getattr(output, "loss", None)):
        output.loss = change(found)
    return None


def _is_loss(value: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and not value.dim()
        and value.requires_grad
        and value.is_floating_point()
    )
