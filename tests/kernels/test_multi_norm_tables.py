"""Tables that multi_norm keeps on the host, whatever became of the tensors, by the interpreter."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.kernels.library import private_dispatch
from trainc.kernels.parameter import multi_norm

pytestmark = pytest.mark.interpreter

COUNT = 9
"""Tensors of a list that is kept."""
SIZE = 49


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks and chunks for small tensors, and no table of another test."""
    module = kernels()
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(module, "ROWS", 1)
    module._kept_groups.cache_clear()
    yield
    module._kept_groups.cache_clear()


def kernels() -> Any:
    from trainc.kernels.parameter import triton_multi_norm

    return triton_multi_norm


def lists() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One memory, and in it tensors and their deltas, in two dtypes of one width."""
    torch.manual_seed(0)
    memory = torch.randn(2 * COUNT * SIZE).bfloat16()
    parts = list(memory.split(SIZE))
    return memory, parts[:COUNT], parts[COUNT:]


def right(tensors: list[Tensor], deltas: list[Tensor]) -> None:
    got = kernels().multi_norm(tensors, deltas)
    want = multi_norm.reference(tensors, deltas or None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def found() -> int:
    hits: int = kernels()._kept_groups.cache_info().hits
    return hits


@pytest.mark.parametrize("paired", [True, False])
def test_a_list_of_tensors_is_written_down_once(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[int] = []
    original = kernels()._listed

    def counted(*given: Any) -> Any:
        listed.append(1)
        return original(*given)

    monkeypatch.setattr(kernels(), "_listed", counted)
    _, tensors, deltas = lists()
    for step in range(3):
        right(tensors, deltas if paired else [])
        for one in (*tensors, *deltas):  # what is kept are addresses, not sums
            one.mul_(0.5).add_(step)
    assert len(listed) == 1
    assert found() == 2


def shorter(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0][:5], *tensors[1:]]


def longer(tensors: list[Tensor]) -> list[Tensor]:
    """The first of them goes on in the memory of the second."""
    return [tensors[0].as_strided((SIZE + 9,), (1,)), *tensors[1:]]


def of_another_dtype(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[0].view(torch.float16), *tensors[1:]]


def turned(tensors: list[Tensor]) -> list[Tensor]:
    """At the same address as many entries of the same dtype, which lie in another order."""
    return [tensors[0].view(7, 7).T, *tensors[1:]]


def strided(tensors: list[Tensor]) -> list[Tensor]:
    """At the same address as many entries of the same dtype, with gaps between them."""
    return [tensors[0].as_strided((SIZE,), (2,)), *tensors[1:]]


def exchanged(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[1], tensors[0], *tensors[2:]]


def moved(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors[:3], tensors[3] + 1, *tensors[4:]]


def unaligned(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors[:3], tensors[3][1:], *tensors[4:]]


def fewer(tensors: list[Tensor]) -> list[Tensor]:
    return tensors[:-1]


CHANGES = [shorter, longer, of_another_dtype, turned, strided, exchanged, moved, unaligned, fewer]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=[one.__name__ for one in CHANGES])
def test_tensors_that_are_others_are_read_as_they_are(change: Any, paired: bool) -> None:
    _, tensors, deltas = lists()
    right(tensors, deltas if paired else [])
    sized = [torch.randn(one.shape) for one in change(tensors)]
    right(change(tensors), sized if paired else [])
    right(tensors, deltas if paired else [])
    assert found() >= 1


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=[one.__name__ for one in CHANGES])
def test_calls_that_pass_a_dispatch_read_tensors_as_they_are(change: Any, paired: bool) -> None:
    read = kernels().multi_norm
    call = private_dispatch.on_lists(read, {"cpu": read}, multi_norm._parts)
    _, tensors, deltas = lists()
    both = [
        (tensors, deltas),
        (change(tensors), [torch.randn(one.shape) for one in change(tensors)]),
    ]
    with torch.no_grad():
        for left, right in (both[0], both[0], both[1], both[0]):
            right = right if paired else []
            got, want = call(left, right), multi_norm.reference(left, right or None)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [None, {}])
def test_a_product_with_what_is_negated_has_its_sign(kept: dict[str, Any] | None) -> None:
    _, tensors, _ = lists()
    negated = [torch._neg_view(one.float()) for one in tensors]
    for _ in range(2):
        got = kernels().multi_norm(tensors, negated, kept)
        torch.testing.assert_close(
            got, multi_norm.reference(tensors, negated), rtol=1e-5, atol=1e-5
        )
    assert not kept


def test_a_new_tensor_at_a_freed_address_is_the_one_that_is_read() -> None:
    memory, tensors, deltas = lists()
    right(tensors, deltas)
    gone = weakref.ref(tensors[4])
    address, tensors[4] = tensors[4].data_ptr(), torch.zeros(SIZE)
    assert gone() is None
    right(tensors, deltas)
    memory[4 * SIZE : 5 * SIZE] = 7
    tensors[4] = memory[4 * SIZE : 5 * SIZE].view(7, 7)
    deltas[4] = deltas[4].view(7, 7)
    assert tensors[4].data_ptr() == address
    right(tensors, deltas)
    assert found() == 1  # it has the address, the size and the dtype of the first one


def test_a_parameter_that_got_other_data_is_read_where_it_is_now() -> None:
    parameters = [torch.nn.Parameter(torch.randn(9)) for _ in range(COUNT)]
    with torch.no_grad():
        right(list(parameters), [])
        parameters[2].data = torch.randn(40)
        parameters[3].data = parameters[3].data[:3]
        right(list(parameters), [])


def test_kept_lists_are_few_and_small_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels(), "launch", lambda *given, **options: None)
    _, tensors, _ = lists()
    most = kernels()._kept_groups.cache_info().maxsize
    assert most <= 32
    for length in range(1, SIZE):
        kernels().multi_norm([one[:length] for one in tensors], [])
        kernels().multi_norm([tensors[0][:length]], [])
    assert kernels()._kept_groups.cache_info().currsize == most
    kernels().multi_norm([one[: SIZE - 1] for one in tensors], [])
    assert found() == 1


def test_what_the_device_does_with_its_table_does_not_reach_the_one_that_is_kept() -> None:
    from trainc.kernels.parameter.triton_tables import Numbers

    numbers = Numbers([3, 1 << 40])
    first = numbers.on(torch.device("cpu"))
    memory = weakref.ref(first)
    first.zero_()  # as the next run of a graph may, in whose memory it was
    assert numbers.on(torch.device("cpu")).tolist() == [3, 1 << 40]
    del first
    assert memory() is None


def test_a_capture_between_two_calls_writes_the_numbers_and_leaves_those_that_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainc.kernels.parameter import triton_tables

    numbers, cuda = triton_tables.Numbers([4, 5]), torch.device("cuda:0")
    sent = numbers.on(torch.device("cpu"))
    with monkeypatch.context() as during:
        during.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        during.setattr(triton_tables, "written", lambda *given: given)
        assert numbers.on(cuda) == ([4, 5], cuda)
        first = triton_tables.Numbers([6])
        assert first.on(cuda) == ([6], cuda)
    assert torch.equal(numbers.on(torch.device("cpu")), sent)
    assert first.on(torch.device("cpu")).tolist() == [6]


def test_a_captured_call_computes_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainc.kernels.parameter import triton_tables

    _, tensors, deltas = lists()
    # The interpreter takes numbers from 2^31 to 2^32 for what they are not; addresses are larger.
    before = kernels().multi_norm(tensors, deltas)
    with monkeypatch.context() as during:
        during.setattr(
            triton_tables.Numbers, "on",
            lambda self, device: triton_tables.written(self.numbers, device),
        )  # fmt: skip
        captured = kernels().multi_norm(tensors, deltas)
    assert torch.equal(captured, before)
    assert torch.equal(kernels().multi_norm(tensors, deltas), before)
    assert found() == 2


def test_algorithms_that_must_be_deterministic_change_nothing() -> None:
    _, tensors, deltas = lists()
    first = kernels().multi_norm(tensors, deltas)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(kernels().multi_norm(tensors, deltas), first)
        kernels()._kept_groups.cache_clear()
        assert torch.equal(kernels().multi_norm(tensors, deltas), first)
        right(tensors, deltas)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_call_that_is_refused_is_refused_again() -> None:
    _, tensors, deltas = lists()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="real, not complex"):
            kernels().multi_norm([*tensors, torch.zeros(3, dtype=torch.complex64)], [])
        with pytest.raises(RuntimeError, match="each of the shape of its tensor"):
            kernels().multi_norm(tensors, [*deltas[1:], deltas[0][1:]])
    right(tensors, deltas)
    with pytest.raises(RuntimeError, match="each of the shape of its tensor"):
        kernels().multi_norm(tensors, [*deltas[1:], deltas[0].view(7, 7)])
