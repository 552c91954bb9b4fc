"""Chosen entries of many weights step together, as they would one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainc
from trainc.compiler.catalog import catalog
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.text.source import Source
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.step import entry_updates
from trainc.runtime.step.entry_updates import EntryUpdates

WIDTH = 24
SPEC = """train 1
optimizer adamw { lr = 1e-2 * cosine(to = 10%), weight_decay = 0.1 on "stack.3.*" }
loss cross_entropy
mask sift on "stack.*" { density = 5% }
run { length = 9 steps }
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


class Calls(TorchDispatchMode):
    """Counts the weights of each call of the operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) == "trainc.sparse_adamw_.default":
            self.weights.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        (torch.randn(5, WIDTH, generator=g), torch.randint(4, (5,), generator=g))
        for _ in range(count)
    ]


def compiled() -> Any:
    torch.manual_seed(0)
    return trainc.compile(SPEC, Net())


def assert_equal_states(one: Any, other: Any) -> None:
    """Compare all that has a place in two values of any nesting, to the bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal_states(*pair)
    else:
        assert one == other


def test_weights_with_equal_options_step_by_one_call() -> None:
    program = compiled()
    first, *rest = batches(4)
    program.step(first)  # chooses the entries
    for batch in rest:
        with Calls() as calls:
            program.step(batch)
        assert calls.weights == [3, 1]  # of both decays


def test_their_bits_are_those_of_one_by_one_also_when_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = batches(6)
    together, resumed = compiled(), compiled()
    for batch in given[:3]:
        together.step(batch)
    resumed.load_state_dict(together.state_dict())
    for batch in given[3:]:
        together.step(batch)
        resumed.step(batch)
    assert_equal_states(together.state_dict(), resumed.state_dict())
    monkeypatch.setattr(entry_updates, "TOGETHER_ON_CPU", 0)
    alone = compiled()
    with Calls() as calls:
        for batch in given:
            alone.step(batch)
    assert set(calls.weights) == {1}
    assert_equal_states(together.state_dict(), alone.state_dict())


def of_adamw() -> Any:
    source = Source("t", "train 1\noptimizer adamw { lr = 0.1 }\nloss cross_entropy")
    clause: Any = load_spec(source, catalog()).unwrap().one("optimizer")
    return clause.construct.update_entries


def masks(dtypes: dict[str, torch.dtype]) -> dict[str, SelectedEntries]:
    g = torch.Generator().manual_seed(1)
    made = {}
    for name, dtype in dtypes.items():
        parameter = nn.Parameter(torch.randn(4, 5, generator=g).to(dtype))
        mask = made[name] = SelectedEntries(name, parameter, 3)
        mask.update_in_place()
        mask.choose(torch.tensor([0, 6, 13]))
        mask.read()
        mask.take(torch.randn(4, 5, generator=g).to(dtype))
    return made


OPTIONS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
F32, BF16 = torch.float32, torch.bfloat16


def later(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state as after two steps."""
    moments = {"exp_avg": torch.full((3,), 0.1), "exp_avg_sq": torch.full((3,), 0.2)}
    state.update({"step": torch.tensor(2.0), **moments})
    return state


def test_other_counts_of_steps_and_master_copies_step_apart() -> None:
    dtypes = {"a": F32, "b": BF16, "c": F32, "d": F32, "e": BF16}

    def stepped(together: bool) -> tuple[list[int], list[Any]]:
        made = masks(dtypes)
        made["d"].values.grad = None  # it takes no step
        states: dict[str, dict[str, Any]] = {name: {} for name in dtypes}
        later(states["c"])
        updates = EntryUpdates(made, of_adamw())
        with Calls() as calls:
            for names in [list(dtypes)] if together else [[name] for name in dtypes]:
                updates.step(OPTIONS, {name: states[name] for name in names})
        assert all(mask.values.grad is None for mask in made.values())
        moved = [int(mask.write()) for mask in made.values()]
        weights = [mask.parameter.detach() for mask in made.values()]
        return calls.weights, [
            moved,
            weights,
            [mask.values.detach() for mask in made.values()],
            states,
        ]

    (calls, found), (alone, expected) = stepped(True), stepped(False)
    assert calls == [1, 2, 1]
    assert alone == [1, 1, 1, 1]
    assert found[0] == [3, 3, 3, 0, 3]
    assert found[3]["c"]["step"] == 3
    assert found[3]["d"] == {}
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_as_many_step_together_as_the_limit_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_updates, "TOGETHER_ON_CPU", 7)
    names = ("a", "b", "c", "d", "e")
    with Calls() as calls:
        EntryUpdates(masks(dict.fromkeys(names, F32)), of_adamw()).step(
            OPTIONS, {name: {} for name in names}
        )
    assert calls.weights == [2, 2, 1]
