"""The rules of local SGD but the average, in several processes, against replicas simulated one after the other."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.compiler.constructs.test_local import assert_equal, average
from tests.compiler.exchange_cases import (
    EVERY_3,
    LEADERS,
    ONE_LEADER,
    OUTER,
    SGD,
    Weights,
    data,
    net,
    state,
)
from tests.compiler.exchange_processes import of
from trainc.dsl.text.errors import SpecError

REFERENCE = Path(__file__).parents[2] / "reference"
Turn = Callable[[int, list[nn.Module], list[list[float]]], None]


def simulated(
    size: int, steps: int, near: Turn, turn: Turn, whole: Turn | None = None
) -> list[list[Weights]]:
    """Return every replica's tensors after every step: SGD, then `near` and `turn` with models and losses so far."""
    models = [net() for _ in range(size)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    losses: list[list[float]] = [[] for _ in models]
    found: list[list[Weights]] = [[] for _ in models]
    for step in range(1, steps + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x, y = data(rank, step - 1)
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses[rank].append(float(loss.detach()))
        near(step, models, losses)
        turn(step, models, losses)
        if whole is not None:
            whole(step, models, losses)
        for model, history in zip(models, found, strict=True):
            history.append({n: t.detach().clone() for n, t in model.state_dict().items()})
    return found


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def mix(model: nn.Module, leader: Sequence[Tensor], pull: float) -> None:
    """Take w to (1 - pull) w + pull leader, as the published code writes it."""
    for w, best in zip(weights(model), leader, strict=True):
        w.copy_((1 - pull) * w + pull * best)


class Leaders:
    """Leader SGD as published, over groups of ranks, but with scores over the steps that there were."""

    def __init__(self, groups: Sequence[Sequence[int]], period: int, whole: int, span: int) -> None:
        self.groups, self.period, self.whole, self.span = groups, period, whole, span
        self.pull, self.prox = (0.2, 0.3), (0.1, 0.4)
        self.stored: list[list[list[Tensor]]] = []

    def near(self, step: int, models: list[nn.Module], losses: list[list[float]]) -> None:
        start = weights(net())
        self.stored = self.stored or [[start, start] for _ in models]
        for model, (of_group, of_all) in zip(models, self.stored, strict=True):
            mix(model, of_all, self.prox[1] / (self.period * self.whole))
            if len(self.groups) > 1:
                mix(model, of_group, self.prox[0] / self.period)

    def turn(self, step: int, models: list[nn.Module], losses: list[list[float]]) -> None:
        scores = [sum(one[-self.span :]) / len(one[-self.span :]) for one in losses]
        rounds = [(0, group) for group in self.groups] if len(self.groups) > 1 else []
        if step % self.period:
            return
        if step % (self.period * self.whole) == 0:
            rounds.append((1, range(len(models))))
        for which, ranks in rounds:
            best = [w.clone() for w in weights(models[min(ranks, key=scores.__getitem__)])]
            for rank in ranks:
                self.stored[rank][which] = best
                mix(models[rank], best, self.pull[which])


def led(groups: Sequence[Sequence[int]], size: int = 4) -> list[list[Weights]]:
    leaders = Leaders(groups, 2, 2, 3)
    return simulated(size, 7, leaders.near, leaders.turn)


@pytest.mark.slow
def test_groups_and_all_follow_their_leaders() -> None:
    assert_equal(of("leaders", 4), led([(0, 1), (2, 3)]))
    with pytest.raises(AssertionError):
        assert_equal(of("leaders", 4), led([(0, 2), (1, 3)]))
    summary = "\n".join(of("leaders", 4)[0]["summary"])
    assert "local: 3 exchanges between 4 replicas" in summary
    assert "led all most often, in 1 of 1 turns" in summary


@pytest.mark.slow
def test_groups_are_those_of_machines() -> None:
    assert_equal(of("on machines", 4), led([(0, 1, 2), (3,)]))


@pytest.mark.slow
def test_where_one_group_has_all_its_leader_is_that_of_all() -> None:
    assert_equal(of("one group", 2), led([(0, 1)], 2))


@pytest.mark.slow
def test_one_leader_and_means_of_running_statistics() -> None:
    leaders = Leaders([range(4)], 3, 1, 3)
    leaders.pull, leaders.prox = (0.0, 0.5), (0.0, 0.1)

    def buffers(step: int, models: list[nn.Module], losses: list[list[float]]) -> None:
        if step % 3 == 0:
            average([[b for b in m.buffers() if b.is_floating_point()] for m in models])

    expected = simulated(4, 7, leaders.near, leaders.turn, buffers)
    assert_equal(of("one leader", 4), expected)


@pytest.mark.slow
def test_a_turn_tells_who_leads_all_by_which_score_and_how_far_the_others_were() -> None:
    """After w <- w + 0.5 (leader - w) the others are half as far from the leader as before, which stays."""
    results = of("one leader", 4)
    start = {n: p.detach() for n, p in net().named_parameters()}
    for step in (2, 5):
        scores = [
            math.fsum(m["loss"] for m in one["metrics"][step - 2 : step + 1]) / 3 for one in results
        ]
        best = min(range(4), key=scores.__getitem__)
        leader = results[best]["weights"][step]
        far = [
            2
            * math.sqrt(
                sum(float((one["weights"][step][n] - leader[n]).square().sum()) for n in start)
            )
            for rank, one in enumerate(results)
            if rank != best
        ]
        for one in results:
            turn, series = one["metrics"][step], one["series"][step]
            assert turn["local.leader"] == best
            assert turn["local.score"] == pytest.approx(scores[best], rel=1e-12)
            found = [turn[f"local.distance{end}"] for end in ("", "_low", "_high")]
            assert found == pytest.approx([sum(far) / 3, min(far), max(far)], rel=1e-9)
            assert [*series["local.score"].values()] == pytest.approx(scores, rel=1e-12)
            assert series["local.leads"] == {f"replica {r}": 2.0 * (r == best) for r in range(4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "groups"), [("leaders", [(0, 1), (2, 3)]), ("on machines", [(0, 1, 2), (3,)])]
)
def test_a_turn_of_groups_tells_who_leads_each(case: str, groups: list[tuple[int, ...]]) -> None:
    results = of(case, 4)
    for step in (1, 3, 5):
        losses = [[m["loss"] for m in one["metrics"][: step + 1]][-3:] for one in results]
        scores = [sum(some) / len(some) for some in losses]
        leads = dict.fromkeys(range(4), 0.0)
        leads |= {min(ranks, key=scores.__getitem__): 1.0 for ranks in groups}
        if step == 3:
            leads[min(range(4), key=scores.__getitem__)] = 2.0
        for one in results:
            assert one["series"][step]["local.leads"] == {
                f"replica {r}": n for r, n in leads.items()
            }
            assert ("local.leader" in one["metrics"][step]) == (step == 3)


@pytest.mark.slow
def test_leaders_give_the_reference_numbers() -> None:
    """The published ring of losses starts with zeros: of processes in step it chooses the same leaders."""
    reference = json.loads((REFERENCE / "more_methods.json").read_text(encoding="utf-8"))["lsgd"]
    for rank, (found, _) in enumerate(of("leader", 4)):
        assert found.tolist() == pytest.approx(reference[f"w{rank}"], abs=1e-8)
        assert found.tolist() == pytest.approx(published(span=4)[rank], abs=1e-12)


def published(span: int) -> list[list[float]]:
    """Return the weights of the reference, simulated in one process with a ring of zeros, as published."""
    i = torch.arange(3, dtype=torch.float64)
    a = torch.tensor([1, 0.5, 2.0]).double()
    centers = [torch.tensor([1, -1, 0.5]).double() * (1 + 0.2 * r) for r in range(4)]
    start = torch.sin(1.7 * i + 0.3)
    w = [start.clone() for _ in range(4)]
    rings = [[0.0] * span for _ in range(4)]
    stored = [[start, start] for _ in range(4)]
    for t in range(12):
        for r, c in enumerate(centers):
            rings[r] = [*rings[r][1:], float(0.5 * (a * (w[r] - c) ** 2).sum())]
            w[r] = w[r] - 0.05 * (a * (w[r] - c) + 0.1 * torch.sin(1.7 * i + t + r))
            w[r] = (1 - 0.1 / 4) * w[r] + 0.1 / 4 * stored[r][1]
            w[r] = (1 - 0.1 / 2) * w[r] + 0.1 / 2 * stored[r][0]
        whole = [(1, range(4))] if t % 4 == 3 else []
        for which, ranks in [(0, range(2)), (0, range(2, 4)), *whole] if t % 2 else []:
            best = w[min(ranks, key=lambda r: sum(rings[r]) / span)].clone()
            for r in ranks:
                stored[r][which] = best
                w[r] = 0.9 * w[r] + 0.1 * best
    return [one.tolist() for one in w]


def outer(
    size: int, lr: float, momentum: float, turns: Sequence[int], late: bool
) -> list[list[Weights]]:
    """Return what torch's SGD as the outer optimizer gives; late, the first turn averages."""
    agreed = [nn.Parameter(w.clone()) for w in weights(net())]
    optimizer = torch.optim.SGD(agreed, lr=lr, momentum=momentum, nesterov=not late)

    def turn(step: int, models: list[nn.Module], losses: list[list[float]]) -> None:
        if step not in turns:
            return
        same = zip(*map(weights, models), strict=True)
        for start, replicas in zip(agreed, same, strict=True):
            mean = torch.stack(replicas).mean(0)
            start.grad = start.detach() - mean
            if late and step == turns[0]:
                start.data.copy_(mean)
        if not (late and step == turns[0]):
            optimizer.step()
        for model in models:
            for w, one in zip(weights(model), agreed, strict=True):
                w.copy_(one.detach())
        average([[b for b in m.buffers() if b.is_floating_point()] for m in models])

    return simulated(size, 7, lambda *_: None, turn)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_an_outer_step_is_nesterov_on_the_change_of_the_means(size: int) -> None:
    expected = outer(size, 0.7, 0.9, (3, 6), late=False)
    assert_equal(of("outer", size), expected)
    start = dict(net().named_parameters())
    agreed: list[Any] = [start, expected[0][2], expected[0][5]]
    alone = simulated(size, 3, lambda *_: None, lambda *_: None)
    mean = {n: torch.stack([one[2][n] for one in alone]).mean(0) for n in start}
    for one in of("outer", size):
        first, second = (one["metrics"][step] for step in (2, 5))
        assert first["local.change"] == pytest.approx(between(start, mean), rel=1e-12)
        assert first["local.step"] == pytest.approx(between(*agreed[:2]), rel=1e-12)
        assert second["local.step"] == pytest.approx(between(*agreed[1:]), rel=1e-12)


def between(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the L2 distance of two sets of parameters."""
    names = [name for name, _ in net().named_parameters()]
    return math.sqrt(sum(float((one[n].detach() - other[n]).square().sum()) for n in names))


@pytest.mark.slow
def test_the_first_turn_that_only_averages_has_no_outer_step() -> None:
    for one in of("late outer", 2):
        steps = ["local.step" in metrics for metrics in one["metrics"]]
        turns = ["local.distance" in metrics for metrics in one["metrics"]]
        assert steps == [t and i > turns.index(True) for i, t in enumerate(turns)]
        assert any(steps)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["outer resumes", "leader resumes"])
def test_a_run_that_is_resumed_between_turns_is_bit_equal(case: str, size: int) -> None:
    for metrics, same, summary, at_the_turn in of(case, size):
        assert metrics
        assert same
        assert summary
        assert at_the_turn["local.bytes"] > 0


@pytest.mark.slow
def test_with_a_later_start_the_first_turn_averages_and_the_next_steps() -> None:
    first, second = (one["weights"] for one in of("late outer", 2))
    models = [net() for _ in range(2)]
    momentum: list[Tensor] = []
    agreed: list[Tensor] = []
    for step in range(7):
        for rank, model in enumerate(models):
            x, y = data(rank, step)
            model.zero_grad()
            F.mse_loss(model(x), y).backward()
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)  # type: ignore[operator]
        if step in (0, 2, 4, 6):
            means = [torch.stack(both).mean(0) for both in zip(*map(weights, models), strict=True)]
            if agreed:
                deltas = [a - m for a, m in zip(agreed, means, strict=True)]
                momentum = (
                    [0.9 * m + d for m, d in zip(momentum, deltas, strict=True)]
                    if momentum
                    else deltas
                )
                means = [a - 0.5 * m for a, m in zip(agreed, momentum, strict=True)]
            agreed = means
            for model in models:
                for w, one in zip(weights(model), agreed, strict=True):
                    w.copy_(one)
    for model, found in zip(models, (first, second), strict=True):
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[-1][name], p.detach(), rtol=1e-12, atol=1e-12)


# one process


@pytest.mark.parametrize("spec", [OUTER, LEADERS, ONE_LEADER])
def test_one_process_trains_as_without_the_clause(spec: str) -> None:
    programs = [trainc.compile(text, net()) for text in (SGD, spec)]
    for step in range(6):
        for program in programs:
            program.step(data(0, step))
    absent, present = map(state, programs)
    assert all(torch.equal(absent[name], present[name]) for name in absent)
    assert "this process trained alone" in "\n".join(programs[1].summary())


RULES = {
    "rule = outer(adam(lr = 0.7))": "no turn optimizer `adam`",
    "rule = outer(0.7)": "turn optimizer such as `sgd",
    "rule = outer(sgd(lr = 0))": "must be above 0",
    "rule = outer(sgd(lr = 1, momentum = 1))": "below 1",
    "rule = outer(sgd(lr = 1, nesterov = true))": "needs a `momentum` above 0",
    "rule = average, pull = 0.1": "no other rule than `leader` reads it",
    "rule = leader, pull = 2": "1 or less",
    "rule = leader, pull = [0.1, 0.2]": "there is one leader: write one number, such as 0.2",
    "rule = leader, global_every = 2": "without `groups` every turn is one of all",
    "rule = leader, groups = 1": "2 replicas or more",
    "rule = leader, groups = rack": "node",
    "rule = leader, score = mean(batch, 16 steps)": "expected the loss of the process",
    "rule = leader, score = mean(loss, 16 samples)": "expected 1 step or more",
    "rule = leader, score = best(loss)": "no score `best`",
    "rule = leader, optimizer_state = average": "each replica keeps its optimizer's state",
}


@pytest.mark.parametrize("fields", RULES)
def test_fields_that_make_no_sense_are_errors_at_their_place(fields: str) -> None:
    with pytest.raises(SpecError, match=RULES[fields]) as caught:
        trainc.plan(SGD + EVERY_3 + " { " + fields + " }", net())
    (found,) = caught.value.diagnostics
    assert found.span is not None
    assert found.span.text in fields


def test_running_statistics_beside_a_leader_are_warned_of() -> None:
    clause = SGD + EVERY_3 + " { rule = leader }"
    (warning,) = trainc.plan(clause, net()).warnings
    assert (warning.rule, warning.span and warning.span.text) == ("own-statistics", "leader")
    without = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    assert not trainc.plan(clause, without).warnings
    assert not trainc.plan(LEADERS, net()).warnings


def test_a_state_of_another_rule_is_refused_or_dropped_by_name() -> None:
    program = trainc.compile(ONE_LEADER, net())
    saved: dict[str, Any] = copy.deepcopy(program.state_dict())
    saved["actions"]["local"] = {"agreed/0.weight": net()[0].weight.detach()}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"agreed/0\.weight"):
        program.load_state_dict(saved)


def test_what_another_rule_kept_is_dropped_by_name() -> None:
    before = trainc.compile(OUTER, net())
    saved: dict[str, Any] = copy.deepcopy(before.state_dict())
    kept = {f"agreed/{name}": p.detach().clone() for name, p in net().named_parameters()}
    saved["actions"]["local"] = kept
    later = trainc.compile(LEADERS, net())
    lines = later.load_compatible(saved)
    assert any(
        f"local: {len(kept)} tensors that another rule or selection kept are dropped" in one
        for one in lines
    )
    same = trainc.compile(OUTER, net())
    same.load_compatible(saved)
    again = same.state_dict()["actions"]["local"]
    assert all(torch.equal(again[key], value) for key, value in kept.items())
