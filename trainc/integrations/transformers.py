"""A spec in the Trainer of transformers: `use_spec(trainer, "spec.train")`, then `trainer.train()` as ever."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from trainc.compiler.program.as_optimizer import ProgramOptimizer, count_examples
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.integrations.shared import (
    FrameworkClip,
    compile_for,
    stop_before_next,
    tell_length,
)
from trainc.runtime.data.batch import count_tokens

_logger = logging.get_logger(__name__)

_OF_THE_SPEC = {
    "learning_rate": "lr",
    "lr_scheduler_type": "lr",
    "lr_scheduler_kwargs": "lr",
    "warmup_steps": "lr",
    "warmup_ratio": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "optim": "optimizer",
    "optim_args": "optimizer",
}
"""The arguments of a Trainer that a spec has a word for."""


def use_spec(
    trainer: Trainer, spec: str | Path | Spec, *, overrides: Mapping[str, str] | None = None
) -> Program:
    """Let a Trainer train by a spec, and return the program: its optimizer, rates and clauses replace the Trainer's.

    Call it after `Trainer(...)` and before `train()`. Loss, batches, accumulation, precision, evaluation and
    checkpoints stay the Trainer's. `max_grad_norm` becomes the spec's clip, where that has none. Raises ValueError
    where both say how to train, or with DeepSpeed and the like, and SpecError as `trainc.compile` does. Processes of
    `torchrun` train together.
    """
    _refuse_processes(trainer)
    _refuse_two_methods(trainer)
    limit, clip = trainer.args.max_grad_norm, None
    if limit:
        instead = "set `max_grad_norm=0`"
        clip = FrameworkClip(limit, "max_grad_norm", "the TrainingArguments", instead)
    carries = ("save", "evaluate", "evaluation")
    program = compile_for(trainer.model, spec, overrides, clip, _logger.warning, carries)
    args = trainer.args = copy.copy(trainer.args)
    args.max_grad_norm = 0.0
    optimizer = program.as_optimizer(args.gradient_accumulation_steps, watch=False)
    trainer.optimizer, trainer.lr_scheduler = optimizer, SpecRates(optimizer)
    trainer.trainc_optimizer = optimizer
    trainer.add_callback(_Notes(program))
    own = type(trainer)
    trainer.__class__ = type(own.__name__, (_BySpec, own), {"__module__": own.__module__})
    return program


class _BySpec(Trainer):  # type: ignore[misc]  # transformers has no types here
    """What a Trainer does otherwise under a spec, whatever its class does."""

    trainc_optimizer: ProgramOptimizer
    trainc_items = 1.0
    """The targets that count in the micro-batches of this step; of several processes their mean, where all count."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Count the targets of the step as its loss does.

        The Trainer may count other labels: by these all of its loss is scaled, and its micro-batches alike.
        """
        batches, items = super().get_batch_samples(*args, **kwargs)
        targets = [_targets(self, batch) for batch in batches]
        own = sum(float(_counted(one).sum()) for one in targets if one is not None)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            counts = torch.tensor([own], device=self.args.device)
            own = float(self.accelerator.gather(counts).mean())
        self.trainc_items = own
        return batches, items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        optimizer = self.trainc_optimizer
        program = optimizer.program
        own = super().compute_loss
        if not (model.training and torch.is_grad_enabled()):
            targets = _targets(self, inputs)
            if targets is None or model.training or not program.evaluation_readers:
                return own(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
            loss, outputs = own(model, inputs, True, num_items_in_batch=num_items_in_batch)
            logits = _logits(outputs)
            program.read_evaluation(logits, _padded(targets, logits))
            return (loss, outputs) if return_outputs else loss
        if model is not program.module:
            program.forward = model
        read = {name: value for name, value in inputs.items() if name != "labels"}
        targets = _targets(self, inputs)
        examples = count_examples((), read) if targets is None else len(targets)
        weights, part = None, 1.0
        if targets is not None:
            counted = _counted(targets)
            weights = counted if counted.any() else None
            if _divides_by_items(self, num_items_in_batch) and self.trainc_items:
                part = float(counted.sum()) / self.trainc_items
        tokens = examples if targets is None else count_tokens(targets)
        with optimizer.micro_batch(examples, weights, part, tokens):
            loss, outputs = own(model, inputs, True, num_items_in_batch=num_items_in_batch)
        found: dict[str, Any] = {}
        if optimizer.reads_logits:
            logits = _logits(outputs)
            padded = None if targets is None else _padded(targets, logits)
            found = {"logits": logits, "targets": padded, "inputs": read}
        loss = optimizer.loss(loss, **found)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        program = self.trainc_optimizer.program
        program.evaluation_metrics()  # ends one that was broken off
        with program.evaluation_weights():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        found = program.evaluation_metrics().items()
        output.metrics.update({f"{prefix}_{name}": value for name, value in found})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            measured = self.trainc_optimizer.metrics.items()
            others = {n: v for n, v in measured if n not in logs and n != "gradient_norm"}
            logs = {**logs, **others}
        super().log(logs, *args, **kwargs)


class SpecRates(torch.optim.lr_scheduler.LRScheduler):
    """The scheduler of a Trainer under a spec: it shows the rates in force, which the program sets."""

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float | Tensor]:
        return self.get_lr()


class _Notes(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Says what the program notes of a step, and lets the Trainer end, save and evaluate as rules of the spec say."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tell_length(self._program, "the Trainer", state.max_steps, _logger.warning)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self._program.report()
        for note in report.notes:
            _logger.warning(note)
        control.should_save |= report.save
        control.should_evaluate |= report.evaluate
        if (stop := stop_before_next(self._program)) is not None:
            _logger.warning(f"{stop}, after {state.global_step} steps")
            control.should_training_stop = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        found = {n: v for n, v in (metrics or {}).items() if isinstance(v, float | int)}
        self._program.measured({n: float(v) for n, v in found.items() if n.startswith("eval_")})


# the loss of a Trainer


def _targets(trainer: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the targets that the loss of a micro-batch is of, example axis first; None where they are not known."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor) or not labels.dim():
        return None
    if "shift_labels" in inputs or labels.dim() < 2 or not _shifts_labels(trainer):
        return labels
    return labels[..., 1:]


def _logits(outputs: Any) -> Tensor:
    """Return the logits of what the model gave."""
    found: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
    return found


def _counted(targets: Tensor) -> Tensor:
    """Return how many targets of each example count, (examples,)."""
    return targets.ne(-100).reshape(len(targets), -1).sum(1)


def _shifts_labels(trainer: Any) -> bool:
    """Say whether the model shifts labels itself; a Trainer knows that of some of the causal models only."""
    if trainer._loss_shifts_labels:
        return True
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _padded(targets: Tensor, logits: Tensor) -> Tensor:
    """Return targets of shifted labels with one more that does not count, so that each of the logits has one."""
    if targets.dim() < 2 or targets.shape[1] != logits.shape[1] - 1:
        return targets
    return torch.nn.functional.pad(targets, (0, 1), value=-100)


def _divides_by_items(trainer: Any, items: Any) -> bool:
    """Say whether the loss is a sum over a micro-batch, divided by the number of items of all of the step."""
    if items is None:
        return False
    if trainer.loss_is_scaled_for_ga is not None:
        return bool(trainer.loss_is_scaled_for_ga)
    return bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)


# who says what


def _refuse_processes(trainer: Any) -> None:
    args = trainer.args
    found = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        f"{args.n_gpu} devices in one process (DataParallel)": args.n_gpu > 1,
    }
    if names := [name for name, there in found.items() if there]:
        raise ValueError(
            f"a Trainer with {names[0]} cannot train by a spec: start one process a device with `torchrun`, or write"
            " the loop yourself with `program.step`"
        )


def _refuse_two_methods(trainer: Any) -> None:
    """Raise ValueError where a Trainer was told how to train by others than the spec."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "the Trainer has an optimizer or a scheduler already, and the spec says how to train: leave `optimizers`"
            " out of `Trainer(...)`, and call `use_spec` once, before `train()`"
        )
    told = []
    for field in dataclasses.fields(trainer.args):
        if field.name in _OF_THE_SPEC:
            value = getattr(trainer.args, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if value not in (default, None, "", {}) and str(value) != str(default):
                told.append(f"`{field.name} = {value}` (in the spec: `{_OF_THE_SPEC[field.name]}`)")
    if told:
        raise ValueError(
            f"the TrainingArguments say how to train, and so does the spec: remove {', '.join(told)}"
        )
