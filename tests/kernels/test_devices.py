"""CUDA kernels run on the device of their tensors: what they ask of torch.cuda.device, with no device at hand."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainc.kernels.library import devices, register


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.cuda.device was asked for, and 'left' when it was left."""
    calls: list[Any] = []

    @contextmanager
    def device(wanted: Any) -> Any:
        calls.append(str(wanted))
        try:
            yield
        finally:
            calls.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    return calls


def placed(device: str, *shape: int) -> Tensor:
    """A tensor that says it is on a device."""
    with FakeTensorMode():
        return torch.empty(shape, device=device)


def test_the_kernel_runs_where_its_tensors_are(asked: list[Any]) -> None:
    seen: list[Any] = []
    kernel = devices.on_device_of_tensors("some", lambda *given: seen.append(list(asked)))
    kernel(None, 3, placed("cuda:1", 2))
    assert asked == ["cuda:1", "left"]
    assert seen == [["cuda:1"]]


def test_numbers_and_tensors_elsewhere_do_not_decide(asked: list[Any]) -> None:
    kernel = devices.on_device_of_tensors("some", lambda *given: len(given))
    assert kernel(placed("cpu", 4), placed("cuda:0"), [placed("cuda:1", 2)]) == 3
    assert kernel(placed("cpu", 4), placed("cuda:1")) == 2  # all it has
    assert asked == ["cuda:1", "left"] * 2


def test_an_error_leaves_the_device_as_it_was(asked: list[Any]) -> None:
    def fails(*given: Any) -> None:
        raise RuntimeError("no launch")

    with pytest.raises(RuntimeError, match="no launch"):
        devices.on_device_of_tensors("some", fails)(placed("cuda:1", 2))
    assert asked == ["cuda:1", "left"]


def test_tensors_on_several_devices_are_refused_by_name(asked: list[Any]) -> None:
    kernel = devices.on_device_of_tensors("some", lambda *given: None)
    with pytest.raises(
        RuntimeError, match="trainc::some are on cuda:0 and cuda:1: move them to one"
    ):
        kernel([placed("cuda:0", 2), placed("cuda:1", 2)])
    assert asked == []


@pytest.mark.parametrize("updates", [False, True], ids=["register", "register_update"])
def test_every_registration_gives_its_cuda_kernel_the_guard(
    updates: bool, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(register, "_define", lambda *_: None)
    for name in ("add_kernels", "add_update_kernels"):
        monkeypatch.setattr(register._dispatch, name, lambda *args: given.append(args[3]))

    def cpu(x: Tensor) -> Tensor:
        return x

    add = register.register_update if updates else register.register
    add("some", cpu=cpu, cuda=lambda x: x.device, fake=cpu)
    (kernel,) = given
    assert str(kernel(placed("cuda:3", 2))) == "cuda:3"
    assert asked == ["cuda:3", "left"]


def test_no_operator_adds_a_cuda_kernel_past_the_registration() -> None:
    rooms = Path(register.__file__).parents[1]
    sources = [file for file in rooms.rglob("*.py") if file.parent.name != "library"]
    assert sources
    assert not [file for file in sources if '"CUDA"' in file.read_text()]


@pytest.mark.parametrize(("hip", "runs"), [(None, "cuda"), ("6.4", "cpu")])
def test_the_gpus_of_amd_run_no_triton_kernels(
    hip: str | None, runs: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = devices.cuda_kernel("some", lambda *given: "cpu", lambda *given: "cuda")
    assert kernel(placed("cuda:1", 2)) == runs
    assert asked == ["cuda:1", "left"]
