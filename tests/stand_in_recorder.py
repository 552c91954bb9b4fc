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
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index_put")
_CHECKED = ("aten::_linalg_check_errors",)
Launch = tuple[str, tuple[Any, ...]]


class HostReads(TorchDispatchMode):
    """Refuses what would wait for the device: a capture of a CUDA graph fails there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _reads(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


class Launches(HostReads):
    """Keeps what is launched, with its numbers and with the addresses of all tensors that were not made in here."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Launch] = []
        self._made: dict[int, Tensor] = {}
        """By their memory; held, so that no other tensor gets the same."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = tuple(map(self._told, tree_leaves((args, kwargs or {}))))
        self.found.append((str(func), given))
        results = super().__torch_dispatch__(func, types, args, kwargs)
        for one in tree_leaves(results):
            if isinstance(one, Tensor) and self._is_outside(one) and not self._is_given(one, args):
                self._made[_memory(one)] = one
        return results

    def _told(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return repr(given)
        form = tuple(given.shape), given.dtype
        return (*form, given.data_ptr()) if self._is_outside(given) else form

    def _is_outside(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and _memory(tensor) not in self._made

    def _is_given(self, tensor: Tensor, args: tuple[Any, ...]) -> bool:
        """Say whether a result is in the memory of an operand: it is a view, or was written to."""
        operands = (one for one in tree_leaves(args) if isinstance(one, Tensor))
        return any(
            one.layout == torch.strided and _memory(one) == _memory(tensor) for one in operands
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reads(func: Any, args: tuple[Any, ...]) -> bool:
    """Say whether the host waits for what an operator computes."""
    name = func._schema.name
    if name in _INDEXED:
        return _by_mask(args)
    return name in _CHECKED or bool(_READS & set(func.tags))


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Say whether an index is a mask whose entries must be counted; one number is written by the mask itself."""
    masks = [one for one in tree_leaves(args[1:2]) if isinstance(one, Tensor)]
    if not any(one.dtype in (torch.bool, torch.uint8) for one in masks):
        return False
    put = args[2] if len(args) > 2 else None
    return put is None or put.numel() != 1 or (len(args) > 3 and bool(args[3]))


class StandIn:
    """Records on the CPU.

    A replay runs the pass again on the tensors of the recording, and writes to the results of the recording; those of
    all other recordings share the pool, and hold no number afterwards. A device launches again what it launched, with
    the same numbers and addresses: a pass that would launch something else by then is an error.
    """

    kind: ClassVar[str] = "cpu"
    watches: ClassVar[bool] = True
    """Whether what the host reads in a pass, and what is launched in the next one, is watched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: list[Sequence[Tensor | None]] = []

    def record(self, run: Run) -> Recording:
        """Record a pass; the caller undoes what the pass changes, which a capture would not."""
        launched = Launches()
        with self.watching(launched):
            outputs = [None if one is None else one.clone() for one in run()]
        self.made.append(outputs)
        return Recording(self.replay_of(run, outputs, launched.found), outputs)

    def watching(self, launched: Launches) -> AbstractContextManager[Any]:
        """Keep what is launched, and refuse what the host reads inside this block."""
        return launched if self.watches else nullcontext()

    def replay_of(
        self, run: Run, outputs: Sequence[Tensor | None], recorded: Sequence[Launch]
    ) -> Callable[[], None]:
        """Return what replays a pass."""

        def replay() -> None:
            for others in self.made:
                for one in others:
                    if one is not None:
                        _spoil(one)
            launched = Launches()
            with self.watching(launched):
                fresh = [None if one is None else one.clone() for one in run()]
            _compare(launched.found, recorded)
            for kept, one in zip(outputs, fresh, strict=True):
                if kept is not None and one is not None:
                    kept.copy_(one)

        return replay


def _compare(now: Sequence[Launch], recorded: Sequence[Launch]) -> None:
    """Raise AssertionError where a recording would do something else than the pass."""
    assert len(now) == len(recorded), "a recording has other launches than the pass has now"
    for one, other in zip(now, recorded, strict=True):
        assert one == other, f"a recording launches {other}, and the pass now launches {one}"


def _spoil(tensor: Tensor) -> None:
    if tensor.is_sparse:
        tensor._values().fill_(math.nan)
    else:
        tensor.fill_(math.nan if tensor.is_floating_point() else -1)
