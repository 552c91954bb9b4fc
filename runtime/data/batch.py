"""Batches and calls of models: inputs go into a model, logits come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Any, Tensor]
"""Inputs and targets; the first axis of the targets counts the examples."""


def compute_logits(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Return the logits for a tensor, a tuple (positional) or a dict (keyword) of inputs.

    Raises TypeError where the model returns no logits.
    """
    return extract_logits(call_model(model, inputs))


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Return the model's output for a tensor, a tuple (positional) or a dict (keyword) of inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def extract_logits(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, an object with `.logits`, or a tuple with logits first.

    Raises TypeError for any other output.
    """
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise TypeError(
        f"the model returned {type(output).__name__}:"
        " expected logits, an object with `.logits`, or a tuple with logits first"
    )


def repeat_views(inputs: Any, views: int) -> Any:
    """Return the inputs with every example `views` times, view after view along the first axis."""
    if views == 1:
        return inputs
    return map_tensors(lambda tensor: torch.cat([tensor] * views), inputs)


def check_batch(batch: Any) -> Batch:
    """Return a batch as (inputs, targets); raises TypeError where it is not one."""
    if not (
        isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)
    ):
        raise TypeError(
            f"a batch is {type(batch).__name__}: expected a pair (inputs, targets) with a tensor of"
            " targets whose first axis counts the examples"
        )
    return batch[0], batch[1]


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into micro-batches of `size` examples; the last may be smaller."""
    inputs, targets = batch
    count = targets.shape[0]
    if size <= 0 or size >= count:
        return [batch]
    return [
        (map_tensors(itemgetter(rows), inputs), targets[rows])
        for rows in (slice(at, at + size) for at in range(0, count, size))
    ]


def count_tokens(targets: Tensor) -> int:
    """Return how many tokens a batch of targets counts as: every entry of integer targets, else one per example."""
    return targets.shape[0] if targets.is_floating_point() else targets.numel()


def copy_inputs(batch: Batch) -> Batch:
    """Return a batch whose inputs are copies, for a pass besides those of the step: a model may write into them."""
    return map_tensors(torch.clone, batch[0]), batch[1]


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Apply a function to every tensor of the inputs: a tensor, or dicts, tuples and lists of tensors."""
    if isinstance(inputs, torch.Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(function, value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        found = [map_tensors(function, value) for value in inputs]
        if isinstance(inputs, list):
            return found
        return type(inputs)(*found) if hasattr(inputs, "_fields") else tuple(found)
    return inputs
