"""Batches and calls of models: inputs go into a model, logits come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = tuple[Any, Any]
"""Inputs and targets: a tensor, or a dict or tuple of tensors, whose first axis counts the examples."""


GivenBatch = Batch | Mapping[str, Any]
"""A batch as a program is given it: a pair, or one dict where the model computes a loss of what that holds."""


class WrongBatch(TypeError):
    """The data gave something else than a batch of the samples that were asked for."""


Evaluated = tuple[float, float, dict[str, tuple[float, float]]]
"""Of a batch that was evaluated: the loss as a sum and its count, and other means by name, each as such a pair."""
Pick = str | int | None
"""Which part of a model's output or of the targets: a name or an index; None where it has one part."""


class WrongOutput(TypeError):
    """The model returned no logits."""


class WrongPick(WrongOutput):
    """The model's output has not the part that a loss picks, or has several and the loss picks none.

    `label` is the name of the loss, where it is one of several.
    """

    label: str | None = None


def compute_logits(model: Callable[..., Any], inputs: Any, output: Pick = None) -> Tensor:
    """Return the logits for a tensor, a tuple (positional) or a dict (keyword) of inputs.

    With `output` it is this part of what the model returns. Raises WrongOutput, a TypeError, where there is no such
    tensor, or parts of the output would be left out without a word.
    """
    return extract_logits(call_model(model, inputs), output)


def call_model(
    model: Callable[..., Any], inputs: Any, others: Mapping[str, Tensor] | None = None
) -> Any:
    """Return the model's output for a tensor, a tuple (positional) or a dict (keyword) of inputs, and for `others`."""
    others = others or {}
    if isinstance(inputs, torch.Tensor):
        return model(inputs, **others)
    if isinstance(inputs, Mapping):
        return model(**inputs, **others)
    if isinstance(inputs, tuple | list):
        return model(*inputs, **others)
    return model(inputs, **others)


def extract_logits(output: Any, pick: Pick = None) -> Tensor:
    """Return a part of a model's output; without `pick` a tensor, the `.logits` of an object, or the one of a tuple.

    Raises WrongOutput, a TypeError, where there is none, and WrongPick where the loss must say which part it is of.
    """
    if pick is not None:
        return _picked(output, pick)
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, torch.Tensor):
        _refuse_losses(output)
        return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        if numbers := [i for i, one in enumerate(output) if is_number(one)]:
            raise WrongPick(
                f"the model returned {len(output)} values, and value {numbers[0]} is one number, a loss of its own,"
                " which would not be trained. To train it write `loss model`, which gives the model its labels; or name"
                f" the value that the loss is of, such as `output = {int(numbers[0] == 0)}`, to leave it out on purpose"
            )
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(list(output[1:]))):
            raise WrongPick(
                f"the model returned {len(output)} values, and the loss does not say which it is of: write"
                " `output = 0` in the `loss` clause to train the first alone, and to leave out the others on purpose"
            )
        return output[0]
    if isinstance(output, Mapping) and any(isinstance(v, torch.Tensor) for v in output.values()):
        names = [f"`{name}`" for name, v in output.items() if isinstance(v, torch.Tensor)]
        raise WrongPick(
            f"the model returned a dict with {', '.join(names)}, and the loss does not say which it is of: write"
            f' `output = "{names[0][1:-1]}"`, or another of the names, in the `loss` clause'
        )
    raise WrongOutput(
        f"the model returned {type(output).__name__}:"
        " expected logits, an object with `.logits`, or a tuple with logits first"
    )


def find_logits(output: Any, pick: Pick = None) -> Tensor | None:
    """Return a part of a model's output beside its loss; without `pick` its logits, None where nothing tells them.

    Raises WrongPick where the output has not the part that is picked.
    """
    if pick is not None:
        return _picked(output, pick)
    if isinstance(output, torch.Tensor):
        return output if output.dim() else None
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(output, tuple | list):
        wide = (one for one in output if isinstance(one, torch.Tensor) and one.dim())
        found = next(wide, None)
    return found if isinstance(found, torch.Tensor) else None


def no_logits(reader: str) -> WrongPick:
    """Return the error of what reads logits, where nothing tells which part of a model's output they are."""
    return WrongPick(
        f"`{reader}` reads the logits, and nothing tells which part of the model's output they are, beside its loss:"
        ' write `logits = "NAME"` in the `loss` clause, if it has some, or remove the clause'
    )


