"""SIFT: the intended traces, both executors of the gradient, and resumes at every moment."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.bind.bound_clause import BoundClause, Targets
from trainc.compiler.constructs.mask.sift import Sift
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.runtime.mask.choose_entries import ChooseEntries
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.gradients import Clip
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep, ParamSlot
from trainc.runtime.step.record import Signals, Step

CASE = json.loads((Path(__file__).parents[2] / "reference/masks.json").read_text())["sift"]
NAMES = ("fc1.weight", "fc2.weight", "fc3.weight")
Batch = tuple[Tensor, Tensor]


def tensor(stored: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, stored["dtype"])
    return torch.tensor(stored["data"], dtype=dtype).view(*stored["shape"])


def grid(shape: Sequence[int], scale: float, phase: float) -> Tensor:
    """Return the reference file's numbers: sin(1.7 i + 0.3 + phase) * scale, float32."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(1.7 * i + 0.3 + phase) * scale).float().view(*shape)


class Net(nn.Module):
    """The reference file's model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5, bias=False)
        self.fc2 = nn.Linear(5, 4, bias=False)
        self.fc3 = nn.Linear(4, 3, bias=False)
        for k, parameter in enumerate(self.parameters()):
            parameter.data = grid(parameter.shape, 0.6, 0.7 * k)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))  # type: ignore[no-any-return]


def batches() -> list[Batch]:
    stored = CASE["mask_from_batch0"]
    return [(tensor(x), tensor(y)) for x, y in zip(stored["X"], stored["Y"], strict=True)]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


class Run:
    """A model under the clause, driven as a program drives it."""

    def __init__(
        self,
        rule: Sift,
        model: nn.Module | None = None,
        names: Sequence[str] = NAMES,
        make: Callable[[Any], torch.optim.Optimizer] = adamw,
        decay: float = 0.0,
        clip: float | None = None,
        start: TimeSpan | None = None,
        every: TimeSpan | None = None,
    ) -> None:
        self.model = model or Net()
        self.lowered = LoweredMethod()
        context = LoweringContext(
            self.model,
            build_inventory(self.model),
            UnitConversion(8),
            RunLength(9, "steps"),
            Signals(),
        )
        clause = BoundClause(rule, "sift", tuple(names), start, every=every)
        rule.lower(Lowering(clause, context, self.lowered))
        self.selected: Any = self.lowered.masks
        slots = [
            ParamSlot(name, self.selected[name].values if name in self.selected else p, decay)
            for name, p in self.model.named_parameters()
            if name not in self.lowered.frozen
        ]
        self.optimizer = OptimizerStep("optimizer", slots, make)
        actions = [*self.lowered.actions, self.optimizer]
        if clip is not None:
            actions.append(Clip("clip", clip, slots, "gradient_norm"))
        parameters = dict(self.model.named_parameters())
        self.machine = StepMachine(actions, Clock(), parameters)

    @property
    def choice(self) -> ChooseEntries:
        (action,) = (a for a in self.lowered.actions if isinstance(a, ChooseEntries))
        return action

    def step(self, *micro: Batch, backward: Callable[[Tensor], None] = Tensor.backward) -> Step:
        self.machine.begin()
        for x, y in micro:
            backward(F.cross_entropy(self.model(x), y) / len(micro))
        return self.machine.finish()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint holds, in memory of its own."""
        clone = json.loads(json.dumps(self.machine.state_dict(), default=lambda t: None))
        for name, found in self.machine.state_dict()["actions"].items():
            for key, value in found.items():
                if isinstance(value, Tensor):
                    clone["actions"][name][key] = value.clone()
        return {"machine": clone, "model": self.weights()}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.machine.load_state_dict(state["machine"])
        for entries in self.selected.values():
            entries.read()


RATE = CASE["mask_from_batch0"]["sparse_rate"]


def test_the_choice_is_the_published_one() -> None:
    run = Run(Sift(density=RATE))
    run.step(batches()[0])
    for name, expected in CASE["mask_from_batch0"]["topk"].items():
        index = run.selected[name].index
        assert index is not None
        assert len(index) == expected["k"]
        assert index.tolist() == sorted(expected["flat_idx"])
    assert run.choice.summary() == "sift: 15 of 62 entries in 3 tensors train"


