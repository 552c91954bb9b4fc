"""When policies measure, and what: parts in turn, a budget of time, and processes that each measure a part."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.lr.temp_balance import TempBalance
from trainc.compiler.driver.train import train
from trainc.functional import hill_alpha
from trainc.runtime.factors.action import BalanceFactors
from trainc.runtime.factors.refresh import LEAST, Refresh, cost, divided, owners, shared
from trainc.runtime.factors.unmoved import Unmoved
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.record import Signals, Step
from trainc.runtime.storage.checkpoint import load_checkpoint, save_checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

SPEC = """train 1
loss cross_entropy
run { length = 1000 steps, on_nan = skip }
optimizer sgd { lr = 0.5 }
lr temp_balance on ndim(2) %s { min_eigenvalues = 4, metric = alpha %s }
"""
BATCH = (torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 8)


def program(every: str, fields: str) -> tuple[trainc.Program, BalanceFactors]:
    torch.manual_seed(1)
    widths = (24, 40, 16, 32, 8)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    made = trainc.compile(SPEC % (every, fields), nn.Sequential(*layers).double())
    (action,) = (a for a in made.execution.method.actions if isinstance(a, BalanceFactors))
    return made, action


def steps(made: trainc.Program, count: int) -> list[dict[str, Tensor]]:
    """Step, and return the weights from before each step."""
    found = []
    for _ in range(count):
        found.append({n: p.detach().clone() for n, p in made.module.named_parameters()})
        made.step((BATCH[0].double(), BATCH[1]))
    return found


class Ticks:
    """Seconds that pass as told: of every step, and of a measurement."""

    def __init__(self, step: float, measurement: float) -> None:
        self.time, self.each, self.measurement, self.calls = 0.0, step, measurement, 0

    def attach(self, action: BalanceFactors) -> None:
        refresh, begin = action.measuring.refresh, action.measuring.refresh.begin
        refresh.now = lambda: self.time

        def began(costs: Sequence[float]) -> list[int]:
            due = begin(costs)
            self.time += self.measurement
            return due

        cast(Any, refresh).begin = began


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_parts_hold_everything_once_and_differ_by_no_more_than_the_dearest(parts: int) -> None:
    costs = [cost(shape) for shape in ((64, 64), (256, 64), (8, 8), (64, 64), (16, 4, 3, 3))]
    found = divided(costs, parts)
    assert sorted(i for part in found for i in part) == [*range(len(costs))]
    sums = [sum(costs[i] for i in part) for part in found]
    assert max(sums) - min(sums) <= max(costs)
    assert found == divided(costs, parts)


def test_a_part_at_a_time_is_measured_in_turn_and_the_rest_is_as_it_was() -> None:
    made, action = program("every 5 steps", ", parts = 3")
    weights = steps(made, 21)
    parts = [*action.parts.values()]
    found = divided([cost(part.shape) for part in parts], 3)
    for part, last in zip(found, (20, 10, 15), strict=True):  # all at 0, then a part each 5 steps
        for i in part:
            expected = hill_alpha(weights[last][parts[i].weight])
            assert action.alphas[parts[i].name] == pytest.approx(expected, rel=1e-12)


def test_the_budget_sets_the_interval_and_again_where_times_have_changed() -> None:
    made, action = program("", ", budget = 2%")
    ticks = Ticks(0.125, 0.0625)
    ticks.attach(action)
    said: list[str] = []
    at: dict[int, int] = {}
    for number in range(143):
        if number == 35:
            ticks.each, ticks.measurement = 0.0625, 0.0703125
        made.step((BATCH[0].double(), BATCH[1]))
        ticks.time += ticks.each
        report = made.report()
        said += report.notes
        if report.series:
            at[number] = report.decided.get("temp_balance", 0)
    # 1/16 s is 2 % of 25 steps of 1/8 s; an eighth more changes nothing, until most steps seen are those of 1/16 s.
    assert at == {0: 0, LEAST: 25, 35: 25, 60: 25, 85: 57, 142: 57}
    assert said == [
        f"temp_balance: measures every {steps} steps: {times} s, and the budget is 2 %"
        for steps, times in (
            (25, "a measurement takes 0.0625 s, a step 0.125"),
            (57, "a measurement takes 0.0703 s, a step 0.0625"),
        )
    ]


PARTS = """
import torch
from torch import nn

class Split:
    def __len__(self):
        return 32
    def batch(self, indices):
        return torch.randn(len(indices), 24), torch.tensor(indices) % 8

class data:
    tokens_per_sample, train, evaluation = 1, Split(), None

