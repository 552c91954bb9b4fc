"""Operators of lists that are called past a dispatch: when they are, and what is kept between calls."""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from trainc.kernels.library import private_dispatch, public_dispatch, register

COUNT = private_dispatch.FEW + 2


class Calls:
    """An operator of lists and its kernel, which say which of them was called; the kernel counts what it keeps."""

    def __init__(self, dispatch: Any = private_dispatch, prepare: Any = lambda one: one) -> None:
        self.made: list[str] = []
        self.call = dispatch.on_lists(self.operator, {"cpu": self.kernel}, prepare)

    def operator(self, *lists: Sequence[Tensor]) -> int:
        self.made.append("operator")
        return sum(map(len, lists))

    def kernel(self, left: Sequence[Tensor], right: Sequence[Tensor], kept: dict[str, Any]) -> int:
        kept["calls"] = kept.get("calls", 0) + 1
        self.made.append(f"kernel {kept['calls']}")
        return len(left) + len(right)


def parts() -> list[Tensor]:
    return list(torch.randn(COUNT * 6).split(6))


def test_lists_that_are_the_same_are_known_again() -> None:
    calls, tensors, deltas = Calls(), parts(), parts()
    for _ in range(3):
        assert calls.call(tensors, deltas) == 2 * COUNT
        tensors = [one.detach() for one in tensors]  # others, of the same memory
    assert calls.made == ["kernel 1", "kernel 2", "kernel 3"]
    calls.call(tensors, [])
    calls.call(tensors[:-1], tensors[-1:])
    assert calls.made[3:] == ["kernel 1", "kernel 1"]
    for _ in range(2):  # one tensor twice is not looked for
        calls.call(tensors, tensors)
    assert calls.made[5:] == ["kernel 1", "kernel 1"]


CHANGES: dict[str, Any] = {
    "shorter": lambda one: one[:5],
    "of another dtype": lambda one: one.view(torch.int32),
    "of another shape": lambda one: one.view(2, 3),
    "turned": lambda one: one.as_strided((2, 3), (1, 2)),
    "strided": lambda one: one.as_strided((6,), (0,)),
    "moved": lambda one: one + 1,
    "a parameter": torch.nn.Parameter,
    "negated": torch._neg_view,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_lists_of_others_are_new(change: Any) -> None:
    calls, tensors = Calls(), parts()
    for _ in range(2):
        calls.call(tensors, [])
    calls.call([tensors[0], change(tensors[1]), *tensors[2:]], [])
    assert calls.made == ["kernel 1", "kernel 2", "kernel 1"]


def test_a_tensor_that_is_changed_where_it_stands_is_another() -> None:
    calls, tensors = Calls(), parts()
    tensors[2] = torch.nn.Parameter(tensors[2])
    calls.call(tensors, [])
    tensors[2].data = tensors[2].data[:3]
    calls.call(tensors, [])
    tensors[3].resize_(2)
    calls.call(tensors, [])
    assert calls.made == ["kernel 1"] * 3


class Functions(TorchFunctionMode):
    pass


class Subclass(Tensor):
    pass


def test_whoever_looks_on_sees_the_operator() -> None:
    calls, tensors = Calls(), parts()
    mode: Any
    for mode in (Functions(), FlopCounterMode(display=False), FakeTensorMode()):
        with mode:
            calls.call(tensors, [])
    calls.call([tensors[0].as_subclass(Subclass), *tensors[1:]], [])
    with FakeTensorMode():
        fake = parts()
    calls.call(fake, [])
    calls.call([one.to("meta") for one in tensors], [])
    torch.func.vmap(lambda x: x * calls.call(tensors, []))(torch.ones(2))
    make_fx(lambda x: x * calls.call(tensors, []))(torch.ones(2))
    torch.compile(lambda x: x * calls.call(tensors, []), backend="eager")(torch.ones(2))
    assert set(calls.made) == {"operator"}
    assert len(calls.made) >= 9


def test_short_lists_cost_no_more_than_a_dispatch() -> None:
    calls, tensors = Calls(), parts()
    calls.call(tensors[: private_dispatch.FEW], [])
    assert calls.made == ["operator"]


def test_lists_that_are_prepared_go_to_the_operator_as_they_are_then() -> None:
    def doubled(given: Sequence[Tensor]) -> Sequence[Tensor]:
        return [*given, *given] if given and given[0].dim() == 2 else given

    for dispatch in (private_dispatch, public_dispatch):
        calls = Calls(dispatch, doubled)
        assert calls.call([one.view(2, 3) for one in parts()], []) == 2 * COUNT
        assert calls.made == ["operator"]
        assert calls.call(parts(), parts()) == 2 * COUNT


def test_no_more_than_a_few_lists_are_remembered_and_no_tensors() -> None:
    calls, tensors = Calls(), parts()
    for length in range(1, private_dispatch.MOST + 1):
        calls.call(tensors, [torch.zeros(1)] * length)  # keeps its address only while it lives
        calls.call(tensors, [])
    assert calls.made[-1] == f"kernel {private_dispatch.MOST}"  # used last: it stays
    held = parts()
    calls.call(held, [])
    gone = weakref.ref(held[3])
    del held
    assert gone() is None
    for _ in range(private_dispatch.MOST):
        calls.call(parts_held := parts(), [])
        tensors.append(parts_held[0])
    calls.call(tensors[:COUNT], [])
    assert calls.made[-1] == "kernel 1"


def test_the_kernel_runs_on_the_device_of_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def device(number: int) -> Any:
        asked.append(number)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    calls, tensors = Calls(), parts()
    for number in (1, 1):
        with monkeypatch.context() as there:
            there.setattr(Tensor, "get_device", lambda self, number=number: number)
            calls.call(tensors, [])
    numbers = iter(range(100))
    with monkeypatch.context() as apart:
        apart.setattr(Tensor, "get_device", lambda self: next(numbers))
        calls.call(
            [*tensors[1:], *tensors[:1]], []
        )  # on several, which the operator refuses by name
    assert asked == [1, 1]
    assert calls.made == ["kernel 1", "kernel 2", "operator"]


@pytest.mark.parametrize(("hip", "kernels"), [(None, ["cuda"]), ("6.4", [])])
def test_the_gpus_of_amd_have_no_kernel_of_lists(
    hip: str | None, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(register._dispatch, "on_lists", lambda operator, given, prepare: [*given])
    assert register.on_lists(None, cuda=len, prepare=list) == kernels
