"""Entries that are chosen as gradients arrive, one dense gradient at a time: as by gradients that are all held."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainc
from tests.compiler.gradient_methods import Change, Method
from tests.compiler.gradient_methods import spec as spec_with
from trainc.compiler.program.program import Program
from trainc.runtime.mask.choose_entries import ChooseEntries
from trainc.runtime.step.gradients import ParameterGradient
from trainc.runtime.step.record import Step

Batch = tuple[Tensor, Tensor]
BAD = 16
"""An id that makes gradients NaN where the loss is finite."""


class Net(nn.Module):
    """Matrices, vectors, three axes, an embedding that its head may share, dropout and running statistics."""

    def __init__(self, tied: bool = True, sparse: bool = False, of_batch: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(BAD + 1, 12, sparse=sparse)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm1d(5) if of_batch else nn.LayerNorm(12)
        self.inner, self.drop = nn.Linear(12, 24), nn.Dropout(0.2)
        self.outer = nn.Linear(24, 12)
        self.head = nn.Linear(12, BAD + 1, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def middle(self, x: Tensor) -> Tensor:
        return x + self.outer(self.drop(torch.relu(self.inner(x))))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        none = (ids[:, :1, None] != BAD) * (x.square() + 1)
        x = self.middle(x) + 0 * none.sqrt()  # at 0 its derivative is infinite, times 0 NaN
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def data(step: int, bad: bool = False) -> Batch:
    g = torch.Generator().manual_seed(step)
    ids, targets = torch.randint(BAD, (6, 5), generator=g), torch.randint(BAD, (6,), generator=g)
    if bad:
        ids[0, 0] = BAD
    return ids, targets


def at_once(program: Program, batch: Any) -> dict[str, float]:
    """A step that is known to have one micro-batch."""
    found: dict[str, float] = program.step(batch)
    return found


def by_hand(program: Program, batch: Any) -> dict[str, float]:
    """A loop of one's own, which may go on with another micro-batch: gradients are held until it does not."""
    program.loss(batch).backward()
    return program.update()


def graph_by_hand(program: Program, batch: Any) -> dict[str, float]:
    program.graph(batch)
    return program.update()


def same(one: Any, two: Any, where: str = "") -> None:
    """Assert that two states are equal, bit for bit; the seconds of the clock aside."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one.keys() - {"seconds"}:
            same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}/{i}")
    elif isinstance(one, Tensor):
        assert one.dtype == two.dtype, where
        assert torch.equal(one.isnan(), two.isnan()), where
        assert torch.equal(one.nan_to_num(), two.nan_to_num()), where
    else:
        both_nan = one != one and two != two
        assert one == two or both_nan, (where, one, two)


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of parameters, as often as they were chosen by a gradient that had just arrived."""
    names: list[str] = []
    choose = ChooseEntries._find

    def watch(self: ChooseEntries, score: Any, step: Step, name: str, dense: Tensor) -> Any:
        if self.selected[name].is_whole:
            names.append(name)
        return choose(self, score, step, name, dense)

    monkeypatch.setattr(ChooseEntries, "_find", watch)
    return names


def after(program: Program, step: Callable[..., Any], batch: Any) -> list[Any]:
    """Return all that a step leaves."""
    torch.manual_seed(1)
    metrics = step(program, copy.deepcopy(batch))
    last: Any = program._runner.last
    state = program.state_dict()
    reasons = state.pop("execution", None)
    return [metrics, last.notes, last.series, copy.deepcopy(state), reasons]


def compare(
    text: Any,
    batches: list[Any],
    make: Callable[[], nn.Module] = Net,
    executor: Any = "module",
    held: Callable[..., Any] = by_hand,
) -> tuple[Program, Program]:
    one, two = (trainc.compile(text, make(), executor=executor) for _ in range(2))
    for batch in batches:
        same(after(one, at_once, batch), after(two, held, batch))
    return one, two


