"""Batches and models, as the data and model contracts state them: how inputs reach a model and logits come out."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Batch = tuple[Any, Tensor]


def call(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Return the logits for a tensor, a tuple (positional) or a dict (keyword) of inputs."""
    return logits(forward(model, inputs))


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """Return what the model gives for a tensor, a tuple (positional) or a dict (keyword) of inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def logits(output: Any) -> Tensor:
    """Return the logits of what a model gave: a tensor, an object with `.logits`, or a tuple that begins with them."""
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise TypeError(
        f"the model returned {type(output).__name__}:"
        " expected logits, an object with `.logits`, or a tuple of logits first"
    )


def repeated(inputs: Any, views: int) -> Any:
    """Return the inputs with every example `views` times, view after view along the first axis."""
    return inputs if views == 1 else map_tensors(lambda t: torch.cat([t] * views), inputs)


def map_tensors(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Return inputs (tensors, and dicts, tuples or lists of them) with every tensor changed."""
    if isinstance(inputs, torch.Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(change, value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(map_tensors(change, value) for value in inputs)
    return inputs


def check(batch: Any) -> Batch:
    """Return a batch as (inputs, targets); raises TypeError when it is not one."""
    if not (
        isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)
    ):
        raise TypeError(
            "a batch is a pair (inputs, targets) whose targets are a tensor with the examples first"
        )
    return batch[0], batch[1]


def split(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into micro-batches of `size` examples; the last may be smaller."""
    inputs, targets = batch
    count = targets.shape[0]
    if size <= 0 or size >= count:
        return [batch]
    rows = [slice(i, i + size) for i in range(0, count, size)]
    return [(map_tensors(itemgetter(own), inputs), targets[own]) for own in rows]


def tokens(targets: Tensor) -> int:
    """Return how many tokens a batch of targets counts as: every entry of integer targets, else one per example."""
    return targets.numel() if not targets.is_floating_point() else targets.shape[0]
