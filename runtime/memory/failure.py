"""An allocation that failed: how it is recognized, and how what it held is given back."""

from __future__ import annotations

import gc
from traceback import clear_frames

import torch

_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What the messages of torch's plain RuntimeErrors say."""


class OutOfMemory(torch.OutOfMemoryError):
    """A step ran out of memory; the message says what fits, or that nothing does.

    `fits` is the largest number of samples in one pass that was found to fit, None where none was.
    """

    def __init__(self, message: str, fits: int | None = None) -> None:
        super().__init__(message)
        self.fits = fits


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised from, is an allocation that failed."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__
    return False


def release(error: BaseException) -> None:
    """Give back what the passes that ended with an error still hold: frames, graphs of autograd, and torch's cache."""
    held: BaseException | None = error
    while held is not None:
        clear_frames(held.__traceback__)
        held = held.__cause__ or held.__context__
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