def model():
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 8))
"""
RUN = """model "parts:model"
data "parts:data" { batch = 8 samples }
loss cross_entropy
run { length = 60 steps, seed = 1, checkpoint = 30 steps, keep = 9 }
optimizer sgd { lr = 0.1 }
lr temp_balance on ndim(2) { min_eigenvalues = 4, metric = alpha, budget = 2% }
"""


def test_a_run_killed_before_its_save_decides_as_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "spec.train").write_text(RUN)
    chosen = iter([12, 15, *[90] * 9])
    monkeypatch.setattr(Refresh, "_choose", lambda *_: next(chosen))
    out = tmp_path / "out"

    def trained(**options: Any) -> list[int]:
        train(tmp_path / "spec.train", out, quiet=True, **options)
        return [r["step"] - 1 for r in read_jsonl(out / "metrics.jsonl") if "series" in r]

    assert trained() == [0, 10, 22, 37]
    metrics = (out / "metrics.jsonl").read_bytes()
    chosen = iter([11] * 9)  # by the times of a faster machine, which the run does not ask
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    assert trained(resume=True) == [0, 10, 22, 37]
    assert (out / "metrics.jsonl").read_bytes() == metrics
    # Under another spec it decides anew, and then goes on so.
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    (tmp_path / "spec.train").write_text(RUN.replace("2%", "3%"))
    assert trained(resume=True, accept=True) == [0, 10, 22, 37, 48, 59]
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    chosen = iter([90] * 9)
    assert trained(resume=True) == [0, 10, 22, 37, 48, 59]


def test_a_measurement_is_no_more_often_than_the_clause_says() -> None:
    made, action = program("every 40 steps", ", budget = 50%")
    Ticks(1.0, 0.01).attach(action)
    at = []
    for number in range(90):
        made.step((BATCH[0].double(), BATCH[1]))
        at += [number] * bool(made.report().series)
    assert at == [0, 40, 80]


@pytest.mark.parametrize(
    "fields", [", parts = 2", ", budget = 5%", ", budget = 5%, parts = 3", ", tolerance = 1"]
)
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(fields: str, tmp_path: Path) -> None:
    def made() -> tuple[trainc.Program, BalanceFactors, Ticks]:
        one, action = program("", fields)
        ticks = Ticks(0.1, 0.2)
        ticks.attach(action)
        return one, action, ticks

    whole, action, ticks = made()
    decided = {}
    for number in range(130):
        if number == 45:
            state = load_checkpoint(save_checkpoint(tmp_path, number, whole.state_dict()))
        whole.step((BATCH[0].double(), BATCH[1]))
        ticks.time += ticks.each
        decided[number + 1] = whole.report().decided
    other, resumed, slow = made()
    slow.measurement = 3.0  # what was chosen stays, whatever the machine does after
    other.load_state_dict(state)
    other.recall(decided)
    for _ in range(45, 130):
        other.step((BATCH[0].double(), BATCH[1]))
        slow.time += slow.each
    assert action.measurements == resumed.measurements > 1
    assert action.alphas == resumed.alphas
    assert action.measuring.refresh.state_dict() == resumed.measuring.refresh.state_dict()
    pairs = zip(whole.module.parameters(), other.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Peers:
    """Processes in one: `gather_rows` returns what each of them gave."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.rows = size, 0, cast("list[list[float]]", [])

    def gather_rows(self, numbers: Sequence[float]) -> Tensor:
        self.rows[self.rank] = [*numbers]
        return torch.tensor(self.rows, dtype=torch.float64)


def test_processes_measure_a_part_each_and_have_all_figures() -> None:
    costs = {"a": 5.0, "b": 1.0, "c": 3.0, "d": 2.0}
    figures = {"a": (0.1, 1.0), "b": (float("nan"), 2.0), "c": (0.3, 3.0), "d": (0.4, 4.0)}
    peers = Peers(3)
    peers.rows = [[float("nan")] * 8 for _ in range(3)]
    group = cast(ReplicaGroup, peers)
    ranks = owners(costs, group)
    assert ranks == {"a": 0, "b": 2, "c": 1, "d": 2}
    for peers.rank in (0, 1, 2):
        own = {name: figures[name] for name in costs if ranks[name] == peers.rank}
        found = shared([*costs], ranks, own, group)
    assert [x for n in costs for x in found[n]] == pytest.approx(
        [x for n in costs for x in figures[n]], nan_ok=True
    )
    assert set(owners(costs, None).values()) == {0}


def test_what_cannot_have_moved_alpha_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    measure = TempBalance.measure_with_room

    def counted(of: TempBalance, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        sizes.append(len(weights))
        return measure(of, weights)

    monkeypatch.setattr(TempBalance, "measure_with_room", counted)
    made, action = program("every 2 steps", ", tolerance = 0.05")
    step = (BATCH[0].double(), BATCH[1])
    made.step(step)
    first, moved = dict(action.alphas), [*action.parts.values()][1].weight
    copies, rooms = action.measuring.unmoved.copies, action.measuring.unmoved.rooms  # type: ignore[union-attr]
    assert action.memory() == sum(copy.nbytes for copy in copies.values()) > 0
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if name in rooms:
                change = torch.randn(weight.shape, generator=source).double()
                size = (1.01 if name == moved else 0.99) * rooms[name]
                weight.copy_(copies[name][0] + size * change / change.norm())
    here = {n: p.detach().clone() for n, p in made.module.named_parameters()}
    action.run(Step(Clock(2), dict(made.module.named_parameters()), Signals(), 16, 16))
    assert sizes == [4, 1]
    for name, part in action.parts.items():
        now = hill_alpha(here[part.weight])
        if part.weight == moved:
            assert action.alphas[name] == pytest.approx(now, rel=1e-12)
        else:
            assert action.alphas[name] == first[name] != now
            assert abs(now - first[name]) <= 0.05


@pytest.mark.parametrize(
    "wrong",
    ["budget = 0%", "budget = 100%", "parts = 0", "tolerance = 0", "tolerance = 1, fit = dks"],
)
def test_limits_of_the_fields(wrong: str) -> None:
    found = trainc.check(SPEC % ("", f", {wrong}"))
    assert [d.rule for d in found.diagnostics] in (["bad-value"], ["out-of-range"])
    assert Refresh().is_due(0)


def test_complex_weights_are_known_not_to_have_moved() -> None:
    kept = Unmoved()
    weight = torch.randn(1, 8, 8, dtype=torch.complex64)
    kept.measured("w", weight, 0.1)
    assert kept.moved({"w": weight + 0.1j / 16}, None) == set()
    assert kept.moved({"w": weight + 0.1j / 4}, None) == {"w"}
