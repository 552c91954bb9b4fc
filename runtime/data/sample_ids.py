"""Sample ids: which sample of the training data each example of a micro-batch is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch, one_of, split_batch

SampleIds = Tensor | Sequence[Tensor]
"""Those of a batch, or of each micro-batch in a list of them."""


def ids_of(
    given: SampleIds | None,
    micro_batches: Sequence[Batch],
    readers: Sequence[str],
    *,
    listed: bool,
) -> Sequence[Tensor | None]:
    """Return the sample ids of each micro-batch, on the device of its targets; None for each where none are given.

    Where the user `listed` micro-batches, `given` is a list as well, else one tensor of all examples. Raises ValueError
    for anything but one int64 number an example, and where none are given although there are `readers`.
    """
    if given is None:
        if readers:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in readers)} reads which samples a batch holds, and this step was"
                " not told: call `program.step(batch, sample_ids=ids)`, or `program.loss(batch, sample_ids=ids)`, in"
                " every step with an int64 tensor of one number an example, the same whenever a sample comes again. For"
                " a list of micro-batches it is a list of such tensors"
            )
        return [None] * len(micro_batches)
    if not listed:
        counts = [len(one_of(targets)) for _, targets in micro_batches]
        whole = _checked(given, sum(counts), "`sample_ids`")
        return [
            ids.to(one_of(targets).device)
            for ids, (_, targets) in zip(whole.split(counts), micro_batches, strict=True)
        ]
    if not isinstance(given, list | tuple) or len(given) != len(micro_batches):
        found = f"a list of {len(given)}" if isinstance(given, list | tuple) else _form(given)
        raise ValueError(
            f"the step has a list of {len(micro_batches)} micro-batches, and `sample_ids` is {found}: give a list with"
            " the ids of each micro-batch, in the same order"
        )
    return [
        _checked(ids, len(one_of(targets)), f"`sample_ids[{i}]`").to(one_of(targets).device)
        for i, (ids, (_, targets)) in enumerate(zip(given, micro_batches, strict=True))
    ]


def split_batches(
    micro_batches: Sequence[Batch], sample_ids: Sequence[Tensor | None], size: int
) -> tuple[list[Batch], list[Tensor | None]]:
    """Cut micro-batches, and the sample ids of each, into smaller ones of at most `size` examples."""
    parts: list[Batch] = []
    ids_of_parts: list[Tensor | None] = []
    for batch, ids in zip(micro_batches, sample_ids, strict=True):
        found = split_batch(batch, size)
        parts += found
        ids_of_parts += [None] * len(found) if ids is None else ids.split(size)
    return parts, ids_of_parts


def _checked(ids: object, examples: int, name: str) -> Tensor:
    """Return ids that are one int64 number an example; raises ValueError for others."""
    if isinstance(ids, Tensor) and ids.dtype == torch.int64 and tuple(ids.shape) == (examples,):
        return ids
    raise ValueError(
        f"{name} is {_form(ids)}, and must be int64[{examples}]: a tensor with one number an example, that of its"
        " sample in the training data"
    )


def _form(ids: object) -> str:
    """Return dtype and shape of a tensor, or the type of anything else."""
    if isinstance(ids, Tensor):
        return f"{str(ids.dtype).removeprefix('torch.')}{list(ids.shape)}"
    return f"of type {type(ids).__name__}"
