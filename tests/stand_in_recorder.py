"""What records passes on the CPU in place of CUDA graphs, and is as unkind as these may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainc.compiler.replay.recorder import Recording, Run

_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostReads(TorchDispatchMode):
    """Refuses what would wait for the device: a capture of a CUDA graph fails there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _READS & set(func.tags) and not _by_numbers(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


def _by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Say whether an operator indexes, and no index is a mask."""
    indices = tree_leaves(args[1:2])
    return func._schema.name == "aten::index" and all(
        one is None or one.dtype not in (torch.bool, torch.uint8) for one in indices
    )


class StandIn:
    """Records on the CPU.

    A replay runs the pass again on the tensors of the recording, and writes to the results of the recording; those of
    all other recordings share the pool, and hold no number afterwards.
    """

    kind: ClassVar[str] = "cpu"
    watches: ClassVar[bool] = True
    """Whether what the host reads in a pass is refused."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: list[Sequence[Tensor | None]] = []

    def record(self, run: Run) -> Recording:
        """Record a pass; the caller undoes what the pass changes, which a capture would not."""
        with self.watching():
            outputs = [None if one is None else one.clone() for one in run()]
        self.made.append(outputs)
        return Recording(self.replay_of(run, outputs), outputs)

    def watching(self) -> AbstractContextManager[Any]:
        """Refuse what the host reads inside this block."""
        return HostReads() if self.watches else nullcontext()  # type: ignore[no-untyped-call]

    def replay_of(self, run: Run, outputs: Sequence[Tensor | None]) -> Callable[[], None]:
        """Return what replays a pass."""

        def replay() -> None:
            for others in self.made:
                for one in others:
                    if one is not None:
                        _spoil(one)
            with self.watching():
                for kept, fresh in zip(outputs, run(), strict=True):
                    if kept is not None and fresh is not None:
                        kept.copy_(fresh)

        return replay


def _spoil(tensor: Tensor) -> None:
    if tensor.is_sparse:
        tensor._values().fill_(math.nan)
    else:
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
