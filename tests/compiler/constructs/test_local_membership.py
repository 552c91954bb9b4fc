"""Replicas that leave and join, against a simulation one after the other; a stand-in for torchft says who meets."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trainc
from tests.compiler.exchange_cases import EVERY_3, OUTER, SGD, STATE_TOO, data, net, state
from tests.compiler.members import Died, Meeting, Member, Members, stand_in
from trainc.compiler.driver.train import train
from trainc.compiler.errors import SiteError
from trainc.compiler.program import exchange_replicas
from trainc.compiler.program.program import Program
from trainc.dsl.text.errors import SpecError
from trainc.runtime.processes import torchft_connection
from trainc.runtime.processes.elastic_group import ElasticGroup, OtherReplica, Standing
from trainc.runtime.processes.replica_group import Fact, ReplicaLost
from trainc.runtime.processes.torchft_connection import WrongReplica, find_place
from trainc.runtime.step.action import ClauseFailed

AVERAGE = SGD + EVERY_3 + " { membership = torchft }"
ELASTIC_OUTER = OUTER[: OUTER.rindex("}")] + ", membership = torchft }"
ELASTIC_STATE = STATE_TOO[: STATE_TOO.rindex("}")] + ", membership = torchft }"
ALL = (0, 1, 2)
BOTH = [(AVERAGE, False), (ELASTIC_OUTER, True)]


class Replica:
    """A replica of a test: its program, and what it had after each step."""

    def __init__(self, members: Members, of: Any, number: int, spec: str, **more: Any) -> None:
        self.members, self.of, self.number, self.spec = members, of, number, spec
        self.seed, self.rows, self.last = (
            more.get("seed", 0),
            more.get("rows", 5),
            more.get("last", 7),
        )
        self.saved, self.waits = more.get("saved"), more.get("waits")
        self.before: Callable[[Program], None] = more.get("before", lambda program: None)
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.clocks: dict[int, tuple[int, int]] = {}
        self.states: dict[int, Any] = {}
        self.series: dict[int, Any] = {}
        self.notes: list[str] = []

    def __call__(self) -> None:
        if self.waits is not None:
            self.members.wait(lambda: self.waits in self.members.ended)
        self.of.number = self.number
        self.program = program = trainc.compile(self.spec, net(self.seed))
        if self.saved is not None:
            program.load_state_dict(self.saved)
        program.begin()
        while (done := program.clock.steps) < self.last:
            self.before(program)
            metrics = program.step(data(self.number, done, self.rows))
            step = program.clock.steps
            self.weights[step], self.metrics[step] = state(program), metrics
            self.clocks[step] = program.clock.samples, program.clock.tokens
            self.states[step] = copy.deepcopy(program.state_dict())
            report = program.report()
            self.series[step] = report.series.get("local.loss", {})
            self.notes += report.notes


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[dict[str, Replica], dict[str, Any]]]:
    """Run replicas through meetings: each as `(name, number, options)`; return them, and how they ended."""

    def ran(
        spec: str, meetings: Sequence[Meeting], replicas: Sequence[tuple[str, int, dict[str, Any]]]
    ) -> tuple[dict[str, Replica], dict[str, Any]]:
        members = Members(meetings)
        of = stand_in(monkeypatch, members)
        made = {
            name: Replica(members, of, number, **({"spec": spec} | more))
            for name, number, more in replicas
        }
        return made, members.run(made)

    return ran


def three(**more: Any) -> list[tuple[str, int, dict[str, Any]]]:
    return [(str(number), number, dict(more)) for number in ALL]


def simulated(
    turns: Mapping[int, Sequence[int]],
    last: int = 7,
    outer: bool = False,
    joins: int = 0,
    source: int = 0,
) -> dict[int, dict[int, dict[str, Tensor]]]:
    """Return what three replicas have after each step: in turns the mean is over some, and the others have no more.

    Replica 2 is a copy of `source` after the turn that follows step `joins`.
    """
    models = [net() for _ in ALL]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    found: dict[int, dict[int, dict[str, Tensor]]] = {number: {} for number in ALL}
    agreed = [p.detach().clone() for p in models[0].parameters()]
    momentum: list[Tensor] = []
    there = set(ALL)
    for step in range(1, last + 1):
        for number in there:
            x, y = data(number, step - 1)
            optimizers[number].zero_grad()
            F.mse_loss(models[number](x), y).backward()
            optimizers[number].step()
        if (counted := turns.get(step)) is not None:
            there = {*counted}
            kept = [models[number] for number in counted]
            means = [
                torch.stack([*same]).mean(0).detach()
                for same in zip(*(m.parameters() for m in kept), strict=True)
            ]
            if outer:
                deltas = [a - m for a, m in zip(agreed, means, strict=True)]
                momentum = (
                    [0.9 * m + d for m, d in zip(momentum, deltas, strict=True)]
                    if momentum
                    else deltas
                )
                means = [
                    a - 0.7 * (d + 0.9 * m)
                    for a, d, m in zip(agreed, deltas, momentum, strict=True)
                ]
                agreed = means
            buffers = [
                torch.stack([*same]).mean(0)
                for same in zip(
                    *([b for b in m.buffers() if b.is_floating_point()] for m in kept), strict=True
                )
            ]
            for model in kept:
                for p, mean in zip(model.parameters(), means, strict=True):
                    p.data.copy_(mean)
                for b, mean in zip(
                    (b for b in model.buffers() if b.is_floating_point()), buffers, strict=True
                ):
                    b.copy_(mean)
        if step == joins:
            there = {*ALL}
            models[2].load_state_dict(models[source].state_dict())
            optimizers[2].load_state_dict(copy.deepcopy(optimizers[source].state_dict()))
        for number in there:
            found[number][step] = {n: t.clone() for n, t in models[number].state_dict().items()}
    return found


def assert_near(
    replica: Replica, expected: dict[int, dict[str, Tensor]], steps: Sequence[int]
) -> None:
    for step in steps:
        for name, value in replica.weights[step].items():
            torch.testing.assert_close(value, expected[step][name], rtol=1e-12, atol=1e-12)


def assert_same(one: Replica, other: Replica, step: int) -> None:
    assert all(torch.equal(one.weights[step][n], other.weights[step][n]) for n in one.weights[step])


@pytest.mark.parametrize(("spec", "outer"), BOTH)
def test_where_nobody_leaves_turns_are_those_of_fixed_replicas(
    run: Any, spec: str, outer: bool
) -> None:
    found, ends = run(spec, [Meeting(ALL) for _ in range(3)], three())
    assert ends == {"0": None, "1": None, "2": None}
    expected = simulated({3: ALL, 6: ALL}, outer=outer)
    for number, one in enumerate(found.values()):
        assert_near(one, expected[number], range(1, 8))
        assert [m.get("local.replicas") for m in one.metrics.values()] == [
            None,
            None,
            3,
            None,
            None,
            3,
            None,
        ]
        assert one.metrics[3]["local.bytes"] > 8 * sum(p.numel() for p in net().parameters())
        losses = [other.metrics[3]["loss"] for other in found.values()]
        assert one.series[3] == {f"replica {n}": loss for n, loss in enumerate(losses)}
        assert one.metrics[3]["local.loss_high"] == max(losses)
        assert one.metrics[3]["local.distance"] == found["0"].metrics[3]["local.distance"] > 0
        assert "local: 2 exchanges between 3 replicas" in one.program.summary()[-1]
        assert (len(one.notes) == 0) == (
            number == 0
        )  # the others say that they begin with the weights of 0
    assert_same(found["0"], found["2"], 6)


def test_other_starting_weights_become_those_of_the_first(run: Any) -> None:
    found, _ = run(
        AVERAGE,
        [Meeting(ALL), Meeting(ALL)],
        [("0", 0, {"last": 3}), ("1", 1, {"seed": 7, "last": 3}), ("2", 2, {"last": 3})],
    )
    assert_near(found["1"], simulated({3: ALL}, last=3)[1], [1, 2, 3])
    assert "local: this replica begins with the weights of another" in found["1"].notes


@pytest.mark.parametrize(("spec", "outer"), BOTH)
def test_after_one_left_the_mean_is_over_those_left(run: Any, spec: str, outer: bool) -> None:
    meetings = [Meeting(ALL), Meeting(ALL), Meeting((0, 1))]
    found, ends = run(spec, meetings, [*three()[:2], ("2", 2, {"last": 4})])
    assert not any(ends.values())
    expected = simulated({3: ALL, 6: (0, 1)}, outer=outer)
    for number in (0, 1):
        assert_near(found[str(number)], expected[number], range(1, 8))
        assert found[str(number)].metrics[6]["local.replicas"] == 2
        assert [*found[str(number)].series[6]] == ["replica 0", "replica 1"]
        assert (
            "local: 2 replicas in the turn after step 6, and 3 before" in found[str(number)].notes
        )


@pytest.mark.parametrize("spec", [AVERAGE, ELASTIC_OUTER, ELASTIC_STATE])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_turn_in_which_one_dies_changes_nothing(run: Any, spec: str, at: int) -> None:
    """In the first sum replicas compare, in the others they average: weights, then what goes with them."""
    meetings = [Meeting(ALL), Meeting(ALL, dies=(2, at)), Meeting((0, 1))]
    found, ends = run(spec, meetings, three())
    assert isinstance(ends.pop("2"), Died)
    assert not any(ends.values())
    alone = trainc.compile(spec.split("distribute")[0], net())
    for step in range(3):
        alone.step(data(0, step))
    first = found["0"]
    assert all(torch.equal(first.weights[3][name], t) for name, t in state(alone).items())
    assert first.metrics[3]["local.replicas"] == 0
    failed = "local: the meeting after step 3 failed, and this replica goes on as it was: a connection was closed"
    assert failed in first.notes
    assert first.program.summary()[-1].count("1 meeting failed and changed nothing") == 1
    if spec != ELASTIC_STATE:
        outer = spec == ELASTIC_OUTER
        assert_near(first, simulated({6: (0, 1)}, outer=outer)[0], range(1, 8))
    assert_same(first, found["1"], 6)


@pytest.mark.parametrize(("spec", "outer"), BOTH)
def test_one_that_joins_waits_for_a_turn_and_goes_on_as_a_living_one(
    run: Any, spec: str, outer: bool
) -> None:
    meetings = [Meeting(ALL), Meeting(ALL), Meeting((0, 1)), Meeting(ALL), Meeting(ALL)]
    again = {"last": 13, "seed": 5, "waits": "2"}
    replicas = [*three(last=13)[:2], ("2", 2, {"last": 4}), ("again", 2, again)]
    found, ends = run(spec, meetings, replicas)
    assert not any(ends.values()), ends
    turns = {3: ALL, 6: (0, 1), 9: (0, 1), 12: ALL}
    expected = simulated(turns, last=13, outer=outer, joins=9)
    for name, number in (("0", 0), ("1", 1), ("again", 2)):
        one = found[name]
        assert_near(one, expected[number], range(10, 14))
        assert one.metrics[12]["local.replicas"] == 3
    new = found["again"]
    assert [*new.weights] == [10, 11, 12, 13]
    assert new.clocks == {step: found["0"].clocks[step] for step in new.clocks}
    told = "local: this replica was behind the others, and goes on with the state of one that has done 9 steps"
    assert new.notes == [told, "local: 3 replicas in the turn after step 12, and 2 before"]
    assert found["0"].metrics[9]["local.replicas"] == 2


def test_one_that_fell_behind_takes_over_in_its_own_turn(run: Any) -> None:
    """The turn after step 3 holds for 0 and 1 and not for 2, which has another clock in samples."""
    meetings = [Meeting(ALL), Meeting(ALL, fails=(2,)), Meeting(ALL), Meeting(ALL)]
    replicas = [("0", 0, {"last": 10}), ("1", 1, {"last": 10}), ("2", 2, {"last": 10, "rows": 4})]
    found, ends = run(ELASTIC_OUTER, meetings, replicas)
    assert not any(ends.values())
    late = found["2"]
    assert late.metrics[3]["local.replicas"] == 0
    assert "local.distance" not in late.metrics[3]
    assert [*late.series[6]] == [*found["0"].series[6]] == ["replica 0", "replica 1"]
    assert late.metrics[6]["local.replicas"] == 2
    expected = simulated({3: ALL, 6: (0, 1)}, outer=True, last=6)
    assert expected
    for step in (6, 9):
        assert_same(late, found["0"], step)
        assert_same(late, found["1"], step)
    assert late.clocks[6] == found["0"].clocks[6]
    assert late.clocks[3] != found["0"].clocks[3]
    assert late.states[6]["figures"]["local"]["turns"] == 2
    told = "local: this replica was behind the others, and goes on with the state of one that has done 6 steps"
    assert told in late.notes
    optimizer = [one.states[6]["actions"] for one in (late, found["0"])]
    assert all(
        torch.equal(value, optimizer[1][name][key])
        for name, kept in optimizer[0].items()
        for key, value in kept.items()
        if isinstance(value, Tensor)
    )


def test_resumed_replicas_go_on_bit_for_bit_and_an_older_one_takes_over(run: Any) -> None:
    first, _ = run(ELASTIC_OUTER, [Meeting(ALL) for _ in range(4)], three(last=10))
    for at in (5, 4):  # replica 2 has saved after step 5, too, or one step before the others
        saved = [first["0"].states[5], first["1"].states[5], first["2"].states[at]]
        later = [(str(n), n, {"last": 10, "saved": saved[n], "seed": 9}) for n in ALL]
        found, ends = run(ELASTIC_OUTER, [Meeting(ALL) for _ in range(3)], later)
        assert not any(ends.values()), ends
        for step in (6, 9):
            assert_same(found["0"], found["2"], step)
        exact = torch.equal(found["0"].weights[10]["0.weight"], first["0"].weights[10]["0.weight"])
        assert exact == (at == 5)
        assert [*found["2"].weights] == [6, 7, 8, 9, 10]
        assert found["2"].clocks == {step: first["2"].clocks[step] for step in range(6, 11)}
        assert found["2"].states[9]["figures"]["local"]["turns"] == 3
        behind = "goes on with the state of one that has done 5 steps" in "".join(found["2"].notes)
        assert behind == (at == 4)


def test_one_that_differs_from_most_leaves_with_an_error(run: Any) -> None:
    """It freezes a parameter that the others send: their turn fails, and the next holds."""

    def freezes(program: Program) -> None:
        program.module[4].bias.requires_grad_(False)  # type: ignore[index]

    meetings = [Meeting(ALL), Meeting(ALL), Meeting((0, 2))]
    replicas = [("0", 0, {}), ("1", 1, {"before": freezes}), ("2", 2, {})]
    found, ends = run(AVERAGE, meetings, replicas)
    error = ends.pop("1")
    assert isinstance(error, ClauseFailed)
    assert str(error).startswith(
        "replica 1 cannot exchange with the others, because they differ in what is sent: it has `1.running_mean`"
    )
    assert "and replica 0 has `4.bias` torch.float64 [3]. Compile the same spec" in str(error)
    assert not any(ends.values()), ends
    assert "a replica came that differs from the others, and it leaves again" in "".join(
        found["0"].notes
    )
    assert found["2"].metrics[3]["local.replicas"] == 0
    assert found["2"].metrics[6]["local.replicas"] == 2
    assert_same(found["0"], found["2"], 6)


def test_another_spec_is_refused_by_the_replica_that_has_it(run: Any) -> None:
    other = AVERAGE.replace("lr = 0.1", "lr = 0.2")
    meetings = [Meeting(ALL), Meeting((0, 2)), Meeting((0, 2))]
    replicas = [("0", 0, {"last": 4}), ("1", 1, {"spec": other}), ("2", 2, {"last": 4})]
    found, ends = run(AVERAGE, meetings, replicas)
    error = ends.pop("1")
    assert isinstance(error, ClauseFailed)
    assert "sgd" in str(error)
    assert not any(ends.values()), ends
    assert_same(found["0"], found["2"], 3)


class Others(Member):
    """A connection to others whose rows a test gives: number, counts, in a turn, batch, and the digest of ours."""

    def __init__(self, place: int, rows: Sequence[Sequence[int]]) -> None:
        self.rows, self.failed, self.own_place = rows, None, place

    @property
    def present(self) -> int:
        return len(self.rows)

    @property
    def place(self) -> int:
        return self.own_place

    def sum(self, tensor: Tensor) -> None:
        for i, row in enumerate(self.rows):
            if i != self.own_place:
                tensor[i] = torch.tensor([*row, int(tensor[self.own_place, -1])])

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("place", "rows", "message"),
    [
        (
            2,
            [(0, 1, 1, 0), (1, 1, 1, 0), (1, 0, 0, 0)],
            "another replica has the number 1, too: give each a REPLICA",
        ),
        (1, [(0, 1, 1, 0), (1, 1, 1, 0), (1, 0, 0, 0)], None),
        (1, [(0, 1, 1, 0), (1, 0, 0, 0), (1, 1, 1, 0)], "another replica has the number 1, too"),
        (0, [(0, 1, 1, 0), (1, 0, 0, 0), (1, 1, 1, 0)], None),
        (
            0,
            [(0, 1, 1, 4), (1, 1, 1, 8), (2, 1, 1, 8)],
            "replica 0 has a batch of 4 samples, and replica 1 one of 8",
        ),
        (2, [(0, 1, 1, 4), (1, 1, 1, 8), (2, 1, 1, 8)], None),
    ],
)
def test_numbers_and_batches_that_do_not_fit(
    place: int, rows: list[tuple[int, ...]], message: str | None
) -> None:
    connection: Any = Others(place, rows)
    number, _, _, batch = rows[place]
    group = ElasticGroup(connection, number, lambda clock: {}, lambda state: None)
    group._counts = bool(rows[place][1])
    with pytest.raises(ReplicaLost if message is None else OtherReplica, match=message):
        group.compare(Standing(3, 9, True, batch), [Fact("what is sent", "w", "")])
    told = "a replica came that differs from the others, and it leaves again"
    assert connection.failed == (told if message is None else None)


# without others


def test_without_a_lighthouse_it_trains_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, None)
    alone, plain = trainc.compile(AVERAGE, net()), trainc.compile(SGD, net())
    notes: list[str] = []
    for step in range(4):
        for program in (alone, plain):
            program.step(data(0, step))
        notes += alone.report().notes
    assert all(torch.equal(state(alone)[name], value) for name, value in state(plain).items())
    (note,) = notes
    assert note.startswith("local: this process trains alone, so nothing is exchanged; ")
    assert "TORCHFT_LIGHTHOUSE" in note


def test_one_that_meets_nobody_has_turns_alone(run: Any) -> None:
    found, _ = run(AVERAGE, [Meeting((0,)), Meeting((0,))], [("0", 0, {"last": 4})])
    plain = trainc.compile(SGD, net())
    for step in range(4):
        plain.step(data(0, step))
    assert all(
        torch.equal(found["0"].weights[4][name], value) for name, value in state(plain).items()
    )
    assert found["0"].notes == ["local: this replica alone in the turn after step 3"]


def test_no_meeting_before_the_first_step_is_an_error(run: Any) -> None:
    tries = [Meeting((0,), fails=(0,)) for _ in range(3)]
    _, ends = run(AVERAGE, tries, [("0", 0, {})])
    assert isinstance(ends["0"], ClauseFailed)
    assert (
        "no meeting with other replicas came about: the network failed. Start a lighthouse"
        in str(ends["0"])
    )


def test_several_processes_of_torch_distributed_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, None)
    monkeypatch.setattr(exchange_replicas, "world_size", lambda: 2)
    program = trainc.compile(AVERAGE, net())
    with pytest.raises(
        (ClauseFailed, SiteError), match=r"this process is one of 2 of torch\.distributed, and with"
    ):
        program.step(data(0, 0))


def test_trainc_run_has_fixed_replicas_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, None)
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://a:1")
    text = """
    model "tests.compiler.exchange_cases:net"
    data "tests.compiler.test_loggers:data" { batch = 4 samples }
    run { length = 4 steps }
    """
    with pytest.raises(SpecError) as caught:
        train(text + AVERAGE, out=tmp_path / "run")
    (told,) = caught.value.diagnostics
    assert told.message.startswith(
        "`local` lets replicas leave and join, and `trainc run` divides its data over"
    )
    assert told.labels[0].span is not None


def test_torchft_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchft_connection, "has_library", lambda: False)
    with pytest.raises(SpecError) as caught:
        trainc.compile(AVERAGE, net())
    (told,) = caught.value.diagnostics
    assert told.rule == "missing-library"
    assert told.message == "`membership = torchft` needs torchft, which is not installed"
    assert told.help is not None
    assert "for a loop of your own install it: pip install trainc[torchft]" in told.help
    assert "for `trainc run`" in told.help
    assert "remove `membership`" in told.help
    assert told.labels[0].span is not None


def test_leaders_are_of_fixed_replicas() -> None:
    with pytest.raises(SpecError, match="with `rule = leader` the replicas are `fixed`"):
        trainc.compile(
            SGD + EVERY_3 + " { rule = leader, membership = torchft, buffers = local }", net()
        )


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"REPLICA_GROUP_ID": "3"}, None),
        ({"TORCHFT_LIGHTHOUSE": "http://a:1", "REPLICA_GROUP_ID": "3"}, ("http://a:1", 3)),
    ],
)
def test_the_place_of_a_replica_is_in_the_environment(
    environment: dict[str, str], found: Any
) -> None:
    assert find_place(environment) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"TORCHFT_LIGHTHOUSE": "a:1", "REPLICA_GROUP_ID": "0"},
            r"TORCHFT_LIGHTHOUSE is 'a:1': expected an address",
        ),
        (
            {"TORCHFT_LIGHTHOUSE": "http://a:1"},
            r"REPLICA_GROUP_ID is '': give each replica a number of its own",
        ),
        ({"TORCHFT_LIGHTHOUSE": "http://a:1", "REPLICA_GROUP_ID": "x"}, r"REPLICA_GROUP_ID is 'x'"),
    ],
)
def test_a_place_that_makes_no_sense(environment: dict[str, str], message: str) -> None:
    with pytest.raises(WrongReplica, match=message):
        find_place(environment)
