"""Run a model's plain Python: without compiled functions, and without reentrant checkpoints or with others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.utils import checkpoint


@contextmanager
def eager_operations() -> Iterator[None]:
    """Run the Python inside compiled functions and reentrant checkpoints, which hide the uses of a weight."""
    with _reentrant_checkpoints_as(_PlainCheckpoint), uncompiled():
        yield


def differentiable_checkpoints() -> AbstractContextManager[None]:
    """Run reentrant checkpoints as non-reentrant ones; `torch.autograd.grad` finds no parameter in the former."""
    return _reentrant_checkpoints_as(_NonReentrantCheckpoint)


@contextmanager
def _reentrant_checkpoints_as(replacement: type) -> Iterator[None]:
    module: Any = checkpoint
    kept = module.CheckpointFunction
    module.CheckpointFunction = replacement
    try:
        yield
    finally:
        module.CheckpointFunction = kept


def uncompiled() -> AbstractContextManager[None]:
    """Run the Python inside compiled functions."""
    # What was compiled has imported dynamo; to import it for nothing takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return cast("AbstractContextManager[None]", torch.compiler.set_stance("force_eager"))


class _PlainCheckpoint:
    """Replaces torch's reentrant checkpoint: runs the function and keeps its autograd graph."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *inputs: Any) -> Any:
        """Run the function as it is."""
        return function(*inputs)


class _NonReentrantCheckpoint:
    """Replaces torch's reentrant checkpoint by the other one, which computes the same."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any) -> Any:
        """Run the function, and once more in the backward pass."""
        return checkpoint.checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