def _picked(output: Any, pick: str | int) -> Tensor:
    """Return the part of a model's output by its name or index."""
    if isinstance(pick, str):
        named = output if isinstance(output, Mapping) else None
        found = getattr(output, pick, None) if named is None else named.get(pick)
    else:
        found = None
        if isinstance(output, tuple | list) and pick < len(output):
            found = output[pick]
    if isinstance(found, torch.Tensor):
        return found
    shown = f'"{pick}"' if isinstance(pick, str) else pick
    raise WrongPick(
        f"`output = {shown}`: the model returned {describe_parts(output)}, which has no tensor of this"
        f" {'name' if isinstance(pick, str) else 'index'}"
    )


def describe_parts(output: Any) -> str:
    """Return in words what a model returned, or of what the targets consist."""
    if isinstance(output, torch.Tensor):
        return "one tensor"
    if isinstance(output, tuple | list):
        return f"{len(output)} values"
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    names = ", ".join(f"`{name}`" for name, v in named.items() if isinstance(v, torch.Tensor))
    return f"a {type(output).__name__} with {names}" if names else f"a {type(output).__name__}"


def _refuse_losses(output: Any) -> None:
    """Raise WrongPick where an output has losses beside its logits: 0-d numbers that would not be trained."""
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    losses = [name for name, value in named.items() if is_number(value)]
    if not losses:
        return
    reason = "The model computes it where its inputs hold `labels`: to train it write `loss model`"
    instead = f"{reason}; or write" if "loss" in losses else "Write"
    raise WrongPick(
        f"the model returned `{losses[0]}`, a loss of its own, beside `logits`: there are two losses, and it would not"
        f' be trained. {instead} `output = "logits"` in the `loss` clause to leave it out on purpose'
    )


def is_number(value: Any) -> bool:
    """Say whether a part of a model's output is one floating-point number, as losses are."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def repeat_views(inputs: Any, views: int) -> Any:
    """Return the inputs with every example `views` times, view after view along the first axis."""
    if views == 1:
        return inputs
    return map_tensors(lambda tensor: torch.cat([tensor] * views), inputs)


def check_batch(batch: Any) -> Batch:
    """Return a batch as (inputs, targets); raises WrongBatch, a TypeError, where it is not one."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and _are_targets(batch[1])):
        whole = (
            ". Where the model computes its own loss of what the batch holds, write `loss model`: it takes the batch"
            " whole"
        )
        raise WrongBatch(
            f"a batch is {type(batch).__name__}: expected a pair (inputs, targets) with a tensor of targets, or a dict"
            " or tuple of them, whose first axis counts the examples"
            + whole
            * isinstance(batch, Mapping)
        )
    return batch[0], batch[1]


def _are_targets(targets: Any) -> bool:
    """Say whether targets are a tensor, or several with one number of examples."""
    if isinstance(targets, torch.Tensor):
        return True
    if not isinstance(targets, Mapping | tuple | list):
        return False
    several = [*targets.values()] if isinstance(targets, Mapping) else [*targets]
    tensors = [one for one in several if isinstance(one, torch.Tensor) and one.dim()]
    return 0 < len(tensors) == len(several) and len({len(one) for one in tensors}) == 1


def one_of(targets: Any) -> Tensor:
    """Return a tensor of the targets: all have one number of examples, and one device."""
    found = targets
    while not isinstance(found, torch.Tensor):
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    return found


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into micro-batches of `size` examples; the last may be smaller."""
    inputs, targets = batch
    count = len(one_of(targets))
    if size <= 0 or size >= count:
        return [batch]
    return [
        (map_tensors(itemgetter(rows), inputs), map_tensors(itemgetter(rows), targets))
        for rows in (slice(at, at + size) for at in range(0, count, size))
    ]


def count_tokens(targets: Any) -> int:
    """Return how many tokens a batch of targets counts as: every entry of integer targets, else one per example.

    Of several tensors it is the largest number.
    """
    if not isinstance(targets, torch.Tensor):
        parts = targets.values() if isinstance(targets, Mapping) else targets
        return max(map(count_tokens, parts))
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
