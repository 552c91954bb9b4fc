"""What one checkout's operators would launch on a GPU that is not there: run in a process of its own, for one target.

The kernels for CUDA are registered for CPU tensors, under a driver that launches nothing. So all of an operator's
Python runs as it would, at any size: results are never written, and large tensors are addresses without memory.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Json
from benchmarks.offline import fake_driver
from benchmarks.offline.machine_code import disassembled, resources

# How a process begins that takes trainc from one checkout and these benchmarks from another: by roots, target, only.
START = """
import sys
theirs, ours, *rest = sys.argv[1:]
sys.path.insert(0, theirs)
import trainc
sys.path.remove(theirs)
trainc.__path__.insert(0, theirs)
sys.path.insert(0, ours)
from benchmarks.offline.recorder import main
main(theirs, *rest)
"""
# Allocation and views launch nothing.
NO_LAUNCH = ("empty", "new_empty", "detach", "alias", "lift_fresh")
# A tile's elements, for kernels that take several of an entry's numbers or views at once; others are their blocks.
TIMES = {"loss_forward": 2, "loss_backward": 2, "noise": 4, "entries": 4}
UNCOUNTED = (
    "gram", "weight_gradient", "norm_finish", "wide_finish", "run_squares",
    "loss_means", "loss_factors", "adamw_together",
)  # fmt: skip
"""Kernels whose work is not by elements, is of few, or ends within a turn of their loop."""
LOADED = ("loss_forward",)
"""Kernels whose loops do nothing but read 16-bit elements once."""


@dataclass
class Launches:
    """What was launched: Triton's kernels with their grids and options, ATen's by name, and each one's bytes."""

    triton: list[tuple[str, Any, tuple[int, ...], dict[str, Any]]] = field(default_factory=list)
    aten: list[str] = field(default_factory=list)
    bytes: int = 0


class _Counted(TorchDispatchMode):
    def __init__(self, found: Launches) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        given = [one for one in tree_leaves((arguments, options)) if isinstance(one, Tensor)]
        # Schemas say of `to` and `contiguous` that they may be views: whether they are is seen by their memory.
        held = {one.untyped_storage().data_ptr() for one in given}
        views = all(one.untyped_storage().data_ptr() in held for one in made)
        # A copy of the same dtype is how the host's numbers are sent: no kernel's.
        sent = name == "_to_copy" and made[0].dtype == given[0].dtype
        counts = not sent and not name.startswith(NO_LAUNCH)
        if counts and (function._schema.is_mutable or not views):
            self.found.aten.append(name)
            self.found.bytes += _bytes([*given, *made])
        return result


class Recorder:
    """Puts itself between operators and Triton, and keeps what is launched while it listens."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.listening: Launches | None = None
        fake_driver.install(architecture)
        self._register_for_cpu()
        self._record_triton()

    def _register_for_cpu(self) -> None:
        """Have every operator's CUDA kernel stand in the place of the CPU's; before any operator is imported."""
        register: Any = import_module("trainc.kernels.library.register")
        for name in ("register", "register_update"):
            original = getattr(register, name)

            def instead(*given: Any, original: Any = original, **options: Any) -> Any:
                cpu, cuda = options["cpu"], self._listened(options["cuda"])
                if "schema" not in options or options["schema"] is None:
                    # The schema is read off the CPU kernel.
                    cuda.__signature__ = import_module("inspect").signature(cpu, eval_str=True)
                return original(*given, **{**options, "cpu": cuda})

            setattr(register, name, instead)
        if hasattr(register, "on_lists"):  # the commit that is compared with has none
            original_lists = register._dispatch.on_lists
            register._dispatch.on_lists = lambda operator, kernels, prepare: original_lists(
                operator, {"cpu": self._listened(kernels["cuda"])}, prepare
            )

    def _listened(self, kernel: Callable[..., Any]) -> Any:
        def run(*arguments: Any) -> Any:
            if self.listening is None:
                return kernel(*arguments)
            with _Counted(self.listening):
                return kernel(*arguments)

        return run

    def _record_triton(self) -> None:
        from triton.runtime.jit import JITFunction

        original = JITFunction.run

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = original(kernel, *arguments, grid=grid, warmup=warmup, **options)
            if self.listening is not None and not warmup:
                given = [one for one in (*arguments, *options.values()) if isinstance(one, Tensor)]
                named = {k: v for k, v in options.items() if k.isupper()}
                self.listening.triton.append((kernel.fn.__name__, compiled, tuple(grid), named))
                self.listening.bytes += _bytes(given)
            return compiled

        JITFunction.run = run

    @contextmanager
    def listen(self) -> Iterator[Launches]:
        """Keep what is launched in this block."""
        self.listening = found = Launches()
        try:
            yield found
        finally:
            self.listening = None


def _bytes(tensors: list[Tensor]) -> int:
    """Each tensor once, whatever it stands in for."""
    return sum({(one.data_ptr(), one.numel()): one.nbytes for one in tensors}.values())


def kernels(found: Launches, architecture: int) -> list[Json]:
    """What is known of each kernel of Triton's that was launched."""
    rows = []
    for name, compiled, grid, options in found.triton:
        compiled._init_handles()
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        rows.append(
            {
                "kernel": name,
                "instructions an element": instructions(name, compiled, options),
                "registers": compiled.n_regs,
                # The driver counts all of a thread's own memory; the assembler knows what of it is spilled.
                "spilled bytes": resources(compiled, architecture).spilled
                if compiled.n_spills
                else 0,
                "programs a processor": fake_driver.programs_a_processor(
                    compiled.n_regs, shared, warps, architecture
                ),
                "programs": math.prod(grid),
                "warps": warps,
                "shared bytes": shared,
            }
        )
    return rows


def instructions(name: str, compiled: Any, options: dict[str, Any]) -> float | None:
    """Instructions an element of a turn of the main loop, or of the whole kernel where there is none."""
    if name in UNCOUNTED:
        return None
    blocks = [int(v) for k, v in options.items() if k.startswith("BLOCK")]
    lanes = [8 * int(options["V"])] if "V" in options else []
    elements = math.prod(blocks or lanes or [0]) * TIMES.get(name, 1)
    if not elements:
        return None
    code = disassembled(compiled)
    counted = code.main_loop or code.instructions
    wide = sum(one.name.startswith("LDG") and "128" in one.name for one in counted)
    if name in LOADED and wide:  # what a turn loads says how often the assembler has unrolled it
        elements = wide * 8 * 32 * int(compiled.metadata.num_warps)
    return round(len(counted) * 32 * int(compiled.metadata.num_warps) / elements, 1)


def host_time(work: Callable[[], object], calls: int = 40, rounds: int = 9) -> float:
    """Microseconds of this process for a call; what else the machine does is not counted."""
    for _ in range(5):
        work()
    gc.collect()
    gc.disable()
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(calls):
            work()
        found.append((time.process_time() - begin) / calls)
    gc.enable()
    return round(min(found) * 1e6, 1)


def main(root: str, architecture: str, only: str = "") -> None:
    """Print what the operators of a checkout launch as JSON; the process has taken trainc from there (`START`)."""
    found = Path(str(import_module("trainc.kernels").__file__))
    if Path(root).resolve() not in found.parents:
        raise RuntimeError(f"trainc.kernels is {found}, and not below {root}")
    recorder = Recorder(int(architecture))
    cases = import_module("benchmarks.offline.cases")
    older = Path(root).resolve() != Path(__file__).resolve().parents[2]
    print(json.dumps(cases.measure(recorder, only, older)))
