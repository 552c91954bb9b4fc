"""The operators and sizes of the offline report; imported where a recorder stands between operators and Triton."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks import operators, updates
from benchmarks.measure import Json
from benchmarks.offline.fake_driver import PROCESSORS, SHARED
from benchmarks.offline.recorder import Launches, Recorder, host_time, kernels
from benchmarks.operators import Problem, Size, outputs

BF16, FP32 = torch.bfloat16, torch.float32
Build = Callable[[Size, torch.dtype, str], Problem]
COPY = 4.3e12
"""Bytes a second that an H200 copies, assumed."""


class Unwritten(operators.Make):
    """Tensors that nobody reads: memory that is never touched costs nothing."""

    def normal(self, *shape: int, grad: bool = True) -> Tensor:
        """Addresses."""
        return torch.empty(shape, dtype=self.dtype).requires_grad_(grad)


def norm(rms: bool, add: bool) -> Build:
    """A norm with a probe."""
    return operators.norm(rms=rms, add=add, probed=True)


Case = tuple[str, Build, tuple[Size, ...], torch.dtype]
SMALL = {
    "multi_norm": Size(20, 8, 8), "sparse_adamw_": Size(1, 64, 768), "sparse_adamw_, a list": Size(20, 8, 16),
}  # fmt: skip
"""Sizes at which a call is the host's time, of other numbers of tensors than there are examples."""
CASES: tuple[Case, ...] = (
    ("layer_norm", norm(False, False), (
        Size(8, 512, 768), Size(64, 64, 4096), Size(8, 2048, 4096), Size(256, 8, 4096), Size(16384, 1, 1024),
        Size(1, 4096, 4096), Size(8, 2048, 5120), Size(8, 1024, 16384),
    ), BF16),
    ("layer_norm", norm(False, False), (Size(8, 2048, 4096),), FP32),
    ("rms_norm", norm(True, False), (
        Size(8, 512, 768), Size(8, 2048, 3584), Size(8, 2048, 4096), Size(256, 8, 4096), Size(16384, 1, 1024),
    ), BF16),
    ("add_layer_norm", norm(False, True), (Size(8, 512, 768), Size(8, 2048, 4096)), BF16),
    ("add_rms_norm", norm(True, True), (Size(8, 512, 768), Size(8, 2048, 4096)), BF16),
    *((f"loss, {kind}", operators.loss(kind), (Size(1, 2048, 32768), Size(1, 2048, 50257)), BF16)
      for kind in ("mse", "kl")),
    *((f"noisy_add, {share}", operators.noisy(add=True, share=share), (Size(8, 512, 4096),), BF16)
      for share in ("token", "none", "none_fast")),
    ("multiplicative_noise, token", operators.noisy(add=False, share="token"), (Size(8, 512, 4096),), BF16),
    ("linear", operators.linear, (Size(8, 512, 1024), Size(64, 64, 768)), BF16),
    ("embedding", operators.embedding, (Size(8, 512, 1024),), BF16),
    ("ghost_batch_norm", operators.batch_norm, (Size(64, 196, 64),), BF16),
    ("multi_norm", updates.multi_norm, (Size(20, 1024, 1024),), BF16),
    ("sparse_adamw_", updates.sparse_adamw, (Size(1, 1024, 1024),), BF16),
    ("sparse_adamw_, a list", updates.sparse_adamw, (Size(20, 1024, 1024),), BF16),
    ("masked_update_", updates.masked_update, (Size(1, 1024, 1024),), BF16),
)  # fmt: skip
NEWER = ("noisy_add, none_fast", "sparse_adamw_, a list")
"""What the earlier commit has not."""
FEWER = 1
"""Sizes of a case for the targets that are not the first one's."""
MODELS = {"124M": (12, 768), "1.3B": (24, 2048), "7B": (32, 4096)}
"""Layers and width of a language model whose tensors are measured in one call."""


def measure(recorder: Recorder, only: str, older: bool) -> Json:
    """Return launches of the cases that begin with `only`, and for sm_90 what they cost the host."""
    _stand_in(recorder.architecture)
    cases = [case for case in CASES if not (older and case[0] in NEWER)]
    rows = [
        row
        for name, build, sizes, dtype in cases
        for size in (sizes if recorder.architecture == 90 else sizes[:FEWER])
        if f"{name} {size.examples}x{size.rows}x{size.width}".startswith(only)
        for row in _case(recorder, name, build, size, dtype)
    ]
    found: Json = {"launches": rows}
    if recorder.architecture == 90:
        found["host"] = _host([case for case in cases if case[0].startswith(only)])
    if recorder.architecture == 90 and not only:
        found["tables"] = [_tables(*one) for one in MODELS.items()]
    return found