@pytest.mark.parametrize("road", ["hook", "graph", "model.zero_grad"])
def test_the_trace_is_the_intended_one(road: str) -> None:
    expected = CASE["intended_mask_step_then_sparse_adamw_wd0"]
    run = Run(Sift(density=RATE))

    def by_graph(loss: Tensor) -> None:
        names, parameters = zip(*run.model.named_parameters(), strict=True)
        for name, grad in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            run.selected[name].take(grad)

    for batch, row in zip(batches(), expected["trace"], strict=True):
        with torch.no_grad():
            assert float(F.cross_entropy(run.model(batch[0]), batch[1])) == pytest.approx(
                row["loss"]
            )
        run.step(batch, backward=by_graph if road == "graph" else Tensor.backward)
        if road == "model.zero_grad":
            run.model.zero_grad()
        for name, weight in run.weights().items():
            torch.testing.assert_close(weight, tensor(row["W"][name]), rtol=1e-6, atol=1e-7)
    for name in NAMES:
        state = run.optimizer.torch.state[run.selected[name].values]
        torch.testing.assert_close(state["exp_avg"], tensor(expected["m"][name]))
        torch.testing.assert_close(state["exp_avg_sq"], tensor(expected["v"][name]))


def dense_gradients(run: Run, batch: Batch) -> dict[str, Tensor]:
    names, parameters = zip(*run.model.named_parameters(), strict=True)
    loss = F.cross_entropy(run.model(batch[0]), batch[1])
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    "rule",
    [
        Sift(density=RATE),
        Sift(density=0.1, batches=3),
        Sift(density=0.1, scope="global"),
        Sift(density=0.3, scope="global", batches=2),
    ],
)
def test_it_is_the_dense_run_under_a_mask(rule: Sift, decay: float) -> None:
    run = Run(rule, decay=decay)
    first, gradients = run.weights(), []
    for batch in batches():
        gradients.append(dense_gradients(run, batch))
        run.step(batch)

    def make(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tensors, lr=0.01, weight_decay=decay)

    for name, weight in rule.reference(first, gradients, make).items():
        torch.testing.assert_close(run.weights()[name], weight, rtol=1e-6, atol=1e-7)
        if rule.batches < 3:
            assert not torch.equal(weight, first[name]) or rule.scope == "global"


def test_weight_decay_acts_on_the_entries() -> None:
    plain, decayed = Run(Sift(density=RATE)), Run(Sift(density=RATE), decay=0.5)
    for batch in batches():
        plain.step(batch)
        decayed.step(batch)
    for name in NAMES:
        apart = (plain.weights()[name] - decayed.weights()[name]).flatten().nonzero()[:, 0]
        index = plain.selected[name].index
        assert index is not None
        assert apart.tolist() == index.tolist()


def test_clipping_acts_on_the_entries() -> None:
    run = Run(Sift(density=RATE), clip=1e-4)
    first, second, *_ = batches()
    assert run.step(first).metrics["gradient_norm"] == 0.0
    dense = dense_gradients(run, second)
    indices = [(n, c.index) for n, c in run.selected.items() if c.index is not None]
    picked = torch.cat([dense[n].flatten()[i] for n, i in indices])
    found = run.step(second).metrics["gradient_norm"]
    assert found == pytest.approx(float(picked.norm()), rel=1e-5)


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulated_micro_batches_are_one_batch(pieces: int) -> None:
    whole, split = Run(Sift(density=RATE)), Run(Sift(density=RATE))
    for x, y in batches():
        whole.step((x, y))
        split.step(*zip(x.chunk(pieces), y.chunk(pieces), strict=True))
    for name, weight in whole.weights().items():
        torch.testing.assert_close(split.weights()[name], weight, rtol=1e-5, atol=1e-6)


