"""What the sizes of the batch, and layers that mix examples, rule out for measurements of examples or micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets


def single_micro_batch(bound: Targets) -> Iterator[Problem]:
    """Object to steps of one micro-batch where micro-batches are compared."""
    sizes = bound.sizes
    if sizes is not None and not sizes.changing and sizes.start <= sizes.micro:
        half = max(1, sizes.start // 2)
        yield Problem(
            "nothing-to-measure",
            f"a step is one micro-batch of {sizes.micro} samples: `method = micro_batch` has nothing to compare",
            field="method",
            help=f"let `data` have `micro = {half} samples`, or take `method = per_example`",
        )


def uncalibrated(bound: Targets, wanted: int | None) -> Iterator[Problem]:
    """Object to calibrations that would measure another model, nothing, or fewer examples than are `wanted`."""
    mixing = next((m.name for m in bound.inventory.modules if "_BatchNorm" in m.types), None)
    if mixing is not None:
        yield Problem(
            "norm-mixes-examples",
            f"a calibration passes examples one by one, and `{mixing}` normalizes over the batch: of one example"
            " alone it makes another model, or none",
            field="calibrate",
            help="leave `calibrate` out, or measure all layers: `on all { method = micro_batch }`",
        )
    micro = None if bound.sizes is None else bound.sizes.micro
    if micro == 1:
        yield Problem(
            "nothing-to-measure",
            "a calibration takes its examples from the step's first micro-batch, one sample: nothing to compare",
            field="calibrate",
            help="let `data` have `micro = 2 samples` or more, or leave `calibrate` out",
        )
    elif micro is not None and wanted is not None and wanted > micro:
        yield Problem(
            "no-effect",
            f"`calibrate_examples = {wanted}` is more than the {micro} samples of a micro-batch: {micro} are taken",
            field="calibrate_examples",
            help=f"write `calibrate_examples = {micro}`, or let `micro` be larger",
            severity="warning",
        )
