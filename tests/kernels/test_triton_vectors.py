"""The Triton sources of operators over whole parameters, by the interpreter, against the CPU kernels."""

import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainc.kernels.parameter import masked_update, multi_norm, sparse_adamw

pytestmark = pytest.mark.interpreter

SHAPES = [(), (3,), (127,), (5, 7), (0,), (40, 9), (64,)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and chunks even for small tensors."""
    from trainc.kernels.parameter import (
        triton_masked_update,
        triton_multi_norm,
        triton_sparse_adamw,
    )

    monkeypatch.setattr(triton_multi_norm, "BLOCK", 64)
    monkeypatch.setattr(triton_multi_norm, "CHUNK", 128)
    monkeypatch.setattr(triton_multi_norm, "ROWS", 2)
    monkeypatch.setattr(triton_sparse_adamw, "BLOCK", 64)
    monkeypatch.setattr(triton_masked_update, "BLOCK", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("paired", [True, False])
def test_multi_norm(dtype: torch.dtype, paired: bool) -> None:
    from trainc.kernels.parameter import triton_multi_norm

    torch.manual_seed(0)
    tensors, deltas = ([torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(2))
    arguments = (tensors, deltas if paired else [])
    got, want = triton_multi_norm.multi_norm(*arguments), multi_norm.eager(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.dtype == want.dtype


def test_multi_norm_of_mixed_dtypes_odd_addresses_and_broken_entries() -> None:
    from trainc.kernels.parameter import triton_multi_norm

    wide = torch.randn(200)
    tensors = [wide[1:150], torch.randn(9).bfloat16(), torch.randn(5).double(), torch.randn(7, 6).T]
    deltas = [torch.randn(149), torch.randn(9), torch.randn(5), torch.randn(6, 7)]
    tensors[0][3], deltas[0][140], deltas[1][0] = torch.nan, torch.inf, -torch.inf
    got = triton_multi_norm.multi_norm(tensors, deltas)
    want = multi_norm.eager(tensors, deltas)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[:, 3].tolist() == [2, 1, 0, 0]


def test_a_program_finds_its_tensor_among_empty_ones() -> None:
    from trainc.kernels.parameter import triton_multi_norm

    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in (0, 0, 300, 0, 128, 1, 0, 129, 0, 0)]
    got, want = triton_multi_norm.multi_norm(tensors, []), multi_norm.eager(tensors, [])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    nothing = triton_multi_norm.multi_norm(tensors[:2], [])
    assert torch.equal(nothing, torch.zeros(2, 4, dtype=torch.float64))


def test_a_table_does_not_grow_with_the_tensors() -> None:
    from trainc.kernels.parameter import triton_multi_norm

    addresses, size = [512, 1024, 4096], 7 << 30  # 28 GB each, were it there
    chunk = triton_multi_norm.CHUNK
    numbers = triton_multi_norm._listed(addresses, addresses, [size] * 3, [4, 1, 2], chunk)
    assert len(numbers) == 6 * 3 + 1
    assert numbers[9:12] == [4, 1, 2]
    assert numbers[15] == -(-3 * 7 * (1 << 30) // chunk)
    assert numbers[16:] == [0, 0, 0]  # programs that are done


def test_a_table_is_sent_or_written_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainc.kernels.parameter import triton_tables

    device = torch.device("cpu")
    # The interpreter takes numbers from 2^31 to 2^32 for what they are not.
    for numbers in ([5], [2**62, -1, 0, 1, 2**31 - 1, *range(2**32, 2**32 + 12)]):
        found = triton_tables.Numbers(numbers).on(device)
        assert found.tolist() == numbers
        by_kernels = triton_tables.written(numbers, device)
        assert by_kernels.tolist()[: len(numbers)] == numbers
        assert not any(by_kernels.tolist()[len(numbers) :])
    # While a graph is captured nothing is copied.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_tables, "written", lambda numbers, device: (numbers, device))
    assert triton_tables.Numbers([3]).on(torch.device("cuda:0")) == ([3], torch.device("cuda:0"))


def test_nothing_of_a_table_outlives_its_call() -> None:
    """A call may warm up in the memory of a graph: what is kept there, the graph's next run writes over."""
    from trainc.kernels.parameter import triton_tables

    found = triton_tables.Numbers([5, 6]).on(torch.device("cpu"))
    memory = weakref.ref(found)
    del found
    assert memory() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("with_master", [False, True])
def test_sparse_adamw(dtype: torch.dtype, block: int, gathered: bool, with_master: bool) -> None:
    from trainc.kernels.parameter import triton_sparse_adamw

    torch.manual_seed(0)
    weight = torch.randn(16, 24).to(dtype)
    index = torch.randperm(weight.numel() // block)[: 80 // block].int()
    count = index.numel() * block
    grad = torch.randn(count if gathered else weight.shape).to(dtype)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (1e-2, 0.1, 3)]
    results: list[Any] = []
    kernels: list[Any] = [sparse_adamw.eager, triton_sparse_adamw.sparse_adamw_]
    for kernel in kernels:
        torch.manual_seed(1)
        state = torch.randn(count), torch.rand(count)
        master = torch.randn(count) if with_master else None
        mine = weight.clone()
        lists = [[one] for one in (mine, grad, *state, index)]
        masters = [] if master is None else [master]
        kernel(*lists, *scalars, 0.9, 0.95, 1e-8, gathered, block, masters)
        results.append([mine.float(), *state, *([] if master is None else [master])])
    for place, (want, got) in enumerate(zip(*results, strict=True)):
        # The interpreter truncates where a device rounds; only the weight is stored in 16 bits.
        loose = 1e-2 if place == 0 and dtype != torch.float32 else 1e-5
        torch.testing.assert_close(got, want, rtol=loose, atol=1e-6)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("with_master", [False, True])
def test_sparse_adamw_of_many_weights(block: int, gathered: bool, with_master: bool) -> None:
    from trainc.kernels.parameter import triton_sparse_adamw

    torch.manual_seed(0)
    # Two dtypes, one weight without entries, one address that is not aligned, one dtype PyTorch takes.
    counts, dtypes = (
        (160, 0, 80, 64, 16),
        (torch.float32, *[torch.float32] * 2, torch.bfloat16, torch.float64),
    )
    whole = [torch.randn(385).to(dtype) for dtype in dtypes]
    weights = [one[1:] if place == 2 else one[:384] for place, one in enumerate(whole)]
    indices = [torch.randperm(384 // block)[: count // block].int() for count in counts]
    lengths = counts if gathered else [384] * len(counts)
    grads = [torch.randn(n).to(d) for n, d in zip(lengths, dtypes, strict=True)]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (1e-2, 0.1, 3)]
    results: list[Any] = []
    kernels: list[Any] = [sparse_adamw.eager, triton_sparse_adamw.sparse_adamw_]
    for kernel in kernels:
        torch.manual_seed(1)
        wide = [torch.float64 if d == torch.float64 else torch.float32 for d in dtypes]
        state = [[torch.rand(n).to(d) for n, d in zip(counts, wide, strict=True)] for _ in range(3)]
        masters = state[2] if with_master else []
        mine = [one.clone() for one in whole]
        views = [one[1:] if place == 2 else one[:384] for place, one in enumerate(mine)]
        lists = (views, grads, *state[:2], indices)
        kernel(*lists, *scalars, 0.9, 0.95, 1e-8, gathered, block, masters)
        results.append([*(one.float() for one in mine), *state[0], *state[1], *masters])
    for place, (want, got) in enumerate(zip(*results, strict=True)):
        loose = 1e-2 if place == 3 else 1e-5
        torch.testing.assert_close(got, want, rtol=loose, atol=1e-6)
    assert any((after != before).any() for after, before in zip(mine, whole, strict=True))
    assert weights[2].data_ptr() % 16


@pytest.mark.parametrize("elsewhere", [0, 1, 2])
def test_numbers_of_sparse_adamw_may_be_on_another_device(elsewhere: int) -> None:
    from trainc.kernels.parameter.triton_sparse_adamw import coefficients

    with FakeTensorMode():
        given = [torch.zeros((), device="cuda:0") for _ in range(3)]
        given[elsewhere] = torch.zeros((), device="cuda:1")
        for lr, decay, step in (given, [torch.zeros((), device="cuda:1")] * 3):
            found = coefficients(lr, decay, step, 0.9, 0.95, torch.device("cuda:0"))
            assert isinstance(found, torch.Tensor)
            assert found.device == torch.device("cuda:0")


def test_scalars_are_numbers_of_the_launch_or_stay_on_the_device() -> None:
    from trainc.kernels.parameter.triton_sparse_adamw import coefficients

    scalars = [torch.tensor(value) for value in (1e-2, 0.1, 3)]
    found = coefficients(scalars[0], scalars[1], scalars[2], 0.9, 0.95, torch.device("cpu"))
    want = (1 - 1e-3, 1e-2 / (1 - 0.9**3), (1 - 0.95**3) ** 0.5)
    assert found == pytest.approx(want, rel=1e-6)
    for elsewhere in range(3):  # a tensor that nobody may read
        given = [one.to("meta") if at == elsewhere else one for at, one in enumerate(scalars)]
        kept = coefficients(given[0], given[1], given[2], 0.9, 0.95, torch.device("meta"))
        assert isinstance(kept, torch.Tensor)
        assert (kept.dtype, kept.shape, kept.device.type) == (torch.float32, (3,), "meta")


def test_sparse_adamw_leaves_what_it_does_not_take_to_pytorch() -> None:
    from trainc.kernels.parameter import triton_sparse_adamw

    scalars = [torch.tensor(value) for value in (1e-2, 0.1, 3)]
    for weight in (torch.randn(8, 6).double(), torch.randn(6, 8).T):
        index, grad = torch.tensor([1, 5]), torch.randn(8, 6).to(weight.dtype)
        state = [torch.zeros(2, dtype=weight.dtype) for _ in range(2)]
        before = weight.clone()
        lists = [[one] for one in (weight, grad, *state, index)]
        triton_sparse_adamw.sparse_adamw_(*lists, *scalars, 0.9, 0.95, 1e-8, False, 1, [])
        assert (weight != before).sum() == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("moments", [0, 1, 2, 3])
def test_masked_update(packed: bool, dtype: torch.dtype, moments: int) -> None:
    from trainc.kernels.parameter import triton_masked_update

    for shape in ((40, 9), (3,), (0,)):
        mask = torch.rand(shape) < 0.5
        tensors = [torch.randn(shape).to(dtype), torch.randn(shape[::-1]).permute(
            *reversed(range(len(shape)))), *(torch.randn(shape) for _ in range(moments))]  # fmt: skip
        want = [t.where(mask, 0) for t in tensors]
        triton_masked_update.masked_update_(tensors, masked_update.pack(mask) if packed else mask)
        assert all(torch.equal(*pair) for pair in zip(tensors, want, strict=True))