def test_several_batches_choose_as_one_large_batch() -> None:
    (x0, y0), (x1, y1), *_ = batches()
    apart, together = Run(Sift(density=RATE, batches=2)), Run(Sift(density=RATE))
    apart.step((x0, y0))
    assert all(entries.index is None for entries in apart.selected.values())
    apart.step((x1, y1))
    together.step((torch.cat([x0, x1]), torch.cat([y0, y1])))
    for name in NAMES:
        one, two = apart.selected[name].index, together.selected[name].index
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
    assert all(torch.equal(w, Net().get_parameter(n)) for n, w in apart.weights().items())


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "rule", [Sift(density=RATE, batches=2), Sift(density=0.1, batches=2, scope="global")]
)
def test_a_resumed_run_is_the_uninterrupted_one(rule: Sift, at: int) -> None:
    whole, resumed = Run(rule, decay=0.1), Run(rule, decay=0.1)
    for batch in batches()[:3]:
        resumed.step(batch)
    for i, batch in enumerate(batches()):
        if i == at:
            resumed.restore(whole.state())
        whole.step(batch)
        if i >= at:
            resumed.step(batch)
    for name, weight in whole.weights().items():
        assert torch.equal(resumed.weights()[name], weight)
    for name, entries in whole.selected.items():
        assert torch.equal(resumed.selected[name].values, entries.values)


def test_half_precision_resumes_with_its_master_copy() -> None:
    whole, resumed = (Run(Sift(density=RATE), Net().bfloat16()) for _ in range(2))
    data = [(x.bfloat16(), y) for x, y in batches()]
    for batch in data[:3]:
        whole.step(batch)
    resumed.restore(whole.state())
    for batch in data[3:]:
        whole.step(batch)
        resumed.step(batch)
    for name, entries in whole.selected.items():
        assert entries.values.dtype == torch.float32
        assert not torch.equal(entries.values, entries.values.bfloat16().float())
        assert torch.equal(resumed.selected[name].values, entries.values)
        assert torch.equal(resumed.weights()[name], whole.weights()[name])


def test_a_checkpoint_of_other_tensors_is_refused() -> None:
    run, fewer = Run(Sift(density=RATE)), Run(Sift(density=RATE), names=NAMES[:2])
    run.step(batches()[0])
    with pytest.raises(ValueError, match=r"the checkpoint has a mask of `fc3.weight`"):
        fewer.choice.load_state_dict(run.choice.state_dict())


def test_no_dense_gradient_survives() -> None:
    run = Run(Sift(density=RATE))
    for batch in batches():
        run.step(batch)
        assert all(p.grad is None for p in run.model.parameters())
    F.cross_entropy(run.model(batches()[0][0]), batches()[0][1]).backward()
    assert all(p.grad is None for p in run.model.parameters())


def test_a_tensor_nobody_used_waits() -> None:
    model = Net()
    model.spare = nn.Linear(3, 3, bias=False)
    before = model.spare.weight.detach().clone()
    run = Run(Sift(density=RATE), model, (*NAMES, "spare.weight"), decay=0.5)
    for batch in batches():
        run.step(batch)
    assert torch.equal(model.spare.weight, before)
    line = run.choice.summary()
    assert line is not None
    assert line.endswith("3 tensors train; 1 had no gradient to choose by and did not train")


def test_a_gradient_that_is_not_finite_chooses_nothing() -> None:
    run = Run(Sift(density=RATE))
    x, y = batches()[0]
    step = run.step((x * math.nan, y))
    assert step.notes == ["sift choice: a gradient is not finite, so this step is not counted"]
    assert all(p.grad is None for p in run.model.parameters())
    run.step((x, y))
    expected = CASE["mask_from_batch0"]["topk"]
    for name, entries in run.selected.items():
        assert entries.index is not None
        assert entries.index.tolist() == sorted(expected[name]["flat_idx"])


def test_the_choice_waits_for_its_start() -> None:
    run = Run(Sift(density=RATE), start=TimeSpan(2, "steps"))
    for i, batch in enumerate(batches()):
        run.step(batch)
        assert (run.choice.selected["fc1.weight"].index is not None) == (i >= 2)
        assert all(torch.equal(w, Net().get_parameter(n)) for n, w in run.weights().items()) == (
            i <= 2
        )


