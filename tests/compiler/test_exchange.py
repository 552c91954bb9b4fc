"""Exchanges: what replicas send each other, what makes an exchange impossible, and methods built on it."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler.exchange_processes import cases, of
from trainc.runtime.processes.replica_group import ReplicaGroup, _buckets
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.exchange import Exchange
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Signals, Step

REFUSED = {
    "refused wrapper": r"SiteError: .*wrapper of the model, `DistributedDataParallel`, that averages gradients",
    "other plan": r"from the start, because they differ in their plan: rank 0 has the plan \w+, rank 1 has the plan \w",
    "other weights": r"from the start, because they differ in their starting weights: rank 0 has `0\.weight`",
    "other step": r"they differ in the step: rank 0 has step 6, rank 1 has step 3\. Run the same number of steps",
    "other checkpoint": r"they differ in the step: rank 0 has done 5 steps, rank 1 has done 6 steps\. Resume all",
    "other batch": r"after step 3, because they differ in the size of the batch: rank 0 has 4 samples, rank 1 has",
    "groups of three": r"ClauseFailed: \d replicas cannot be divided into groups of 3: write a number .* \(groups\)$",
    "other tensors": r"differ in what is sent: rank 0 has `4\.bias` torch\.float64 \[3\], rank 1 has `1\.running_mean`",
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", REFUSED)
def test_every_replica_says_why_there_is_no_exchange(case: str, size: int) -> None:
    for result in of(case, size):
        assert isinstance(result, str), result
        assert result.startswith(("SiteError: ", "ValueError: ", "ClauseFailed: "))
        assert re.search(REFUSED[case], result), result


@pytest.mark.slow
def test_a_replica_that_ended_is_noticed() -> None:
    waiting, _ = of("lost", 2)
    assert waiting.startswith("ReplicaLost: rank 0 waited for the other replicas after step 3")


@pytest.mark.slow
def test_a_compiled_model_is_no_wrapper_that_averages() -> None:
    assert all(isinstance(loss, float) for loss in of("compiled", 2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_step_has_the_replicas_that_average_gradients(size: int) -> None:
    assert of("gradients averaged", size) == [size] * size


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size: int) -> None:
    for rank, one in enumerate(of("collectives", size)):
        half, thirds, third, empty = one["mean"]
        mean = sum(range(size)) / size
        # In float32, then rounded: (1 + r / 128) summed in bfloat16 would lose the second term.
        assert half.tolist() == torch.tensor([1, 1 + mean / 128]).bfloat16().tolist()
        assert thirds.tolist() == [[mean] * 3] * 2
        assert torch.equal(third, torch.tensor(0.1).double() / 3)
        assert empty.shape == (0,)
        assert one["sent by means"] == 2 * 4 + 6 * 4 + 8
        assert one["rows"].tolist() == [[r, 0.5] for r in range(size)]
        whole, transposed = one["copied"]
        assert whole.tolist() == [1, 1]
        assert transposed.tolist() == [[1.0] * 3] * 2
        assert one["total"] == sum(range(1, size + 1))
        assert "wrong split" not in one
        pair = rank // 2 * 2
        assert one["part"] == (rank % 2, 2, pair + pair + 1)
        assert one["sent"]


@pytest.mark.slow
def test_all_cases_are_tested() -> None:
    both = {*cases(2), *cases(4)}
    own = Path(__file__).read_text(encoding="utf-8")
    construct = [
        (Path(__file__).parent / "constructs" / name).read_text(encoding="utf-8")
        for name in ("test_local.py", "test_local_rules.py")
    ]
    tested = own + "".join(construct)
    assert {case for case in both if f'"{case}"' not in tested} == set()


# one process


class Counting(Exchange):
    """Counts its turns with a group that is not there."""

    def turn(self, step: Step, replicas: ReplicaGroup) -> None:
        step.metrics["turn"] = 1.0


class Single:
    """One replica of two that agrees with itself."""

    size, sent = 2, 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def agree(self, when: str, facts: Any) -> None:
        self.asked.append(when)
        self.sent += 8


def turns(gate: Gate | None, steps: int) -> tuple[list[str], StepMachine]:
    action, group = Counting("c"), Single()
    action.gate = gate
    machine = StepMachine([action], Clock(), {}, Signals())
    for _ in range(steps):
        machine.begin().exchange_group = group  # type: ignore[assignment]
        machine.finish()
    return group.asked, machine


@pytest.mark.parametrize(
    ("start", "stop", "every", "after"),
    [
        (None, None, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (None, None, 3, [3, 6]),
        (2, None, 3, [2, 5, 8]),
        (None, 6, 2, [2, 4]),
    ],
)
def test_turns_are_after_whole_periods(
    start: int | None, stop: int | None, every: int | None, after: list[int]
) -> None:
    gate = Gate(*(None if n is None else TimeSpan(n, "steps") for n in (start, stop, every)))
    asked, _ = turns(gate, 8)
    assert asked == [f"after step {n}" for n in after]


@pytest.mark.parametrize(
    ("every", "end"),
    [
        (4, "the last after step 8"),
        (7, "the last after step 7; step 8 was each replica's own"),
        (3, "the last after step 6; steps 7 to 8 were each replica's own"),
        (9, "c: no exchange"),
    ],
)
def test_the_summary_names_the_steps_since_the_last_turn(every: int, end: str) -> None:
    _, machine = turns(Gate(every=TimeSpan(every, "steps")), 8)
    told = machine.actions[0].summary_after(machine.clock.steps)
    assert told is not None
    assert told.endswith(end)


def test_the_state_of_an_exchange_is_its_counts() -> None:
    _, machine = turns(None, 3)
    saved = copy.deepcopy(machine.state_dict())
    counts = {"turns": 3, "sent": 24, "last": 3, "replicas": 2, "trained_alone": False}
    assert saved["figures"]["c"] == counts
    _, fresh = turns(None, 0)
    assert fresh.actions[0].summary() == "c: no exchange"
    fresh.load_state_dict(saved)
    assert fresh.actions[0].summary() == machine.actions[0].summary()


def test_small_tensors_share_a_message_and_dtypes_do_not() -> None:
    sizes = [torch.empty(2**22), torch.empty(2**22), torch.empty(1), torch.empty(1).double()]
    assert [len(bucket) for bucket in _buckets(sizes)] == [2, 1, 1]
    assert [len(bucket) for bucket in _buckets([torch.empty(2**24)])] == [1]
    assert list(_buckets([])) == []
