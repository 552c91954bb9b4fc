"""The hardware of a run: which device `auto` is, what is refused, and that batches and settings follow."""

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.runtime.device.choice import NoDevice, choose
from trainc.runtime.device.hardware import Hardware, NoPrecision, after_step, find_hardware

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let torch say that the machine has these devices beside its CPU."""

    def has(*devices: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in devices)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in devices)
        monkeypatch.setattr(platform, "processor", lambda: "arm")

    return has


@pytest.mark.parametrize(
    ("devices", "device", "about"),
    [
        ((), "cpu", "auto: no CUDA and no MPS here"),
        (("mps",), "mps", "arm, auto: no CUDA here"),
        (("cuda",), "cuda", "NVIDIA H200, auto"),
        (("cuda", "mps"), "cuda", "NVIDIA H200, auto"),
    ],
)
def test_auto_is_cuda_then_mps_then_the_cpu(
    machine: Any, devices: tuple[str, ...], device: str, about: str
) -> None:
    machine(*devices)
    found = choose("auto")
    assert (found.device.type, found.about) == (device, about)


def test_a_device_that_is_asked_for_is_taken_though_another_is_there(machine: Any) -> None:
    machine("cuda", "mps")
    assert [choose(one).device.type for one in ("cpu", "mps", "cuda")] == ["cpu", "mps", "cuda"]


def test_a_device_that_is_not_there_is_an_error_that_says_what_there_is(machine: Any) -> None:
    machine("mps")
    with pytest.raises(
        NoDevice, match=r"finds no CUDA device here\. There is `mps` \(arm\), `cpu`"
    ):
        choose("cuda")
    with pytest.raises(
        NoDevice, match="`device = meta`: a run trains on cuda, mps, cpu, or `auto`"
    ):
        choose("meta")


def test_a_precision_is_refused_where_torch_cannot_compute_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_hardware("cpu", "fp16", None).precision == "fp16"

    class Off(torch.autocast):
        """An autocast as torch has it where a device cannot: it leaves products as they are."""

        def __init__(self, kind: str, dtype: torch.dtype) -> None:
            super().__init__(kind, dtype=dtype, enabled=False)

    monkeypatch.setattr(torch, "autocast", Off)
    with pytest.raises(
        NoPrecision, match=r"`precision = fp16`: .*on cpu .*Write `precision = bf16`"
    ):
        find_hardware("cpu", "fp16", None)
    with pytest.raises(
        NoPrecision, match=r"product in torch.float32\)\. Write `precision = float32`"
    ):
        find_hardware("cpu", "bf16", None)


class Recorded(torch.Tensor):
    """A tensor on the CPU that keeps what is asked of it."""

    asked: list[tuple[Any, ...]]

    def pin_memory(self, device: Any = None) -> Tensor:
        self.asked.append(("pin",))
        return self

    def to(self, *where: Any, **how: Any) -> Tensor:
        self.asked.append((where, how))
        return self


def test_batches_go_to_cuda_through_pinned_memory_without_waiting() -> None:
    cuda = torch.device("cuda")
    x, y = (torch.zeros(2).as_subclass(Recorded) for _ in range(2))
    x.asked, y.asked = [], []
    inputs, targets = Hardware(cuda, "float32").place(({"x": x, "n": 3}, y))
    assert inputs["x"] is x
    assert inputs["n"] == 3
    assert targets is y
    assert x.asked == y.asked == [("pin",), ((cuda,), {"non_blocking": True})]


def test_batches_that_are_on_the_device_stay_the_same_tensors() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    (moved,), targets = Hardware(CPU, "bf16").place(((x,), y))
    assert moved is x
    assert targets is y


@pytest.fixture
def products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("products")
def test_the_precision_of_products_is_restored_on_every_way_out() -> None:
    with Hardware(CPU, "float32").products():
        assert torch.get_float32_matmul_precision() == "high"
    seen = []

    def fails() -> None:
        with Hardware(CPU, "float32", "medium").products():
            seen.append(torch.get_float32_matmul_precision())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == "high"


def test_a_scaler_goes_on_after_a_step_without_gradients() -> None:
    scaler = Hardware(CPU, "fp16").scaler()
    assert scaler is not None
    after_step(scaler)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    weight.grad = None
    scaler.unscale_(optimizer)
    after_step(scaler)
    scaler.unscale_(optimizer)  # an error where the scaler had not begun another step
    after_step(scaler)
    scaler.scale(weight.sum() * torch.inf).backward()
    scaler.unscale_(optimizer)
    after_step(scaler)
    assert scaler.get_scale() == 32768.0