@pytest.mark.parametrize("rest", ["train", "freeze"])
def test_the_rest_trains_or_not(rest: Any) -> None:
    run = Run(Sift(density=RATE, rest=rest), names=NAMES[1:])
    for batch in batches():
        run.step(batch)
    moved = not torch.equal(run.weights()["fc1.weight"], Net().fc1.weight)
    assert moved == (rest == "train")
    assert run.lowered.frozen == (set() if rest == "train" else {"fc1.weight"})


def test_the_rest_is_frozen_whatever_the_times_of_the_choice_are() -> None:
    """As LIFT has it: entries are chosen again and again, and nothing else trains."""
    model = Net()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = trainc.compile(
        'loss cross_entropy optimizer adamw { lr = 0.01 } mask sift on "fc2" every 2 steps until 5 steps'
        " { density = 20%, select = principal(1), rest = freeze }",
        model,
        executor="module",
    )
    for batch in batches():
        program.step(batch)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"fc2.weight"}


@pytest.mark.parametrize(("structure", "units"), [("row", (1, 4)), ("column", (1, 5))])
def test_whole_rows_or_columns_are_chosen_by_their_norm(
    structure: Any, units: tuple[int, int]
) -> None:
    run = Run(Sift(density=0.1, structure=structure), names=["fc2.weight"])
    batch = batches()[0]
    gradient = dense_gradients(run, batch)["fc2.weight"]
    run.step(batch)
    index = run.selected["fc2.weight"].index
    assert index is not None
    mask = torch.zeros(20, dtype=torch.bool).scatter_(0, index.long(), True).view(4, 5)
    norms = gradient.norm(dim=1 if structure == "row" else 0)
    full = mask.all(1) if structure == "row" else mask.all(0)
    assert full.nonzero()[:, 0].tolist() == [int(norms.argmax())]
    assert int(mask.sum()) == units[0] * (5 if structure == "row" else 4)


def test_everything_is_no_mask_bit_for_bit() -> None:
    """A clause at 100% is dropped; from the step after the choice even a full mask is no mask."""
    assert Sift(density=1).identity_setting()
    assert not Sift(density=0.99).identity_setting()
    run, plain = Run(Sift(density=1)), Net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    first, *later = batches()
    run.step(first)
    for x, y in later:
        run.step((x, y))
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for name, weight in run.weights().items():
        assert torch.equal(weight, plain.get_parameter(name))


def test_how_many_stored_weights_moved_is_reported() -> None:
    run = Run(Sift(density=RATE))
    moved = [run.step(batch).metrics["sift.moved"] for batch in batches()]
    assert moved == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_memory_is_that_of_entries_and_sums() -> None:
    run = Run(Sift(density=RATE, batches=2))
    first, second, *_ = batches()
    held = 4 * 15 + (
        2 * 15 + 3 * 4
    )  # values, 16-bit offsets, and the counts of a block of each tensor
    assert run.choice.memory() == held
    run.step(first)
    assert run.choice.memory() == held + 4 * 62
    run.step(second)
    assert run.choice.memory() == held


