"""What a noise scale needs of the sizes of the batch and of the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets


def micro_batch_problems(bound: Targets) -> Iterator[Problem]:
    """Object to steps of one micro-batch where micro-batches are compared."""
    sizes = bound.sizes
    if sizes is not None and not sizes.changing and sizes.start <= sizes.micro:
        half = max(1, sizes.start // 2)
        yield Problem(
            "nothing-to-measure",
            "`method = micro_batch` compares the micro-batches of a step, and a step has only one, of"
            f" {sizes.micro} samples",
            field="method",
            help=f"set `micro = {half} samples` in `data`, or use `method = per_example`",
        )


def calibration_problems(bound: Targets, asked: int | None) -> Iterator[Problem]:
    """Object to calibrations that BatchNorm forbids, or for which a micro-batch is too small.

    `asked` is `calibrate_examples` where the spec gives it.
    """
    if (norm := batch_norm(bound)) is not None:
        yield Problem(
            "norm-mixes-examples",
            f"`calibrate` runs one example at a time, which BatchNorm (`{norm}`) does not support",
            field="calibrate",
            help="remove `calibrate`, or measure all layers: `on all { method = micro_batch }`",
        )
    micro = None if bound.sizes is None else bound.sizes.micro
    if micro == 1:
        yield Problem(
            "nothing-to-measure",
            "`calibrate` compares the examples of a micro-batch, and a micro-batch has only one sample",
            field="calibrate",
            help="set `micro = 2 samples` or more in `data`, or remove `calibrate`",
        )
    elif micro is not None and asked is not None and asked > micro:
        yield Problem(
            "no-effect",
            f"`calibrate_examples = {asked}` is more than the {micro} samples of a micro-batch: {micro} are used",
            field="calibrate_examples",
            help=f"write `calibrate_examples = {micro}`, or let `micro` be larger",
            severity="warning",
        )


def batch_norm_warning(bound: Targets) -> Iterator[Problem]:
    """Warn of a BatchNorm elsewhere in a model whose examples are compared."""
    if (norm := batch_norm(bound)) is not None:
        yield Problem(
            "norm-mixes-examples",
            f"`{norm}` normalizes over the batch, so examples influence each other and the noise scale is biased",
            help="use `method = ghost, group = 8` or `method = micro_batch`",
            severity="warning",
        )


def batch_norm(bound: Targets) -> str | None:
    """Return the name of the first BatchNorm of the model; None without one."""
    return next((m.name for m in bound.inventory.modules if "_BatchNorm" in m.types), None)
