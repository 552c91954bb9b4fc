"""Operators over whole parameters: many norms at once, and AdamW on chosen entries."""

from typing import Any

import pytest
import torch

from trainc.kernels.parameter.multi_norm import multi_norm
from trainc.kernels.parameter.multi_norm import reference as norm_reference
from trainc.kernels.parameter.sparse_adamw import reference as adamw_reference
from trainc.kernels.parameter.sparse_adamw import sparse_adamw_

SHAPES = [(), (1,), (3,), (127,), (5, 7), (2, 3, 4), (0,), (33000, 2)]
OPTIONS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_deltas", [False, True])
def test_sums_agree_with_the_definition(dtype: torch.dtype, with_deltas: bool) -> None:
    tensors, deltas = ([torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(2))
    arguments = (tensors, deltas) if with_deltas else (tensors,)
    got, want = multi_norm(*arguments), norm_reference(*arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    # sum w d cancels: its error is that of its terms, thousands of them here.
    torch.testing.assert_close(got, want, rtol=tolerance, atol=100 * tolerance)
    assert got.dtype == torch.float64


def test_sums_of_many_entries_do_not_drift() -> None:
    w = torch.rand(1 << 22)
    torch.testing.assert_close(multi_norm([w]), norm_reference([w]), rtol=1e-6, atol=0)


def test_non_finite_entries_are_counted() -> None:
    tensors, deltas = [torch.ones(5), torch.ones(70000)], [torch.ones(5), torch.ones(70000)]
    tensors[0][1], deltas[0][2], tensors[1][69999] = torch.nan, torch.inf, -torch.inf
    assert multi_norm(tensors, deltas)[:, 3].tolist() == [2, 1]
    assert multi_norm([torch.full((3,), 1e30)])[0, 3] == 0  # the sum overflows, no entry does


def test_parameters_mixed_dtypes_and_nothing_at_all() -> None:
    tensors = [torch.nn.Parameter(torch.ones(3)), torch.ones(2, dtype=torch.float64)]
    got = multi_norm(tensors)
    assert got[:, 0].tolist() == pytest.approx([3, 2])
    assert not got.requires_grad
    assert multi_norm([]).shape == (0, 4)


def test_complex_tensors_count_as_their_real_and_imaginary_parts() -> None:
    w, d = torch.randn(2, 3, 70000, dtype=torch.complex128)
    w.imag[0, 5] = torch.inf
    got = multi_norm([w[1:], w.conj()], [d[1:], d.conj()])
    parts = [torch.view_as_real(one[1:].resolve_conj()) for one in (w, d)]
    assert got[0].tolist() == pytest.approx(norm_reference(parts[:1], parts[1:])[0].tolist())
    assert got[0, 0] == pytest.approx(float((w[1:].abs() ** 2).sum()))
    assert got[0, 2] == pytest.approx(float((w[1:].conj() * d[1:]).real.sum()))
    assert got[:, 3].tolist() == [0, 1]


def test_mismatched_deltas_are_refused() -> None:
    with pytest.raises(RuntimeError, match="as many as tensors"):
        multi_norm([torch.ones(3)], [torch.ones(4)])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_entries_follow_torch_adamw_bit_for_bit(
    index_dtype: torch.dtype, gathered: bool, transposed: bool
) -> None:
    weight = torch.randn(11, 13).T if transposed else torch.randn(13, 11)
    index = torch.randperm(weight.numel())[:17].to(index_dtype)
    before = weight.clone()
    entries = weight.reshape(-1)[index].clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [entries], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    state = torch.zeros(17), torch.zeros(17)
    for step in range(1, 5):
        grad = torch.randn(weight.shape)
        entries.grad = grad.reshape(-1)[index].clone()
        optimizer.step()
        sparse_adamw_(
            weight, entries.grad if gathered else grad, *state, index,
            lr=torch.tensor(1e-2, dtype=torch.float64) if gathered else 1e-2,
            weight_decay=0.1, step=step, gathered=gathered, **OPTIONS,
        )  # fmt: skip
    assert torch.equal(weight.reshape(-1)[index], entries.detach())
    others = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, index.long(), False)
    assert torch.equal(weight.reshape(-1)[others], before.reshape(-1)[others])


def test_low_precision_weights_round_once() -> None:
    weight = torch.randn(64).bfloat16()
    index, grad = torch.arange(0, 64, 2), torch.randn(64).bfloat16()
    state = torch.zeros(32), torch.zeros(32)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "step": 1, **OPTIONS}
    first, second = state[0].double(), state[1].double()
    want, _, _ = adamw_reference(
        weight[index].double(), grad[index].double(), first, second, **options
    )
    sparse_adamw_(weight, grad, *state, index, **options)
    assert torch.equal(weight[index], want.bfloat16())