SEVEN = [data(i) for i in range(7)]
ADAM = "loss cross_entropy optimizer adamw { lr = 1e-2, weight_decay = 0.1 } "
AGAIN = "mask sift on ndim(2) every 2 steps"
CLIPPED = "run { length = 9 steps, clip = 0.05 } loss cross_entropy optimizer sgd { lr = 1e-2, momentum = 0.9 } "
CASES: dict[str, tuple[str, int]] = {
    "once": (ADAM + "mask sift on ndim(2) { density = 5% }", 3),
    "again": (ADAM + AGAIN + " { density = 5% }", 12),
    "everything": (ADAM + "mask sift on all every 3 steps { density = 10% }", 4 + 2 * 9),
    "the rest frozen": (ADAM + "mask sift on ndim(2) { density = 10%, rest = freeze }", 3),
    "by movement": (ADAM + AGAIN + " { density = 5%, select = movement }", 12),
    "by two steps": (
        ADAM + "mask sift on ndim(2) every 3 steps { density = 5%, batches = 2 }",
        6,
    ),
    "later": (ADAM + "mask sift on ndim(2) from 2 steps { density = 5% }", 3),
    "rows": (ADAM + AGAIN + " { density = 20%, structure = row }", 12),
    "n of m": (ADAM + AGAIN + " { structure = n_m(1, 4) }", 12),
    "together": (ADAM + AGAIN + " { density = 5%, scope = global }", 0),
    "by shape": (ADAM + AGAIN + " { density = 5%, scope = erk }", 0),
    "clipped": (
        CLIPPED + "mask sift on all every 3 steps { density = 10% }",
        4 + 2 * 9,
    ),
    "clipped by the optimizer": (
        "loss cross_entropy optimizer sgd { lr = 1e-2, clip = 0.05 } " + AGAIN + "{ density = 5% }",
        12,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_the_bits_of_gradients_that_are_held(case: str, arrived: list[str]) -> None:
    text, expected = CASES[case]
    compare(text, SEVEN)
    assert len(arrived) == expected


@pytest.mark.parametrize("case", ["everything", "by two steps"])
def test_a_graph_does_so_too(case: str, arrived: list[str]) -> None:
    text, expected = CASES[case]
    compare(text, SEVEN, executor="graph", held=graph_by_hand)
    assert len(arrived) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("master", ["", ", master = false"])
def test_other_precisions(dtype: torch.dtype, master: str, arrived: list[str]) -> None:
    def make() -> nn.Module:
        return Net().to(dtype)

    compare(
        ADAM + AGAIN + " { density = 5%" + master * (dtype == torch.bfloat16) + " }", SEVEN, make
    )
    assert len(arrived) == 12


def test_sparse_gradients(arrived: list[str]) -> None:
    compare(ADAM + AGAIN + " { density = 5% }", SEVEN, lambda: Net(tied=False, sparse=True))
    assert arrived.count("embed.weight") == 4


@pytest.mark.parametrize("on_nan", ["skip", "continue"])
def test_a_gradient_that_is_not_finite_leaves_the_choice_due(
    on_nan: str, arrived: list[str]
) -> None:
    text = f"run {{ length = 90 steps, on_nan = {on_nan} }} {ADAM}{AGAIN} {{ density = 5% }}"
    batches = [data(i, bad=i in (0, 2, 3)) for i in range(7)]
    compare(text, batches if on_nan == "skip" else batches[:2])
    assert arrived


@pytest.mark.parametrize("of", ["role(norm)", "type(Linear)"])
def test_a_noise_scale_beside_it_reads_what_it_measures(of: str, arrived: list[str]) -> None:
    text = (
        ADAM
        + f"noise_scale gns on {of} mask sift on type(Linear) & ndim(2) every 2 steps {{ density = 5% }}"
    )
    compare(text, SEVEN, lambda: Net(tied=False, of_batch=False))
    assert bool(arrived) == (of == "role(norm)")


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    text = CASES["by two steps"][0]
    whole = trainc.compile(text, Net(), executor="module")
    for i, batch in enumerate(SEVEN):
        resumed = trainc.compile(text, Net(), executor="module")
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        same(after(whole, at_once, batch), after(resumed, at_once, batch), f"step {i}")


class Shared(Net):
    """Its layers run twice in reentrant checkpoints, each of which adds to their gradients in a pass of its own."""

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(super().middle, x, use_reentrant=True)
        return x


class _AddsItself(torch.autograd.Function):
    """Adds to the gradient of a weight by hand, as fused layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.weight = layer.weight
        return x * layer.weight.detach().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, found = ctx.weight, torch.ones_like(ctx.weight)
        weight.grad = found if weight.grad is None else weight.grad + found
        return gradients[0] * weight.detach().sum(), None


class ByHand(Net):
    """The gradient of its last layer is accumulated, and then added to by hand."""

    def middle(self, x: Tensor) -> Tensor:
        apply: Any = _AddsItself.apply
        found: Tensor = apply(super().middle(x), self.head)
        return found


@pytest.mark.parametrize("make", [Shared, lambda: ByHand(tied=False)], ids=["twice", "by hand"])
def test_a_gradient_that_comes_in_parts_is_found(make: Any) -> None:
    text = ADAM + AGAIN + " { density = 5% }"
    one, two = (trainc.compile(text, make(), executor="module") for _ in range(2))
    for i, batch in enumerate(SEVEN):
        found, held = after(one, at_once, batch), after(two, by_hand, batch)
        notes = found[1]
        assert len([note for note in notes if "comes in parts" in note]) == (i == 0)
        found[1] = [note for note in notes if "comes in parts" not in note]
        same(found, held)


def test_an_error_in_the_backward_pass_leaves_nothing(arrived: list[str]) -> None:
    text = ADAM + AGAIN + " { density = 5% }"
    one, two = (trainc.compile(text, Net(), executor="module") for _ in range(2))

    def fail(gradient: Tensor) -> None:
        raise OSError("no more")

    handle = one.module.get_parameter("conv.weight").register_hook(fail)
    with pytest.raises(OSError, match="no more"):
        one.step(data(9))
    handle.remove()
    assert arrived
    for batch in SEVEN[:4]:
        same(after(one, at_once, batch), after(two, by_hand, batch))


def test_several_micro_batches_are_summed_first(arrived: list[str]) -> None:
    text = ADAM + AGAIN + " { density = 5% }"
    one, two = (trainc.compile(text, Net(), executor="module") for _ in range(2))
    for i in range(4):
        parts = [data(2 * i), data(2 * i + 1)]

        def by_parts(program: Program, batches: list[Batch]) -> dict[str, float]:
            for batch in batches:
                program.loss(batch, loss_weight=0.5).backward()
            return program.update()

        same(after(one, at_once, parts), after(two, by_parts, parts))
    assert arrived == []


class Double(Change):
    def change_one(self, one: ParameterGradient, step: Step) -> None:
        one.gradient.mul_(2)


class Doubling(Method):
    """Doubles gradients."""

    make = Double


@pytest.mark.parametrize("step", [at_once, by_hand])
def test_what_changes_gradients_does_so_when_entries_are_chosen_again(step: Any) -> None:
    """SGD at twice the gradient is SGD at twice the rate, in the steps of a choice too."""
    rule = "optimizer sgd {{ lr = {} }} loss cross_entropy " + AGAIN + " {{ density = 20% }}"
    one = trainc.compile(spec_with(rule.format(0.25), Doubling()), Net())
    two = trainc.compile(rule.format(0.5), Net())
    for batch in SEVEN[:5]:
        torch.manual_seed(1)
        step(one, batch)
        torch.manual_seed(1)
        step(two, batch)
        same(one.state_dict()["model"], two.state_dict()["model"])
