"""The sums of a norm's backward pass: which are asked for, where they go, and how they are finished."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.contracts import absent
from trainc.kernels.library.grid import cdiv, resident_programs
from trainc.kernels.norm import tiles
from trainc.kernels.norm import triton_norm as kernels


class Sums:
    """What is summed over rows, dy * unit for the weight and dy for the bias, and the tensors it is written to.

    A sum is made where its gradient is wanted or norms are; `columns` are those of the norms, one for each parameter
    that the norm may have.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor | None],
        wanted: Sequence[bool],
        columns: int,
        with_norms: bool,
        x: Tensor,
    ) -> None:
        self.columns = columns
        given = [parameter is not None for parameter in parameters]
        stored = [has and wants for has, wants in zip(given, wanted, strict=True)]
        made = [has and (wants or with_norms) for has, wants in zip(given, stored, strict=True)]
        self.gradients = [
            torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device)
            if parameter is not None and wants
            else absent(x)
            for parameter, wants in zip(parameters, stored, strict=True)
        ]
        self.count, self.squared = sum(made), with_norms and any(made)
        self.flags = {"SUM_W": made[0], "SUM_B": made[1]}
        self.stored = {"STORE_W": stored[0], "STORE_B": stored[1]}

    def scratch(self, lines: int, squares: int, width: int, x: Tensor) -> Tensor:
        """Room for a partial row of each sum a line, and for as many squares of each."""
        if not self.count:
            return absent(x)
        size = kernels.HEAD.value + self.columns * (lines * width + squares)
        return torch.empty(size, dtype=torch.float32, device=x.device)

    def step(
        self, examples: int, chunks: int, width: int, squared: bool, device: torch.device
    ) -> tuple[int, dict[str, Any]]:
        """The blocks of columns of `finish_columns` over partial rows (examples, chunks, width), and its options."""
        processors = resident_programs(device, 1)
        step = tiles.finish(examples, chunks, width, self.count, squared, processors)
        names = ("UNROLL", "BLOCK_E", "BLOCK_S", "BLOCK_C", "BLOCK_L", "BLOCK_K")
        options = dict(zip(names, astuple(step), strict=True))
        options |= {"SQUARED": squared, "COLUMNS": self.columns, "num_warps": step.warps}
        options |= self.flags | self.stored
        return cdiv(width, step.columns), options