def test_parameters_and_empty_indices() -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    before, index = weight.detach().clone(), torch.zeros(0, dtype=torch.int32)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "step": 1, **OPTIONS}
    sparse_adamw_(weight, torch.randn(5), torch.zeros(0), torch.zeros(0), index, **options)
    assert torch.equal(weight, before)


def test_state_of_another_length_is_refused() -> None:
    with pytest.raises(RuntimeError, match="indices"):
        sparse_adamw_(
            torch.zeros(5), torch.zeros(5), torch.zeros(2), torch.zeros(2), torch.arange(3),
            lr=1e-2, weight_decay=0.0, step=1, **OPTIONS,
        )  # fmt: skip


@pytest.mark.parametrize("with_master", [False, True])
def test_blocks_are_their_entries(with_master: bool) -> None:
    weight, grad = torch.randn(16, 8), torch.randn(16, 8)
    blocks = torch.tensor([5, 0, 7])
    entries = (blocks.unsqueeze(1) * 16 + torch.arange(16)).view(-1)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "step": 2, **OPTIONS}
    results = []
    for index, block in ((blocks, 16), (entries, 1)):
        state, mine = (torch.ones(48), torch.ones(48)), weight.clone()
        master = weight.take(entries) if with_master else None
        sparse_adamw_(mine, grad, *state, index, block=block, master=master, **options)
        results.append([mine, *state])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_master_copy_keeps_what_rounding_would_lose() -> None:
    weight, index = torch.ones(8).bfloat16(), torch.tensor([1, 6])
    master = torch.ones(2)
    state = torch.zeros(2), torch.zeros(2)
    for step in range(1, 101):
        sparse_adamw_(
            weight, torch.ones(8), *state, index, lr=1e-4, weight_decay=0.0, step=step,
            master=master, **OPTIONS,
        )  # fmt: skip
    assert master.tolist() == pytest.approx([0.99, 0.99], abs=1e-5)
    assert weight[index].tolist() == master.bfloat16().tolist()
    assert weight[0] == 1
    with pytest.raises(RuntimeError, match="master must be like"):
        sparse_adamw_(
            weight, torch.ones(8), *state, index, lr=1e-4, weight_decay=0.0, step=1,
            master=torch.ones(3), **OPTIONS,
        )  # fmt: skip


@pytest.mark.parametrize("with_master", [False, True])
def test_sparse_adamw_of_lists_is_one_weight_after_another(with_master: bool) -> None:
    torch.manual_seed(0)
    options: Any = {
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 2,
    }  # fmt: skip
    results = []
    for together in (False, True):
        torch.manual_seed(0)
        weights, grads = ([torch.randn(4, n) for n in (5, 3, 2)] for _ in range(2))
        means, squares, masters = ([torch.rand(n) for n in (6, 3, 0)] for _ in range(3))
        indices = [torch.randperm(4 * n)[:k] for n, k in ((5, 6), (3, 3), (2, 0))]
        given = [weights, grads, means, squares, indices]
        if together:
            sparse_adamw_(*given, **options, master=masters if with_master else None)
        else:
            for *one, master in zip(*given, masters, strict=True):
                sparse_adamw_(*one, **options, master=master if with_master else None)
        results.append([*weights, *means, *squares, *masters])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_sparse_adamw_of_lists_refuses_before_it_writes() -> None:
    options: Any = {
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 2,
    }  # fmt: skip
    weights, grads, means, squares = ([torch.ones(4) for _ in range(2)] for _ in range(4))
    indices = [torch.arange(4), torch.arange(1, 5)]
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 4\), and 4 is not"):
        sparse_adamw_(weights, grads, means, squares, indices, **options)
    with pytest.raises(RuntimeError, match="lists of one length"):
        sparse_adamw_(weights, grads[:1], means, squares, indices, **options)
    assert all(bool((one == 1).all()) for one in (*weights, *means, *squares))
