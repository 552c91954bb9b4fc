"""Measuring beside a step: from copies, in a thread, while the step runs its passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


def copied(matrices: Mapping[str, Any]) -> dict[str, Any]:
    """Return matrices as they are now, whatever updates the weights get.

    What is not a tensor was computed of weights, so that they are not in it.
    """
    return {n: m.detach().clone() if isinstance(m, Tensor) else m for n, m in matrices.items()}


def in_thread(
    measure: Callable[[Mapping[str, Any]], Found], matrices: Mapping[str, Any]
) -> Callable[[], Found]:
    """Begin to measure in a thread; return what waits for it, and then returns the figures or raises its error.

    On CUDA devices the thread works in streams of its own, after what is in the current ones now.
    """
    devices = {tensor.device for tensor in _tensors(matrices) if tensor.is_cuda}
    streams = [torch.cuda.Stream(device) for device in devices]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(stream.device))

    def work() -> Found:
        with ExitStack() as entered:
            for stream in streams:
                # Before the matrices are freed, for memory is of the stream that it was taken in.
                entered.callback(stream.synchronize)
                entered.enter_context(torch.cuda.stream(stream))
            return measure(matrices)

    pool = ThreadPoolExecutor(1, "measure")
    future = pool.submit(work)
    pool.shutdown(wait=False)  # of the pool: the thread ends with its work
    return future.result


def _tensors(matrices: Mapping[str, Any]) -> Iterator[Tensor]:
    for one in matrices.values():
        yield one if isinstance(one, Tensor) else one.values
