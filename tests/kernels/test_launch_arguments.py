"""The norms' launches as Triton makes them for sm_90, but for the device: arguments bound, kernels compiled, none run.

The interpreter takes kernels in another way, and what is compiled elsewhere in these tests has arguments by hand.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainc.kernels.library import occupancy
from trainc.kernels.library.launch import compiled
from trainc.kernels.library.occupancy import Fit, Processor

pytestmark = [pytest.mark.offline, pytest.mark.filterwarnings("ignore")]

REGISTERS = 132


class Launcher:
    """Stands in for the launch on a device."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> None:
        pass


class Driver:
    """A device of compute capability 9.0 that is not there; its binaries all take the same registers."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *arguments: (0, 0, REGISTERS, 0, 1024),
        unload_module=lambda *arguments: None,
        get_device_properties=lambda device: {
            "max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
        },
    )  # fmt: skip

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", Driver())


# Shape and dtypes of x and of the parameters.
LAUNCHED = {
    "split": ((2, 300, 1024), torch.bfloat16, torch.bfloat16),
    "whole": ((300, 3, 1024), torch.bfloat16, torch.float32),
    "rows": ((400, 1000), torch.float32, torch.float32),
    "wide": ((2, 3, 16400), torch.bfloat16, torch.bfloat16),
    "wide rows": ((3, 16384), torch.float16, torch.float16),
}


@pytest.mark.parametrize("form", LAUNCHED)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_what_is_launched_compiles(
    form: str, rms: bool, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.kernels.norm import triton_norm_launch as launcher
    from trainc.kernels.norm import triton_wide_norm as wide

    asked: list[Fit] = []

    def fitted(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Fit:
        takes = occupancy.resources(compiled(kernel, *arguments, **options))
        assert (takes.registers, takes.spilled) == (REGISTERS, 0)
        asked.append(Fit(occupancy.resident(takes, options["num_warps"], Processor())))
        return asked[-1]

    for module in (launcher, wide):
        monkeypatch.setattr(module, "fitted", fitted)
    shape, dtype, affine = LAUNCHED[form]
    x, width = torch.empty(shape, dtype=dtype), shape[-1]
    parameters = [
        torch.empty(width, dtype=affine),
        None if rms else torch.empty(width, dtype=affine),
    ]
    y, mean, rstd = launcher.forward(
        x,
        [width],
        parameters[0],
        parameters[1],
        1e-5,
        dtype,
        rms,
        casting="llama" if rms else "none",
    )
    _, *gradients, norms = launcher.backward(
        y, x, [width], rstd if rms else mean, rstd, parameters, [True, True, not rms], rms, dtotal=x
    )
    assert asked
    assert all(fit.programs >= 1 for fit in asked)
    assert gradients[0].dtype == affine
    assert norms.shape == (shape[0], 1 if rms else 2)