def test_what_cannot_train_is_an_error() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
    model[1].weight.requires_grad_(False)
    inventory = build_inventory(model)
    problems = list(
        Sift(density=0.1).validate_targets(Targets(inventory, (), inventory.parameters))
    )
    assert [(p.rule, p.severity) for p in problems] == [("selector-matches-frozen", "error")]
    rows = Sift(density=0.1, structure="row")
    chosen = tuple(p for p in inventory.parameters if p.trainable)
    (problem,) = rows.validate_targets(Targets(inventory, (), chosen))
    assert problem.rule == "wrong-target-kind"
    assert problem.message == "`1.bias` is not a matrix, so it has no rows"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"density": 0}, "above 0%"),
        ({"density": 1.5}, "between 0 and 1"),
        ({"density": 0.1, "scope": "global", "structure": "row"}, "scope = tensor"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sift(**fields)


def test_a_choice_without_every_is_for_good() -> None:
    model = Net()
    context = LoweringContext(
        model, build_inventory(model), UnitConversion(8), RunLength(9, "steps"), Signals()
    )
    rule = Sift(density=0.1)
    clause = BoundClause(rule, "sift", NAMES, stop=TimeSpan(2, "steps"))
    with pytest.raises(ValueError, match=r"chosen once.*remove `until 2 steps`"):
        rule.lower(Lowering(clause, context, LoweredMethod()))


@pytest.mark.parametrize("select", ["gradient", "magnitude", "movement", "random", "principal(1)"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_entries_that_stay_keep_their_moments(select: Any, scope: Any) -> None:
    """Dense AdamW by hand, whose moments are set to 0 where an entry is not chosen."""
    rule = Sift(density=0.2, select=select, scope=scope, batches=1)
    run = Run(rule, decay=0.1, every=TimeSpan(2, "steps"))
    wanted = run.weights()
    m = {n: torch.zeros_like(w) for n, w in wanted.items()}
    v, mask = {n: w.clone() for n, w in m.items()}, {n: w.bool() for n, w in m.items()}
    t, moved = dict.fromkeys(m, 0), 0
    for i, batch in enumerate(batches()):
        gradients = dense_gradients(run, batch)
        before = mask
        run.step(batch)
        after = {n: one.trained_entries() for n, one in run.selected.items()}
        by_weights = select not in ("gradient", "movement")
        if i % 2 == 0 and by_weights:
            mask = after
        for n, w in wanted.items():
            moved += int((mask[n] & ~before[n]).sum()) if i else 0
            m[n], v[n] = m[n] * (before[n] & mask[n]), v[n] * (before[n] & mask[n])
            if not mask[n].any():
                continue
            t[n] += 1
            g = gradients[n]
            m[n] = torch.where(mask[n], 0.9 * m[n] + 0.1 * g, 0)
            v[n] = torch.where(mask[n], 0.999 * v[n] + 0.001 * g * g, 0)
            m_hat, v_hat = m[n] / (1 - 0.9 ** t[n]), v[n] / (1 - 0.999 ** t[n])
            new = w * (1 - 0.01 * 0.1) - 0.01 * m_hat / (v_hat.sqrt() + 1e-8)
            wanted[n] = torch.where(mask[n], new, w)
        if i % 2 == 0 and not by_weights:
            mask, old = after, mask
            for n in m:
                m[n], v[n] = m[n] * (old[n] & mask[n]), v[n] * (old[n] & mask[n])
                moved += int((mask[n] & ~old[n]).sum()) if i else 0
        for n, w in run.weights().items():
            torch.testing.assert_close(w, wanted[n], rtol=1e-5, atol=1e-7)
    assert moved or select in ("magnitude", "principal(1)")


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after six AdamW steps, by the program and by dense masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    first = {name: model.get_parameter(name).detach().clone() for name in names}
    spec = """loss cross_entropy mask sift on ndim(2) { density = 20%, batches = 2, rest = freeze }
    optimizer adamw { lr = 0.05, weight_decay = 0.3 }"""
    program = trainc.compile(spec, model)
    gradients = []
    for _ in range(6):
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
        loss = F.cross_entropy(model(x), y)
        found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        gradients.append(dict(zip(names, found, strict=True)))
        program.step((x, y))

    def make(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tensors, lr=0.05, weight_decay=0.3)

    reference = Sift(density=0.2, batches=2).reference(first, gradients, make)
    return {name: model.get_parameter(name).detach() for name in names}, reference


def test_a_weight_without_singular_values_chooses_nothing_by_them() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = torch.nan
    program = trainc.compile(
        "run { length = 9 steps, on_nan = continue } loss mse optimizer sgd { lr = 0 }"
        " mask sift on ndim(2) { density = 20%, select = principal(1) }",
        model,
    )
    batch = torch.randn(4, 6), torch.randn(4, 3)
    program.step(batch)
    assert program.report().notes[0].startswith("sift: `0.weight` has entries that are not finite")
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = 0.1
    program.step(batch)
    assert not any("not finite" in one for one in program.report().notes)
