"""A stand-in for Triton's CUDA driver: kernels compile for a GPU that is not there, and launches do nothing.

What a launch costs the host is real but for the driver's own call, and so is what a compiled kernel says of itself.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

# By compute capability: processors, shared memory of one, and the most a program may have.
PROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
MOST_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""Of a processor."""
RESERVED = 1 << 10
"""Bytes of shared memory that the system takes of a program's."""


def install(architecture: int) -> None:
    """Make Triton believe that this process has one such GPU, whose tensors are those of the CPU."""
    from triton.runtime import driver

    driver.set_active(_Driver(architecture))


def programs_a_processor(registers: int, shared: int, warps: int, architecture: int) -> int:
    """How many programs of a kernel a processor holds at once: registers come in eights a thread."""
    held = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    room = SHARED[architecture] // (shared + RESERVED)
    return min(held, room, WARPS // warps, PROGRAMS)


class _Utils:
    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Return handles of nothing, registers a thread, words it spills, and threads a program may have."""
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(kernel)
            done = subprocess.run(
                [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
            )
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
        if found is None:
            raise RuntimeError(f"the report on {name} is not understood: {done.stdout}")
        registers, stack, local = map(int, found.groups())
        return 0, 0, registers, (stack + local) // 4, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what Triton asks of a device."""
        return {
            "max_shared_mem": MOST_SHARED[self.architecture], "max_num_regs": REGISTERS, "warpSize": 32,
            "multiprocessor_count": PROCESSORS[self.architecture], "sm_clock_rate": 1, "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }  # fmt: skip

    def unload_module(self, *module: object) -> None:
        """Nothing was loaded."""


class _Launcher:
    def __init__(self, *kernel: object, **options: object) -> None:
        pass

    def __call__(self, *arguments: object, **options: object) -> None:
        pass


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils, self.target = _Utils(architecture), GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name
