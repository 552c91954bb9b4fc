"""Record the kernels of a pass on a CUDA device as one graph, which replays them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from trainc.kernels.library.graph_capture import random_numbers_survive

Run = Callable[[], Sequence[Tensor | None]]


@dataclass(slots=True, eq=False)
class Recording:
    """A pass that was recorded: `replay` computes it from what its inputs hold, and writes to the same `outputs`."""

    replay: Callable[[], None]
    outputs: Sequence[Tensor | None]


class Recorder(Protocol):
    """Records passes on a device; made with the device.

    To record computes nothing. The outputs of a recording hold until another one of the same recorder is replayed.
    """

    kind: ClassVar[str]
    """The type of device that it records on."""
    device: torch.device

    def __init__(self, device: torch.device) -> None: ...

    def record(self, run: Run) -> Recording:
        """Return the recording of what `run` does. Raises whatever stands against it, and then leaves nothing."""
        ...


class CudaRecorder:
    """Records CUDA graphs of one device, on a stream of their own and in one pool of memory.

    A replay is launched on the stream that is the current one then.
    """

    kind: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # A graph of nothing holds the pool, come and go what may: torch takes no pool whose last graph is gone while
        # something, such as a workspace of cuBLAS, is still in it.
        self._holder: torch.cuda.CUDAGraph | None = None

    def record(self, run: Run) -> Recording:
        """Return the recording of what `run` does; see `Recorder`.

        torch registers the device's own generator with every capture, and a replay draws from it what a call would. A
        capture that fails may leave the generator's state unusable, and other captures are registered with that state.
        So it is rehearsed on a copy of the state, and only what succeeded is captured with the state itself.
        """
        with torch.cuda.device(self.device):
            if self._holder is None:
                self._holder = self._rehearsed(lambda: ())
            self._rehearsed(run)
            spare = self._generator.clone_state()
            try:
                graph, outputs = self._captured(run)
            except BaseException:
                self._generator.graphsafe_set_state(spare)
                raise
        return Recording(graph.replay, outputs)

    @property
    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[torch.cuda.current_device()]

    def _rehearsed(self, run: Run) -> torch.cuda.CUDAGraph:
        """Capture on a copy of the generator's state, which has its own state afterwards, come what may."""
        own = self._generator.graphsafe_get_state()
        try:
            with random_numbers_survive():
                return self._captured(run)[0]
        finally:
            self._generator.graphsafe_set_state(own)

    def _captured(self, run: Run) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor | None]]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as to pin memory for the next batch, is no matter of this one.
        capture = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        with _cleared(self._pool), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            with capture:
                outputs = run()
        return graph, outputs


@contextmanager
def _cleared(pool: tuple[int, int]) -> Iterator[None]:
    """Leave the stream and the memory pool of a capture where it fails, which torch stays in.

    The capture's share in the pool is given up, too: else its memory would be neither free nor used from then on.
    """
    device = torch.cuda.current_device()
    with torch.cuda.stream(torch.cuda.current_stream()):
        try:
            yield
        except BaseException:
            # Where the capture came to its end in spite of the error, torch has left the pool, and says so.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            raise
