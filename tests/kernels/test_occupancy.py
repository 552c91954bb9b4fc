"""How many programs a processor holds, by numbers of kernels compiled for sm_90 without a device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainc.kernels.library import occupancy
from trainc.kernels.library.occupancy import Fit, Processor, Resources

H100 = Processor()
ON_DEVICE = torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "held"),
    [
        # norm_backward_split by Triton 3.9: LayerNorm of 1024, 2048, 4096 and 8192 columns, with add at 1024.
        (166, 16480, 4, 3), (128, 8228, 4, 4), (128, 16436, 8, 2), (128, 32852, 16, 1), (168, 24672, 4, 3),
        # One register more than 128 is a group of eight more a thread: a program fewer.
        (129, 16436, 8, 1), (120, 16436, 8, 2), (32, 0, 8, 8), (32, 0, 1, 32), (16, 0, 1, 32),
        # Shared memory decides: 228 KB, 1 KB of each program taken by the device.
        (32, 75 * 1024, 4, 3), (32, 76 * 1024, 4, 2), (32, 227 * 1024, 4, 1),
        # A kernel that leaves no room for itself is launched all the same.
        (255, 0, 16, 1),
    ],
)  # fmt: skip
def test_programs_a_processor_holds(registers: int, shared: int, warps: int, held: int) -> None:
    assert occupancy.resident(Resources(registers, shared), warps, H100) == held


def test_a_processor_with_fewer_warps_holds_fewer() -> None:
    small = Processor(shared=100 * 1024, warps=48, programs=24)
    assert occupancy.resident(Resources(32), 8, small) == 6
    assert occupancy.resident(Resources(32), 1, small) == 24
    assert occupancy.resident(Resources(32, 30 * 1024), 8, small) == 3


@pytest.mark.parametrize(
    ("registers", "warps", "limit"),
    [
        # 132 to 128 lets a second program of 8 warps in; 161 would have to give up more than a fifth of its registers.
        (132, 8, 128), (153, 8, 128), (160, 8, 128), (161, 8, None), (128, 8, None),
        (88, 8, 80), (130, 4, 128), (168, 4, None), (140, 4, 128),
    ],
)  # fmt: skip
def test_a_few_registers_less_for_another_program(
    registers: int, warps: int, limit: int | None
) -> None:
    found = occupancy.limit_for_one_more(Resources(registers, 16436), warps, H100)
    assert found == limit
    if limit is not None:
        now, then = (
            occupancy.resident(Resources(r, 16436), warps, H100) for r in (registers, limit)
        )
        assert then == now + 1


def test_no_limit_where_shared_memory_decides() -> None:
    assert occupancy.limit_for_one_more(Resources(132, 120 * 1024), 8, H100) is None


@pytest.mark.parametrize(
    ("less", "fit"),
    [
        (Resources(128, 16436), Fit(2, 128)),
        (Resources(128, 16436, spilled=3), Fit(1)),
        (Resources(136, 16436), Fit(1)),
    ],
    ids=["fits", "spills", "does not fit"],
)
def test_a_limit_is_kept_only_where_it_pays(less: Resources, fit: Fit) -> None:
    asked: list[int] = []

    def limited(limit: int) -> Resources:
        asked.append(limit)
        return less

    assert occupancy.fit(Resources(132, 16436), limited, 8, H100) == fit
    assert asked == [128]
    assert fit.options == ({} if fit.limit is None else {"maxnreg": 128})


def test_a_kernel_is_asked_once_for_each_class_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def compiled(kernel: Any, *arguments: Any, **options: Any) -> Any:
        made.append(options)
        registers = 128 if "maxnreg" in options else 131
        return SimpleNamespace(n_regs=registers, n_spills=0, metadata=SimpleNamespace(shared=16436))

    class OnDevice(torch.Tensor):
        """A tensor that says it is on a device there is not."""

        device = ON_DEVICE

    def tensor(dtype: torch.dtype) -> Any:
        return torch.empty(2, dtype=dtype).as_subclass(OnDevice)

    monkeypatch.setattr(occupancy, "compiled", compiled)
    monkeypatch.setattr(occupancy, "processor", lambda asked: H100 if asked == ON_DEVICE else None)
    monkeypatch.setattr(occupancy, "_FITS", {})
    kernel, options = object(), {"BLOCK_C": 4096, "num_warps": 8}
    half = tensor(torch.bfloat16)
    for width in (4096, 4096, 3584):
        assert occupancy.fitted(kernel, (half, width), options) == Fit(2, 128)
    assert made == [options, {**options, "maxnreg": 128}]
    occupancy.fitted(kernel, (half, 4095), options)
    occupancy.fitted(kernel, (tensor(torch.float32), 4096), options)
    occupancy.fitted(object(), (half, 4096), options)
    assert len(made) == 8
    assert occupancy.fitted(kernel, (torch.empty(2), 4096), options) == Fit()
    assert len(made) == 8


def test_the_processors_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        max_threads_per_multi_processor=1536, regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=102400,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert occupancy.processor(torch.device("cuda")) == Processor(65536, 102400, 48, 24)
