"""Every mechanism obeys `from`, `until` and `every` of its clause, or refuses them by name at plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler import catalog as catalogs
from trainc.compiler.catalog import catalog, catalog_of
from trainc.compiler.constructs.regularize.weights.l2_sp import L2Sp
from trainc.compiler.driver import saved_program
from trainc.compiler.method.term import Forward
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect, Schedule
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.source import Source
from trainc.dsl.values.value_json import Number

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering

STEPS = 7
RATE, STRENGTH = 0.05, 0.02
TIMES: dict[str, Callable[[int], bool]] = {
    "from 3 steps": lambda t: t >= 3,
    "until 3 steps": lambda t: t < 3,
    "every 3 steps": lambda t: t % 3 == 0,
    "from 1 steps until 6 steps every 2 steps": lambda t: t in (1, 3, 5),
}
"""Each time, and whether the clause is open in step t."""


class Probe(Construct):
    """Base of the constructs below: they ask for one mechanism each, and say nothing of times."""

    cite: ClassVar = "none"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "all"

    weight: Schedule = Field(default=Number(STRENGTH), description="strength")


class PullToZero(Probe):
    """The example of docs/adding-a-construct.md: a pull of every weight towards zero."""

    effects: ClassVar = (Effect("forward", "penalty", reads=("params",), writes=("loss",)),)

    def lower(self, to: Lowering) -> None:
        names = [entry.name for entry in to.parameters()]

        def value(forward: Forward) -> Tensor:
            return torch.stack([forward.parameters[name].abs().sum() for name in names]).sum()

        to.term(value, over="parameters", weight=self.weight)


class Barrier(Probe):
    """A penalty that is infinite, and its gradient not a number, where a weight is 0."""

    effects: ClassVar = PullToZero.effects

    def lower(self, to: Lowering) -> None:
        names = [entry.name for entry in to.parameters()]

        def value(forward: Forward) -> Tensor:
            squares = [(1 / forward.parameters[name]).square().sum() for name in names]
            return torch.stack(squares).sum()

        to.term(value, over="parameters")


class Halve(Probe):
    """Half of the learning rate."""

    effects: ClassVar = (Effect("rates", "halve the rates", writes=("rate",)),)

    def lower(self, to: Lowering) -> None:
        to.lr_factor("all", [entry.name for entry in to.parameters()]).factor = 0.5


class Freeze(Probe):
    """Nothing trains."""

    effects: ClassVar = (Effect("gradients", "freeze", writes=("gradient",)),)

    def lower(self, to: Lowering) -> None:
        to.freeze(entry.name for entry in to.parameters())


class Idle(Probe):
    """A construct that asks for no mechanism."""

    effects: ClassVar = (Effect("observe", "nothing"),)

    def lower(self, to: Lowering) -> None:
        """Do nothing."""


@pytest.fixture(autouse=True)
def probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the constructs above into the catalog."""
    known = catalog_of(dict(catalog()._modules), ())
    for kind, construct in (
        ("regularize", PullToZero), ("regularize", Barrier), ("lr", Halve), ("mask", Freeze), ("observe", Idle)
    ):  # fmt: skip
        name = construct.__name__.lower()
        construct.kind, construct.name = kind, name
        known._modules[kind, name] = __name__
        known._loaded[kind, name] = construct
    monkeypatch.setattr(catalogs, "catalog", lambda: known)
    monkeypatch.setattr(saved_program, "catalog", lambda: known)


def spec(*clauses: str, head: str = f"optimizer sgd {{ lr = {RATE} }} loss cross_entropy") -> Spec:
    checked = load_spec(Source("spec.train", " ".join([head, *clauses])), catalogs.catalog())
    assert checked.spec is not None, checked.diagnostics
    return checked.spec


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    return made


def batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + t)
    return torch.randn(6, 5, generator=g, dtype=torch.float64), torch.randint(
        0, 3, (6,), generator=g
    )


def by_hand(
    is_open: Callable[[int], bool], term: Callable[[nn.Module], Tensor], factor: float = 1.0
) -> tuple[nn.Sequential, list[float]]:
    """Train by a loop without trainc; return the model and the term of each step."""
    made, terms = model(), []
    for t in range(STEPS):
        x, y = batch(t)
        value = term(made) if is_open(t) else torch.zeros((), dtype=torch.float64)
        terms.append(float(value.detach()))
        found = torch.autograd.grad(cross_entropy(made(x), y) + value, list(made.parameters()))
        rate = RATE * (factor if is_open(t) else 1.0)
        with torch.no_grad():
            for parameter, gradient in zip(made.parameters(), found, strict=True):
                parameter.sub_(rate * gradient)
    return made, terms


def assert_close(program: Program, want: nn.Module) -> None:
    for (name, got), parameter in zip(
        program.module.named_parameters(), want.parameters(), strict=True
    ):
        torch.testing.assert_close(got, parameter, rtol=1e-12, atol=1e-13, msg=name)


def in_micro_batches(t: int) -> list[tuple[Tensor, Tensor]]:
    x, y = batch(t)
    return [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]


