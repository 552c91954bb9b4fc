"""One kind of pass of a step graph that is recorded: what its recording reads, and what leaves it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.patterns.replayable import written
from trainc.compiler.replay.recorder import Recording


class RecordedPass:
    """One kind of pass: the tensors that it reads where they are, and its recording once there is one."""

    def __init__(self, graph: StepGraph, given: Sequence[Tensor]) -> None:
        assert graph.interface is not None
        self._tensors = tensors_of(graph)
        self._names = graph.interface.outputs
        self._of_batch = len(graph.interface.ports)
        self._model = [*self._tensors.values()]
        self._writing = [str(one.target) for one in written(graph.graph) if one.op == "get_attr"]
        self.recording: Recording | None = None
        self._always_copied: set[int] = set()
        self._begin(given)

    def _begin(self, given: Sequence[Tensor]) -> None:
        self.recording = None
        self.buffers = WrittenBuffers(self._tensors, self._writing)
        self._places = [tensor.data_ptr() for tensor in self._model]
        # Constants of a method are the same tensors each time, and may be as large as the model: they are not copied.
        self._standing = {
            at: (tensor, tensor.data_ptr())
            for at, tensor in enumerate(given)
            if at >= self._of_batch and tensor.dim() and at not in self._always_copied
        }
        self._inputs: list[Tensor] = []

    def begin(self, given: Sequence[Tensor]) -> bool:
        """Take this pass for the first one; say whether the model is where it was, and only other things moved."""
        self._always_copied.update(self._moved(given))
        same = self._places == [tensor.data_ptr() for tensor in self._model]
        self._begin(given)
        return same

    def stands(self, given: Sequence[Tensor]) -> bool:
        """Say whether what is read where it is is there still; before the recording that is the model alone."""
        if self._places != [tensor.data_ptr() for tensor in self._model]:
            return False
        return self.recording is None or not self._moved(given)

    def _moved(self, given: Sequence[Tensor]) -> list[int]:
        held = self._standing.items()
        return [at for at, (one, place) in held if given[at] is not one or one.data_ptr() != place]

    def place(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what a recording reads: tensors of its own for all that may be another one in the next pass."""
        for at in self._moved(given):
            del self._standing[at]
        own = enumerate(given)
        self._inputs = [one if at in self._standing else torch.empty_like(one) for at, one in own]
        self._fill(given)
        return self._inputs

    def _fill(self, given: Sequence[Tensor]) -> None:
        pairs = [
            (own, one)
            for at, (own, one) in enumerate(zip(self._inputs, given, strict=True))
            if at not in self._standing
        ]
        torch._foreach_copy_([own for own, _ in pairs], [one for _, one in pairs])

    def replay(self, given: Sequence[Tensor], lent: Collection[str]) -> Sequence[Tensor | None]:
        """Return what the pass computes of these inputs."""
        assert self.recording is not None
        self._fill(given)
        self.recording.replay()
        torch.autograd.graph.increment_version([*self.buffers.changed.values()])
        keep = [name in lent for name in self._names]
        return copies(self.recording.outputs, keep)

    def named(self, flat: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """Return results by name."""
        return dict(zip(self._names, flat, strict=True))


class WrittenBuffers:
    """The buffers of a model that a pass reads, and which of them it writes to: `changed`, by name.

    Some operators say that they write, and others, such as the statistics of a BatchNorm, are found by what changed.
    """

    def __init__(self, tensors: Mapping[str, Tensor], writing: Iterable[str]) -> None:
        self._every = {n: t for n, t in tensors.items() if not isinstance(t, nn.Parameter)}
        self.changed = {name: tensors[name] for name in writing}
        self._found = False

    def clones(self) -> dict[str, Tensor]:
        """Return the values of now: of all of them at first, of those that change once these were found."""
        wanted = self.changed if self._found else self._every | self.changed
        return {name: tensor.detach().clone() for name, tensor in wanted.items()}

    def find_changed(self, before: Mapping[str, Tensor]) -> None:
        """Find what the pass changed since `before`, which `clones` gave."""
        for name, tensor in self._every.items():
            if not torch.equal(_comparable(tensor), _comparable(before[name])):
                self.changed[name] = tensor
        self._found = True

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Give what changes the values back that `clones` gave."""
        with torch.no_grad():
            for name, tensor in self.changed.items():
                tensor.copy_(values[name])


def _comparable(tensor: Tensor) -> Tensor:
    """Return a tensor whose nan are equal; torch compares no numbers of 8 bits, but their bytes."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor.nan_to_num()


def copies(
    results: Sequence[Tensor | None], lent: Sequence[bool] | None = None
) -> Sequence[Tensor | None]:
    """Return results that the next pass does not write over, but for those that are lent."""
    found = list(results)
    own: list[tuple[int, Tensor]] = []
    for at, one in enumerate(results):
        if one is None or (lent is not None and lent[at]):
            continue
        if one.layout != torch.strided:
            found[at] = one.clone()
        else:
            own.append((at, one))
    copied = [torch.empty_like(one) for _, one in own]
    if copied:
        torch._foreach_copy_(copied, [one for _, one in own])
    for (at, _), one in zip(own, copied, strict=True):
        found[at] = one
    return found


def tensors_of(graph: StepGraph) -> dict[str, Tensor]:
    """Return the tensors that a graph reads besides its inputs, by their names in it."""
    found: dict[str, Tensor] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        value = getattr(graph.get_submodule(path), name)
        if isinstance(value, Tensor):
            found[str(node.target)] = value
    return found


def form_of(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def launch_settings() -> Hashable:
    """Return the settings of torch that a kernel is chosen by when it is launched."""
    cuda = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    return (
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
        str(cuda.preferred_blas_library()),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cudnn.fp32_precision,
        cudnn.conv.fp32_precision,
        cudnn.rnn.fp32_precision,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