def _stand_in(architecture: int) -> None:
    """Have operators see the device's processors, though their tensors are the CPU's."""
    for module in (operators, updates):
        setattr(module, "Make", Unwritten)  # noqa: B010
    for name in ("norm.triton_norm_launch", "norm.triton_wide_norm", "layer.triton_linear_launch"):
        import_module(f"trainc.kernels.{name}")  # the first call would, after this
    instead: dict[str, Any] = {
        "resident_programs": lambda device, resident: resident * PROCESSORS[architecture],
        "fitted": _Fitted(architecture),
    }
    for module in [one for name, one in sys.modules.items() if name.startswith("trainc.kernels.")]:
        for name in instead.keys() & vars(module).keys():
            setattr(module, name, instead[name])


class _Fitted:
    """As `fitted` of trainc.kernels.library.occupancy, which asks only CUDA devices; commits before it have none."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        occupancy = import_module("trainc.kernels.library.occupancy")
        classes = (one.dtype if isinstance(one, Tensor) else one % 16 == 0 for one in arguments)
        key = (id(kernel), *classes, *options.items())
        if key not in self.known:

            def takes(**more: int) -> Any:
                return occupancy.resources(
                    occupancy.compiled(kernel, *arguments, **options, **more)
                )

            has = occupancy.Processor(shared=SHARED[self.architecture])
            warps = options["num_warps"]
            self.known[key] = occupancy.fit(takes(), lambda limit: takes(maxnreg=limit), warps, has)
        return self.known[key]


def _case(
    recorder: Recorder, name: str, build: Build, size: Size, dtype: torch.dtype
) -> list[Json]:
    """Return forward's launches and backward's."""
    problem = build(size, dtype, "cpu")
    with recorder.listen() as forward:
        ends = _ends(problem)
    phases = {"forward": forward}
    if leaves := problem.leaves():
        slopes = [torch.empty_like(one) for one in ends]
        with recorder.listen() as backward:
            torch.autograd.grad(ends, leaves, slopes, allow_unused=True)
        phases["backward"] = backward
    about = {
        "operator": name, "size": [size.examples, size.rows, size.width], "dtype": str(dtype)[6:],
        "target": f"sm_{recorder.architecture}",
    }  # fmt: skip
    return [
        {**about, "phase": phase, **_told(found, recorder.architecture)}
        for phase, found in phases.items()
    ]


def _ends(problem: Problem) -> list[Tensor]:
    found = outputs(problem.ours, problem.arguments)
    return [one for one in found if one.requires_grad]


def _told(found: Launches, architecture: int) -> Json:
    return {
        "launches": len(found.triton) + len(found.aten),
        "aten": found.aten,
        "bytes": found.bytes,
        "kernels": kernels(found, architecture),
    }


def _host(cases: Sequence[Case]) -> list[Json]:
    """What calls cost the host, at sizes at which ATen's own work is nothing."""
    found: dict[str, Json] = {}
    for name, build, sizes, dtype in cases:
        if name not in found:
            small = SMALL.get(name, Size(4, 16, min(768, sizes[0].width)))
            found[name] = {"operator": name, "size": [small.examples, small.rows, small.width]}
            found[name] |= _host_times(build(small, dtype, "cpu"))
    return list(found.values())


def _host_times(problem: Problem) -> Json:
    found: Json = {"forward": host_time(lambda: outputs(problem.ours, problem.arguments))}
    if leaves := problem.leaves():
        ends = _ends(problem)
        slopes = [torch.zeros_like(one) for one in ends]
        found["backward"] = host_time(
            lambda: torch.autograd.grad(ends, leaves, slopes, retain_graph=True, allow_unused=True)
        )
    return found


def _tables(name: str, shape: tuple[int, int]) -> Json:
    """What one multi_norm of a model's tensors costs the host, and would cost a device."""
    import trainc.functional as ours

    layers, width = shape
    sizes = [width * 50_000] + [
        n * width for _ in range(layers) for n in (1, 1, 3 * width, width, 4 * width, 4 * width)
    ]
    memory = torch.empty(max(sizes), dtype=BF16)  # addresses: all tensors lie over each other
    tensors = [memory[:size] for size in sizes]
    spent = host_time(lambda: ours.multi_norm(tensors), calls=3, rounds=5)
    device = sum(sizes) * 2 / COPY * 1e6
    return {"model": name, "tensors": len(sizes), "host us": spent, "device us": round(device, 1)}