@pytest.mark.parametrize("divided", [False, True], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("times", TIMES)
def test_a_penalty_obeys_its_times(times: str, executor: Any, divided: bool) -> None:
    def l1(made: nn.Module) -> Tensor:
        return STRENGTH * torch.stack([p.abs().sum() for p in made.parameters()]).sum()

    program = trainc.compile(spec(f"regularize pulltozero {times}"), model(), executor=executor)
    said = [program.step(in_micro_batches(t) if divided else batch(t)) for t in range(STEPS)]
    want, terms = by_hand(TIMES[times], l1)
    assert_close(program, want)
    assert [STRENGTH * one["pulltozero"] for one in said] == pytest.approx(terms, rel=1e-12)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_closed_penalty_is_not_computed(executor: Any) -> None:
    made = model()
    with torch.no_grad():
        made.get_parameter("1.bias").zero_()
    text = "regularize barrier from 5 steps noise_scale gns on type(LayerNorm)"
    program = trainc.compile(spec(text), made, executor=executor)
    losses = [program.step(batch(t)) for t in range(3)]
    assert all(math.isfinite(one["loss"]) and one["barrier"] == 0.0 for one in losses)
    assert all(p.isfinite().all() for p in made.parameters())


def test_each_term_has_its_own_metric_by_graph_and_by_modules() -> None:
    text = spec(
        "regularize pulltozero from 1 steps", "regularize l2_sp on all { weight = 0.3, to = zero }"
    )
    said = {}
    for executor in ("graph", "module"):
        program = trainc.compile(text, model(), executor=executor)
        said[executor] = [program.step(batch(t)) for t in range(3)]
    for one, other in zip(*said.values(), strict=True):
        assert one.keys() == other.keys() >= {"pulltozero", "l2_sp"}
        assert one == pytest.approx(other, rel=1e-12)


def test_a_resumed_and_a_loaded_program_obey_the_times(tmp_path: Path) -> None:
    text = spec("regularize pulltozero from 2 steps until 5 steps")
    program = trainc.compile(text, model(), executor="graph")
    for t in range(3):
        program.step(batch(t))
    program.save(tmp_path / "open")
    state = copy.deepcopy(program.state_dict())
    for t in range(3, STEPS):
        program.step(batch(t))
    resumed = trainc.compile(text, model(), executor="graph")
    resumed.load_state_dict(state)
    loaded = trainc.load(tmp_path / "open", model(), executor="graph")
    loaded.load_state_dict(state)
    for t in range(3, STEPS):
        resumed.step(batch(t))
        loaded.step(batch(t))
    fresh = trainc.load(tmp_path / "open", model(), weights=False, executor="graph")
    for t in range(STEPS):
        fresh.step(batch(t))
    for other in (resumed, loaded, fresh):
        for a, b in zip(program.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("times", ["from 3 steps", "until 3 steps", "from 2 steps until 4 steps"])
def test_a_factor_on_the_rate_obeys_its_times(times: str) -> None:
    opens = {**TIMES, "from 2 steps until 4 steps": lambda t: t in (2, 3)}
    program = trainc.compile(spec(f"lr halve {times}"), model())
    for t in range(STEPS):
        program.step(batch(t))
    want, _ = by_hand(opens[times], lambda made: torch.zeros((), dtype=torch.float64), factor=0.5)
    assert_close(program, want)


def test_l2_sp_obeys_its_times() -> None:
    start = {name: p.detach().clone() for name, p in model().named_parameters()}

    def pull(made: nn.Module) -> Tensor:
        return L2Sp.reference(dict(made.named_parameters()), start, 0.3)

    text = "regularize l2_sp on all from 1 steps until 6 steps every 2 steps { weight = 0.3 }"
    program = trainc.compile(spec(text), model())
    for t in range(STEPS):
        program.step(batch(t))
    want, _ = by_hand(lambda t: t in (1, 3, 5), pull)
    assert_close(program, want)


@pytest.mark.parametrize(
    ("head", "clause", "words"),
    [
        ("loss cross_entropy", "optimizer sgd from 3 steps { lr = 0.1 }", "an optimizer trains in every step"),
        ("optimizer sgd { lr = 0.1 }", "loss cross_entropy until 3 steps", "the loss holds for the whole run"),
        (None, "lr halve every 2 steps", "holds between its times: remove `every 2 steps`"),
        (None, "mask freeze until 2 steps", "frozen in the whole run: remove `until 2 steps`"),
        (None, "observe idle from 2 steps", "nothing that it does can begin, end or repeat: remove `from 2 steps`"),
        (None, "run from 2 steps { length = 9 steps }", "nothing that it does can begin, end or repeat"),
        (
            None,
            "noise_scale gns on type(LayerNorm) every 3 steps { calibrate = 4 steps }",
            "have a period of their own: remove `every 3 steps`",
        ),
    ],
)  # fmt: skip
def test_a_time_that_cannot_be_obeyed_is_refused_at_plan(
    head: str | None, clause: str, words: str
) -> None:
    text = spec(clause) if head is None else spec(clause, head=head)
    with pytest.raises(trainc.SpecError) as caught:
        trainc.plan(text, model())
    (found,) = caught.value.diagnostics
    assert words in found.message
    assert found.span is not None


def test_calibrations_obey_from_and_until() -> None:
    text = "noise_scale gns on type(LayerNorm) from 2 steps until 5 steps { calibrate = 2 steps }"
    program = trainc.compile(spec(text), model())
    seen = []
    for t in range(STEPS):
        program.step(batch(t))
        assert program._runner.last is not None
        seen.append(bool(program._runner.last.calibrations))
    assert seen == [False, False, True, False, True, False, False]


PACE = 'regularize pace on "0" {times} {{ sigma = 0.5, weight = 0.4 }}'


def with_dropout() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def steps_of(program: Program, count: int = STEPS) -> list[dict[str, float]]:
    torch.manual_seed(2)
    return [program.step(batch(t)) for t in range(count)]


@pytest.mark.parametrize("executor", ["auto", "graph", "module"])
def test_closed_views_and_noise_are_not_there(executor: Any) -> None:
    plain = trainc.compile(spec(), with_dropout())
    closed = trainc.compile(
        spec(PACE.format(times="from 50 steps")), with_dropout(), executor=executor
    )
    examples: list[int] = []
    if executor != "graph":
        closed.module[0].register_forward_hook(lambda m, x, y: examples.append(len(y)))  # type: ignore[index]
    want, got = steps_of(plain), steps_of(closed)
    assert set(examples) == (set() if executor == "graph" else {6})
    for one, other in zip(want, got, strict=True):
        assert (other["consistency"], other["data_loss"]) == (0.0, other["loss"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
    state = closed.module.state_dict()
    for name, tensor in plain.module.state_dict().items():
        if executor == "graph":
            torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("times", TIMES)
def test_views_obey_their_times_by_graph_and_by_modules(times: str) -> None:
    text = spec(PACE.format(times=times), "noise_scale gns on type(LayerNorm)")
    said = {}
    for executor in ("auto", "graph", "module"):
        program = trainc.compile(text, model(), executor=executor)
        said[executor] = [program.step(batch(t)) for t in range(STEPS)]
        assert [one["consistency"] > 0 for one in said[executor]] == [
            TIMES[times](t) for t in range(STEPS)
        ]
        assert program.graph_refused is None
    for one, two, three in zip(*said.values(), strict=True):
        keys = ("loss", "consistency", "gns.noise")
        assert [one[k] for k in keys] == pytest.approx(
            [three[k] for k in keys], rel=1e-9, nan_ok=True
        )
        assert [two[k] for k in keys] == pytest.approx(
            [three[k] for k in keys], rel=1e-9, nan_ok=True
        )


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_closed_distance_of_infinite_logits_is_not_nan(executor: Any) -> None:
    class Masked(nn.Module):
        """The last class is impossible."""

        def __init__(self) -> None:
            super().__init__()
            self.body = model()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.body(x)
            return torch.cat([found, found.new_full((len(x), 1), -math.inf)], 1)

    text = PACE.format(times="from 50 steps").replace('"0"', '"body.0"')
    program = trainc.compile(spec(text), Masked(), executor=executor)
    assert all(math.isfinite(one["loss"]) for one in steps_of(program, 2))


def test_a_saved_program_with_views_obeys_their_times(tmp_path: Path) -> None:
    text = spec(PACE.format(times="every 2 steps"))
    program = trainc.compile(text, model(), executor="graph")
    program.step(batch(0))
    program.save(tmp_path / "saved")
    state = copy.deepcopy(program.state_dict())
    want = [program.step(batch(t)) for t in range(1, 5)]
    loaded = trainc.load(tmp_path / "saved", model(), executor="graph")
    loaded.load_state_dict(state)
    assert [loaded.step(batch(t)) for t in range(1, 5)] == want


@pytest.mark.parametrize(
    "clause",
    ["perturb sam {} {{ rho = 0.1 }}", "lr trust_ratio {}", "observe norm_growth on all {}"],
)
def test_a_clause_that_could_never_act_is_an_error(clause: str) -> None:
    spec = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 10 steps } "
    for times in ("from 5 steps until 2 steps", "from 3 steps until 3 steps", "from 50% until 2%"):
        with pytest.raises(trainc.SpecError, match=r"never acts: `from .*` is not before `until"):
            trainc.compile(spec + clause.format(times), nn.Sequential(nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "clause",
    [
        "perturb sam { rho = 0.1 * depth }",
        "regularize l2_sp on all { weight = 1 - depth }",
        "regularize pace on type(Linear) { sigma = 0.1, weight = depth }",
        "mask magnitude on all { density = 0.5 * depth }",
        'when loss > 1 - depth { warn "late" }',
        "when loss > 1 { batch = 8 samples * depth }",
    ],
)
def test_a_number_for_the_whole_model_cannot_read_the_place_of_a_layer(clause: str) -> None:
    spec = "loss cross_entropy optimizer sgd { lr = 0.1 } "
    with pytest.raises(trainc.SpecError, match="reads `depth`, the place of a layer, but is one"):
        trainc.compile(spec + clause, nn.Sequential(nn.Linear(3, 2)))
