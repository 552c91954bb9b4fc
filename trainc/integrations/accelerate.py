"""A spec in a loop of Accelerate: `accelerator.prepare` takes `spec_optimizer(accelerator, model, "spec.train")`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.program.as_optimizer import Examples, ProgramOptimizer
from trainc.compiler.program.own_loss import asked_in_call
from trainc.dsl.resolve.spec import Spec
from trainc.integrations.shared import READ, compile_for

_logger = logging.getLogger(__name__)
_TYPES = {"NO", "MULTI_CPU", "MULTI_GPU", "MPS"}
"""The distributed types of Accelerate in which each process has a whole model."""


def spec_optimizer(
    accelerator: Any,
    model: nn.Module,
    spec: str | Path | Spec,
    *,
    overrides: Mapping[str, str] | None = None,
    examples: Examples | None = None,
) -> ProgramOptimizer:
    """Return the optimizer that trains a model by a spec; `.program` is the program. Give both to `prepare`.

    `model` is as it is before `prepare`. Each of its calls in train mode is a micro-batch, whose loss is the one that
    `accelerator.backward` gets, with `logits=`, `targets=` and `inputs=` for clauses that read them; `examples(args,
    kwargs)` is the number of examples of a call where its tensors have different first axes.
    `accelerator.clip_grad_norm_` clips at the update. Raises ValueError for processes that do not have the whole model
    each, and SpecError as `trainc.compile` does.
    """
    kind = accelerator.distributed_type
    if getattr(kind, "name", str(kind)) not in _TYPES:
        raise ValueError(
            f"an Accelerator with {kind} cannot train by a spec: use one process, or several with"
            " DistributedDataParallel (`accelerate launch --multi_gpu`, or `--cpu`)"
        )
    if any(model is one for one in accelerator._models):
        raise ValueError(
            "the model is prepared already: call `spec_optimizer` before, and give both to `accelerator.prepare`"
        )
    say = _logger.warning if accelerator.is_main_process else _silent
    program = compile_for(model, spec, overrides, None, say)
    optimizer = program.as_optimizer(accelerator.gradient_accumulation_steps, examples)
    optimizer.allow_short_steps()
    optimizer.asked = asked_in_call("accelerator.backward")
    optimizer.takes_loss = "Call `accelerator.backward(loss)`, not `loss.backward()`"
    own = type(accelerator)
    if not issubclass(own, _BySpec):
        names = {"__module__": own.__module__, "trainc_optimizers": []}
        accelerator.__class__ = type(own.__name__, (_BySpec, own), names)
    accelerator.trainc_optimizers.append(optimizer)
    return optimizer


class _BySpec:
    """What an Accelerator does otherwise where models train by specs."""

    trainc_optimizers: list[ProgramOptimizer]

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        read = {name: kwargs.pop(name) for name in READ if name in kwargs}
        for optimizer in self.trainc_optimizers:
            optimizer.accumulation = self.gradient_accumulation_steps  # type: ignore[attr-defined]
            if optimizer.waits_for_loss:
                loss = optimizer.loss(loss, **read)
        super().backward(loss, **kwargs)  # type: ignore[misc]

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Clip at the update, after what the spec measures of the gradients; return their norm now."""
        own, given = self._by_spec(parameters)
        if own is None:
            return super().clip_grad_norm_(given, max_norm, norm_type)  # type: ignore[misc]
        if norm_type != 2:
            raise ValueError(
                f"a spec clips the L2 norm of gradients: leave out `norm_type={norm_type}`"
            )
        if not self.sync_gradients:  # type: ignore[attr-defined]
            raise ValueError(
                "`clip_grad_norm_` was called before the last micro-batch of a step, where the gradient is not yet that"
                " of the step: write `if accelerator.sync_gradients:` before it"
            )
        own.clip(float(max_norm), "clip_grad_norm_")
        self.unscale_gradients()  # type: ignore[attr-defined]
        grads = [p.grad for p in given if p.grad is not None]
        # Entries that a mask trains are averaged over processes at the update.
        return torch.nn.utils.get_total_norm(
            [g for g in grads if not getattr(g, "is_local", False)]
        )

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        own, given = self._by_spec(parameters)
        if own is not None:
            raise ValueError(
                "`clip_grad_value_` clips each entry of the gradients, and a spec clips their norm: write"
                " `accelerator.clip_grad_norm_`, or `clip` in the spec"
            )
        super().clip_grad_value_(given, clip_value)  # type: ignore[misc]

    def _by_spec(self, parameters: Any) -> tuple[ProgramOptimizer | None, list[Tensor]]:
        """Return the optimizer of a spec that trains one of these parameters, and the parameters."""
        given: list[Tensor] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        ids = {id(one) for one in given}
        for optimizer in self.trainc_optimizers:
            if any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
                return optimizer, given
        return None, given


def _silent(text: str) -> None:
    """Say nothing: the main process does."""
