"""How many programs of a kernel a processor holds at once, by what the compiled kernel takes.

A kernel's registers differ from one version of Triton to the next, and by a few of them a processor holds a program
fewer. So launches ask the kernel that was compiled, once for each device and each class of shapes, and where a few
registers less a thread buy another program, the kernel is compiled with that limit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.library.grid import cdiv
from trainc.kernels.library.launch import compiled

WARP = 32
# Registers come in groups of 8 a thread; each program takes 1 KB of shared memory beside what it asks for.
GROUP, RESERVED = 8, 1024
# Of its registers, a kernel gives up a fifth at most for another program a processor.
GIVEN_UP = 1 / 5


@dataclass(frozen=True, slots=True)
class Resources:
    """What a program takes: registers a thread, bytes of shared memory, words a thread that registers do not hold."""

    registers: int
    shared: int = 0
    spilled: int = 0


@dataclass(frozen=True)
class Processor:
    """What a processor has for the programs it runs: registers, bytes of shared memory, warps, programs.

    The defaults are an H100's and an H200's.
    """

    registers: int = 65536
    shared: int = 233472
    warps: int = 64
    programs: int = 32


@dataclass(frozen=True, slots=True)
class Fit:
    """Programs a processor holds, and the limit on registers under which it does, if one is needed."""

    programs: int = 1
    limit: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What to launch with."""
        return {} if self.limit is None else {"maxnreg": self.limit}


def processor(device: torch.device) -> Processor:
    """The processors of a CUDA device."""
    has = torch.cuda.get_device_properties(device)
    warps = has.max_threads_per_multi_processor // WARP
    # 32 programs where 64 warps fit; 16 or 24 on devices with fewer.
    registers = getattr(has, "regs_per_multiprocessor", Processor.registers)
    return Processor(registers, has.shared_memory_per_multiprocessor, warps, warps // 2)


def resident(takes: Resources, warps: int, has: Processor) -> int:
    """How many programs of so many warps run on a processor at once, at least one."""
    thread = cdiv(max(takes.registers, 1), GROUP) * GROUP
    by_registers = has.registers // (thread * warps * WARP)
    by_shared = has.shared // (takes.shared + RESERVED)
    return max(1, min(by_registers, by_shared, has.warps // warps, has.programs))


def limit_for_one_more(takes: Resources, warps: int, has: Processor) -> int | None:
    """Registers a thread with which another program fits a processor; None where that takes more than `GIVEN_UP`."""
    limit = has.registers // ((resident(takes, warps, has) + 1) * warps * WARP) // GROUP * GROUP
    fits = resident(Resources(max(limit, 1), takes.shared), warps, has) > resident(
        takes, warps, has
    )
    return limit if fits and limit >= (1 - GIVEN_UP) * takes.registers else None


def fit(takes: Resources, limited: Any, warps: int, has: Processor) -> Fit:
    """The programs a processor holds; `limited(limit)` are the resources of the kernel compiled with a limit."""
    limit = limit_for_one_more(takes, warps, has)
    if limit is not None:
        less = limited(limit)
        if less.spilled <= takes.spilled and resident(less, warps, has) > resident(
            takes, warps, has
        ):
            return Fit(resident(less, warps, has), limit)
    return Fit(resident(takes, warps, has))


_FITS: dict[tuple[Any, ...], Fit] = {}


def fitted(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Fit:
    """The fit of a kernel that is about to be launched with these arguments and options, on their device.

    Asked once for each device, dtypes, options, and which numbers are multiples of 16, since the code differs by these.
    """
    device = arguments[0].device
    if device.type != "cuda":
        return Fit()
    classes = (one.dtype if isinstance(one, Tensor) else one % 16 == 0 for one in arguments)
    key = (device.index, id(kernel), *classes, *options.items())
    found = _FITS.get(key)
    if found is None:

        def takes(**more: int) -> Resources:
            return resources(compiled(kernel, *arguments, **options, **more))

        has, warps = processor(device), options["num_warps"]
        found = fit(takes(), lambda limit: takes(maxnreg=limit), warps, has)
        _FITS[key] = found
    return found


def resources(kernel: Any) -> Resources:
    """What a program of a compiled and loaded kernel takes."""
    return Resources(kernel.n_regs, kernel.metadata.shared, kernel.n_spills)
