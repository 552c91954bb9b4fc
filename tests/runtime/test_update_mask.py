"""Update masks: what the optimizer sees, what stays in memory, and what the weights become."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainc.compiler.catalog import catalog
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.text.source import Source
from trainc.runtime.mask.entry_choice import largest
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.mask.zero_mask import ZeroMask
from trainc.runtime.step.entry_updates import EntryUpdates


def by_sorting(scores: list[Tensor], count: int) -> list[list[int]]:
    """Return what `largest` should, by one stable sort of everything."""
    together = torch.cat(scores)
    order = together.sort(descending=True, stable=True).indices[:count]
    chosen, start = [], 0
    for score in scores:
        inside = order[(order >= start) & (order < start + len(score))] - start
        chosen.append(sorted(inside.tolist()))
        start += len(score)
    return chosen


few = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12)


@given(st.lists(few, min_size=1, max_size=4), st.floats(0, 1))
def test_the_largest_are_those_of_a_stable_sort(values: list[list[float]], share: float) -> None:
    scores = [torch.tensor(row) for row in values]
    count = round(share * sum(map(len, scores)))
    found = largest(scores, count)
    assert [index.tolist() for index in found] == by_sorting(scores, count)


def made(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(4, 5).to(dtype))


def test_nothing_trains_before_entries_are_chosen() -> None:
    parameter = made()
    compact = SelectedEntries("w", parameter, 3)
    before = parameter.detach().clone()
    (parameter * 2).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.unique().tolist() == [2.0]
    compact.take(torch.ones(4, 5))
    assert parameter.grad.unique().tolist() == [3.0]
    assert compact.values.grad is None
    optimizer = torch.optim.AdamW([compact.values], lr=1.0, weight_decay=1.0)
    optimizer.step()
    compact.write()
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("way", ["hook", "gather", "take"])
def test_only_the_selected_gradient_is_kept(way: str) -> None:
    parameter = made()
    compact = SelectedEntries("w", parameter, 3)
    compact.choose(torch.tensor([1, 7, 19]))
    dense = torch.arange(20.0).view(4, 5)
    for _ in range(2):
        if way == "hook":
            (parameter * dense).sum().backward()
        elif way == "gather":
            parameter.grad = dense.clone()
            compact.gather()
        else:
            compact.take(dense)
        assert parameter.grad is None
    assert compact.values.grad is not None
    assert compact.values.grad.tolist() == [2.0, 14.0, 38.0]
    compact.discard()
    assert compact.values.grad is None


def test_no_dense_gradient_outlives_the_layer_above() -> None:
    """The first layer's backward runs when the second's dense gradient is gone already."""
    one, two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model = nn.Sequential(one, two)
    compacts = [SelectedEntries(name, p, 1) for name, p in model.named_parameters()]
    for compact in compacts:
        compact.choose(torch.tensor([4]))
    held: list[bool] = []
    handle: Any = one.weight.register_hook
    handle(lambda _: held.append(two.weight.grad is not None))
    model(torch.randn(2, 3)).sum().backward()
    assert held == [False]
    assert all(p.grad is None for p in model.parameters())


def test_decay_and_moments_act_on_the_entries_only() -> None:
    parameter, twin = made(), made()
    compact = SelectedEntries("w", parameter, 3)
    index = torch.tensor([0, 6, 13])
    compact.choose(index)
    optimizer = torch.optim.AdamW([compact.values], lr=0.1, weight_decay=0.5)
    reference = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)
    mask = torch.zeros(20, dtype=torch.bool).scatter_(0, index, True).view(4, 5)
    start = parameter.detach().clone()
    for step in range(3):
        grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        compact.take(grad)
        twin.grad = grad * mask
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert int(compact.write()) == 3
        twin.data = torch.where(mask, twin.data, start)
        assert torch.equal(parameter, twin)
    assert [s.numel() for s in optimizer.state[compact.values].values() if s.dim()] == [3, 3]


def test_bfloat16_weights_add_up_steps_below_their_precision() -> None:
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    compact = SelectedEntries("w", parameter, 2)
    compact.choose(torch.tensor([2, 5]))
    assert compact.values.dtype == torch.float32
    optimizer = torch.optim.SGD([compact.values], lr=1.0)
    moved = []
    for _ in range(8):
        compact.read()
        compact.take(torch.full((8,), 2.0**-10, dtype=torch.bfloat16))
        optimizer.step()
        optimizer.zero_grad()
        moved.append(int(compact.write()))
    assert compact.values.tolist() == [1 - 8 * 2.0**-10] * 2
    assert parameter[2] == parameter[5] == 1 - 2.0**-7
    assert 0 in moved
    assert 2 in moved
    assert (parameter == 1).sum() == 6


def test_weights_set_from_outside_are_read() -> None:
    parameter = made()
    compact = SelectedEntries("w", parameter, 2)
    compact.choose(torch.tensor([0, 1]))
    parameter.data.fill_(7.0)
    compact.read()
    assert compact.values.tolist() == [7.0, 7.0]


def test_a_weight_that_is_not_contiguous_is_written_in_its_own_order() -> None:
    parameter = nn.Parameter(torch.zeros(5, 4).t())
    assert not parameter.is_contiguous()
    compact = SelectedEntries("w", parameter, 2)
    compact.choose(torch.tensor([1, 7]))
    compact.values.data.copy_(torch.tensor([3.0, 4.0]))
    compact.write()
    assert parameter[0, 1] == 3.0
    assert parameter[1, 2] == 4.0
    assert parameter.detach().count_nonzero() == 2


def test_sparse_gradients_of_an_embedding_are_gathered() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    compact = SelectedEntries("weight", table.get_parameter("weight"), 2)
    compact.choose(torch.tensor([2, 9]))
    table(torch.tensor([1, 1, 4])).sum().backward()
    assert table.weight.grad is None
    assert compact.values.grad is not None
    assert compact.values.grad.tolist() == [2.0, 1.0]


def test_the_number_of_entries_may_be_decided_with_the_choice() -> None:
    parameter = made()
    compact = SelectedEntries("w", parameter, 0)
    identity = compact.values
    compact.choose(torch.tensor([3, 4, 5]))
    assert compact.values is identity
    assert torch.equal(compact.values.detach(), parameter.detach().view(-1)[3:6])
    none = SelectedEntries("v", made(), 0)
    none.choose(torch.tensor([], dtype=torch.int64))
    none.take(torch.ones(4, 5))
    assert none.values.grad is None
    assert int(none.write()) == 0


@pytest.mark.parametrize(
    ("numel", "count"), [(20, 3), (20, 1), (200_000, 5000), (200_000, 7), (65536, 0)]
)
def test_positions_take_two_bytes_where_that_is_less(numel: int, count: int) -> None:
    parameter = nn.Parameter(torch.zeros(numel))
    compact = SelectedEntries("w", parameter, count)
    index = torch.randperm(numel, generator=torch.Generator().manual_seed(1))[:count].sort().values
    blocks = -(-numel // 65536)
    expected = 4 * count + min(4 * count, 2 * count + 4 * blocks)
    assert compact.memory() == expected
    compact.choose(index)
    assert compact.memory() == expected
    assert compact.index is not None
    assert compact.index.dtype == torch.int32
    assert torch.equal(compact.index.long(), index)


def adamw() -> Any:
    source = Source("t", "train 1\noptimizer adamw { lr = 0.1 }\nloss cross_entropy")
    clause: Any = load_spec(source, catalog()).unwrap().one("optimizer")
    return clause.construct.update_entries


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_that_are_updated_in_place_are_those_of_torch(dtype: torch.dtype) -> None:
    """To the bit: the moments, the weights, and the master copy of 16-bit ones; others hold no copy."""
    own, other = (SelectedEntries("w", made(dtype), 3) for _ in range(2))
    own.update_in_place()
    for compact in (own, other):
        compact.choose(torch.tensor([0, 6, 13]))
    optimizer = torch.optim.AdamW([other.values], lr=0.1, weight_decay=0.5)
    state: dict[str, Any] = {}
    for step in range(4):
        grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        for compact in (own, other):
            compact.read()
            compact.take(grad)
        EntryUpdates({"w": own}, adamw()).step(optimizer.param_groups[0], {"w": state})
        optimizer.step()
        optimizer.zero_grad()
        assert own.values.grad is None
        assert int(own.write()) == int(other.write())
        assert torch.equal(own.parameter, other.parameter)
    theirs = optimizer.state[other.values]
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[key], theirs[key]) for key in state)
    if dtype == torch.bfloat16:
        assert torch.equal(own.values, other.values)
    else:
        assert own.memory() == other.memory() - other.values.nbytes
        assert own.state().keys() == {"index/w"}
        assert own.values.isnan().all()
    restored = SelectedEntries("w", own.parameter, 3)
    restored.load(own.state())
    assert torch.equal(restored.values, other.values)
    restored.load({})
    assert not restored.is_chosen


def test_a_removed_mask_leaves_gradients_alone() -> None:
    parameter = made()
    compact = SelectedEntries("w", parameter, 1)
    compact.choose(torch.tensor([1]))
    compact.remove()
    parameter.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.shape == (4, 5)
    compact.forget()
    assert compact.index is None
    compact.choose(torch.tensor([2]))
    parameter.grad = None
    parameter.sum().backward()
    assert parameter.grad is None


def zeroed(parameter: nn.Parameter, *kept: int) -> tuple[ZeroMask, Tensor]:
    """Return the mask of a parameter that keeps some flat positions, and these as bools."""
    mask = ZeroMask("w", parameter, "density")
    index = torch.tensor(kept)
    chosen = torch.zeros(parameter.numel(), dtype=torch.bool).index_fill_(0, index, True)
    return mask, chosen.view(parameter.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeroed_entries_are_zero_everywhere_and_the_others_keep_their_bits(
    dtype: torch.dtype,
) -> None:
    parameter = made(dtype)
    before, moment = parameter.detach().clone(), torch.full_like(parameter, torch.nan)
    factors, counter = torch.ones(5), torch.tensor(3.0)
    mask, kept = zeroed(parameter, 1, 7, 19)
    mask.choose(kept, {"moment": moment, "factors": factors, "counter": counter})
    assert torch.equal(parameter.detach(), torch.where(kept, before, 0))
    assert torch.equal(moment.isnan(), kept)
    assert bool((moment[~kept] == 0).all())
    assert factors.tolist() == [1.0] * 5
    assert counter == 3
    parameter.grad = torch.full_like(parameter, torch.inf)
    mask.zero_gradient()
    assert torch.equal(parameter.grad.isinf(), kept)
    parameter.data.fill_(2)
    mask.write()
    assert parameter.detach().count_nonzero() == mask.count == 3
    assert torch.equal(mask.kept_entries(), kept)


def test_a_weight_that_is_not_contiguous_is_zeroed_in_its_own_order() -> None:
    parameter = nn.Parameter(torch.ones(5, 4).t())
    mask, kept = zeroed(parameter, 1, 7)
    mask.choose(kept)
    assert not parameter.is_contiguous()
    assert torch.equal(parameter.detach() != 0, kept)


def test_a_graphs_gradient_is_masked_in_a_copy() -> None:
    parameter = made()
    mask, kept = zeroed(parameter, 1, 7)
    mask.choose(kept)
    shared = torch.ones(1).expand(4, 5)
    mask.take(shared)
    mask.take(shared)
    mask.zero_gradient()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, 2.0 * kept)
    assert bool((shared == 1).all())


def test_a_counter_of_steps_is_no_moment_of_a_scalar() -> None:
    parameter, counter = nn.Parameter(torch.tensor(2.0)), torch.tensor(5.0)
    mask = ZeroMask("w", parameter, "density")
    mask.choose(torch.tensor(False), {"counter": counter})
    assert parameter == 0
    assert counter == 5


def test_a_mask_of_zeros_takes_a_bit_per_entry() -> None:
    mask, kept = zeroed(made(), 1)
    mask.choose(kept)
    assert mask.kept is not None
    assert mask.memory() == mask.kept.numel() == 3
    mask.choose(torch.ones_like(kept))
    assert mask.kept is None
    assert mask.count == 20
