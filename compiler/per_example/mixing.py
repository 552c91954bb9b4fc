"""Whether examples are independent: only then has each a gradient of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError
from trainc.compiler.model.batch_statistics import batch_norms, uses_batch_statistics
from trainc.compiler.model.undisturbed import in_mode
from trainc.runtime.processes.replica_group import world_size

_OUTPUT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""The difference between outputs, relative to the largest, that rounding can cause, by dtype; in 16 bits 0.05."""


class ExamplesMix(SiteError):
    """The model's outputs for an example depend on the other examples."""

    rule = "examples-mix"


class BatchNorms:
    """The BatchNorm layers of a model. Their modes are asked in every step: `model.train()` turns them on again."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = batch_norms(model)

    def refuse_mixed(self, *, by_groups: bool = False) -> None:
        """Raise ExamplesMix where a layer mixes examples; with `by_groups`, unless it normalizes groups apart."""
        for name, layer in self._layers.items():
            apart = by_groups and layer.training and not isinstance(layer, nn.SyncBatchNorm)
            if uses_batch_statistics(layer) and not apart:
                raise ExamplesMix(
                    f"{batch_norm_mixes(name, layer)} In place of examples, micro-batches can be compared"
                    " (`method = micro_batch`), or groups (`method = ghost, group = 8`)"
                )

    def refuse_joined_replicas(self) -> None:
        """Raise ExamplesMix where a layer mixes the micro-batches of several processes."""
        for name, layer in self._layers.items():
            if isinstance(layer, nn.SyncBatchNorm) and layer.training and world_size() > 1:
                raise ExamplesMix(
                    f"`{name}` (SyncBatchNorm) normalizes over the micro-batches of all processes, so none of them has"
                    " a gradient of its own: make it a BatchNorm, or put it in eval mode"
                )


def batch_norm_mixes(name: str, layer: nn.Module) -> str:
    """Return why no example has a gradient of its own where this layer runs, and in which mode it had."""
    if layer.training:
        mode = "is a BatchNorm in train mode: it normalizes over the batch"
        help_ = "Put it in eval mode, again after every `model.train()`"
    else:
        mode = "is a BatchNorm without running statistics: it normalizes over the batch in eval mode, too"
        help_ = "Let it track running statistics, and put it in eval mode"
    return (
        f"`{name}` {mode}, so no example has a gradient of its own. {help_}; or use a norm"
        " that normalizes each example alone."
    )


def check_independent(
    model: nn.Module,
    run: Callable[[Sequence[int]], Sequence[Tensor]],
    rows: Sequence[int],
    restored: Callable[[], AbstractContextManager[None]],
    *,
    in_train_mode: bool,
) -> None:
    """Raise ExamplesMix if a model's outputs for two examples change with the third example of the batch.

    `run` gives the outputs for three examples, and each run begins with the state and the random numbers that
    `restored` keeps. The batches have the same shape, so that rounding is the same. It is asked in eval mode, and, with
    `in_train_mode`, in the modes that the modules have.
    """
    with in_mode(model, training=False):
        mixed = _is_mixed(run, rows, restored)
    if mixed:
        raise ExamplesMix(
            "the model's outputs for two examples change when the third example of the batch changes, so no example"
            " has a gradient of its own. Remove what mixes examples, such as a mean over the batch or attention"
            " without `batch_first`; or compare micro-batches instead, with `method = micro_batch`"
        )
    if in_train_mode and _is_mixed(run, rows, restored):
        raise ExamplesMix(
            "in train mode the model's outputs for two examples change when the third example of the batch changes, so"
            " no example has a gradient of its own. Remove what mixes examples in train mode, such as"
            " `nn.functional.batch_norm(training=True)`; or compare micro-batches instead, with `method = micro_batch`"
        )


def _is_mixed(
    run: Callable[[Sequence[int]], Sequence[Tensor]],
    rows: Sequence[int],
    restored: Callable[[], AbstractContextManager[None]],
) -> bool:
    """Return whether outputs change with the third example, and only with it: the first run is repeated last."""
    first, second, third = rows
    other = first if third != first else second

    def outputs(last: int) -> Sequence[Tensor]:
        with restored():
            return run([first, second, last])

    try:
        one, two = outputs(third), outputs(other)
        changed = [i for i, pair in enumerate(zip(one, two, strict=False)) if _differ(*pair)]
        if not changed:
            return False
        # A model that counts its passes, or draws numbers of its own, differs here, too.
        two_again, one_again = outputs(other), outputs(third)
    # In a mode that the check chose a model may do something that fails; then nothing is known.
    except Exception:
        return False
    return any(
        not _differ(one[i], one_again[i]) and not _differ(two[i], two_again[i]) for i in changed
    )


def _differ(one: Tensor, two: Tensor) -> bool:
    """Return whether outputs for three examples differ in the first two by more than rounding.

    Outputs of other shapes are not compared.
    """
    if not one.is_floating_point() or one.shape != two.shape or one.shape[:1] != (3,):
        return False
    difference, largest = (one - two)[:2].abs(), one.abs()
    return bool(
        difference.numel()
        and difference.max() > _OUTPUT_TOLERANCE.get(one.dtype, 0.05) * largest.max()
    )
