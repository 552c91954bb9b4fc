"""Replicas sharded over two processes each: every rule against replicas simulated one after the other, and refusals."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.compiler.constructs.test_local import average, moments, sgd
from tests.compiler.constructs.test_local_rules import Leaders, weights
from tests.compiler.exchange_cases import data
from tests.compiler.sharded_exchange import AVERAGED, NOISE, cases, net, of
from trainc.runtime.processes.sharded_replicas import replicas_among

SHARDS = 2
Turn = Callable[[int, list[nn.Module], list[list[float]]], None]
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def simulated(
    replicas: int,
    near: Turn | None = None,
    turn: Turn | None = None,
    make: Make = sgd,
    buffers: Sequence[int] = (),
    states: Sequence[int] = (),
    steps: int = 7,
    skipped: Sequence[tuple[int, int]] = (),
) -> list[list[dict[str, Tensor]]]:
    """Return the tensors of every process after every step.

    A replica is a model for each of its processes, with the batch and the running statistics of that process, all with
    the mean of their gradients: so all have the same weights. `near` and `turn` are called with one model of each
    replica after the other, and with the losses of the replicas so far. Buffers and optimizer states are averaged after
    the steps that are given.
    """
    models = [[net() for _ in range(SHARDS)] for _ in range(replicas)]
    optimizers = [[make(model.parameters()) for model in one] for one in models]
    losses: list[list[float]] = [[] for _ in models]
    every = [model for one in models for model in one]
    found: list[list[dict[str, Tensor]]] = [[] for _ in every]
    for step in range(1, steps + 1):
        for number, one in enumerate(models):
            before = [[b.clone() for b in model.buffers()] for model in one]
            loss = replica_step(number, step - 1, one)
            if (number, step - 1) in skipped:
                for model, kept in zip(one, before, strict=True):
                    for buffer, value in zip(model.buffers(), kept, strict=True):
                        buffer.copy_(value)
                continue
            for optimizer in optimizers[number]:
                optimizer.step()
            losses[number].append(loss)
        for act in filter(None, (near, turn)):
            for place in range(SHARDS):
                act(step, [one[place] for one in models], losses)
        if step in buffers:
            average([[b for b in model.buffers() if b.is_floating_point()] for model in every])
        if step in states:
            pairs = [
                (o, m)
                for i, ms in enumerate(models)
                for o, m in zip(optimizers[i], ms, strict=True)
            ]
            average([moments(optimizer, model) for optimizer, model in pairs])
        for model, history in zip(every, found, strict=True):
            history.append({n: t.detach().clone() for n, t in model.state_dict().items()})
    return found


def replica_step(number: int, step: int, models: Sequence[nn.Module]) -> float:
    """Leave the mean gradient of a replica's processes in each of its models; return the mean loss."""
    losses = []
    for place, model in enumerate(models):
        x, y = data(number * SHARDS + place, step)
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
    for same in zip(*(model.parameters() for model in models), strict=True):
        mean = sum(p.grad for p in same) / len(same)
        for p in same:
            p.grad = mean.clone()
    return sum(losses) / len(losses)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=0.01)


def averaging(turns: Sequence[int]) -> Turn:
    return lambda step, models, _: average([weights(m) for m in models]) if step in turns else None


def outer_step(turns: Sequence[int]) -> Turn:
    """Return what torch's SGD with Nesterov momentum makes of the change of the means, for each place of its own."""
    kept: dict[int, tuple[list[nn.Parameter], torch.optim.Optimizer]] = {}
    calls = [0]

    def turn(step: int, models: list[nn.Module], _: list[list[float]]) -> None:
        place = calls[0] % SHARDS
        calls[0] += 1
        if place not in kept:
            agreed = [nn.Parameter(w.clone()) for w in weights(net())]
            kept[place] = agreed, torch.optim.SGD(agreed, lr=0.7, momentum=0.9, nesterov=True)
        if step not in turns:
            return
        agreed, optimizer = kept[place]
        for start, same in zip(agreed, zip(*map(weights, models), strict=True), strict=True):
            start.grad = start.detach() - torch.stack(same).mean(0)
        optimizer.step()
        for model in models:
            for w, one in zip(weights(model), agreed, strict=True):
                w.copy_(one.detach())

    return turn


def led(
    replicas: int,
    groups: Sequence[Sequence[int]],
    period: int,
    whole: int,
    pull: tuple[float, float] | None = None,
    **options: Any,
) -> Any:
    """Return what leader SGD gives; each place of the replicas has leaders of its own to keep."""
    by_place = [Leaders(groups, period, whole, 3) for _ in range(SHARDS)]
    for one in by_place:
        one.stored = [[weights(net())] * 2 for _ in range(replicas)]
        if pull is not None:
            one.pull, one.prox = pull, (0.0, 0.1)
    calls = {"near": 0, "turn": 0}

    def call(name: str) -> Turn:
        def act(step: int, models: list[nn.Module], losses: list[list[float]]) -> None:
            getattr(by_place[calls[name] % SHARDS], name)(step, models, losses)
            calls[name] += 1

        return act

    return simulated(replicas, call("near"), call("turn"), **options)


def assert_equal(results: list[Any], expected: list[list[dict[str, Tensor]]]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        for found, want in zip(result["weights"], wanted, strict=True):
            assert found.keys() == want.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-12)


EXPECTED: dict[str, Callable[[], Any]] = {
    "averaged": lambda: simulated(2, turn=averaging((3, 6)), buffers=(3, 6)),
    "state too": lambda: simulated(
        2, turn=averaging((3, 6)), make=adamw, buffers=(3, 6), states=(3, 6)
    ),
    "outer": lambda: simulated(2, turn=outer_step((3, 6)), buffers=(3, 6)),
    "compiled first": lambda: simulated(2, turn=outer_step((3, 6)), buffers=(3, 6)),
    "one leader": lambda: led(2, [range(2)], 3, 1, pull=(0.0, 0.5), buffers=(3, 6)),
    "skips": lambda: simulated(
        2, turn=averaging((3,)), buffers=(3,), steps=4, skipped=[(1, 2)]
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPECTED)
def test_replicas_of_shards_are_as_simulated(case: str) -> None:
    assert_equal(of(case), EXPECTED[case]())
    with pytest.raises(AssertionError):
        assert_equal(of(case), simulated(2, steps=len(of(case)[0]["weights"])))


@pytest.mark.slow
def test_groups_count_replicas_and_machines_are_those_of_replicas() -> None:
    neighbours = led(4, [(0, 1), (2, 3)], 2, 2)
    assert_equal(of("leaders", 8), neighbours)
    apart = led(4, [(0, 1, 2), (3,)], 2, 2)
    assert_equal(of("on machines", 8), apart)
    with pytest.raises(AssertionError):
        assert_equal(of("on machines", 8), neighbours)
    (line,) = (one for one in of("leaders", 8)[5]["summary"] if one.startswith("local"))
    assert re.search(r"3 exchanges between 4 replicas.*; replica [0-3] led all most often", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "size"),
    [("resumes", 4), ("outer resumes", 4), ("leader resumes", 4), ("leaders resume", 8)],
)
def test_a_run_resumed_in_a_model_sharded_later_is_bit_equal(case: str, size: int) -> None:
    """And what is kept between turns has the shapes of shards."""
    assert of(case, size) == [[True] * 4] * size


@pytest.mark.slow
def test_replicas_are_bit_equal_after_a_turn_and_processes_of_one_have_one_loss() -> None:
    results = of("averaged")
    for step in (2, 5):
        first = results[0]["weights"][step]
        for other in results[1:]:
            assert all(torch.equal(first[name], other["weights"][step][name]) for name in first)
    losses = [[m["loss"] for m in one["metrics"]] for one in results]
    assert losses[0] == losses[1] != losses[2] == losses[3]


@pytest.mark.slow
def test_the_distance_of_replicas_is_that_of_their_whole_weights() -> None:
    """Of two replicas each is half of their distance from the mean."""
    every = simulated(2, turn=lambda *_: None, steps=3)
    first, second = every[0][2], every[SHARDS][2]
    names = [name for name, _ in net().named_parameters()]
    far = math.sqrt(sum(float((first[n] - second[n]).square().sum()) for n in names)) / 2
    for one in of("averaged"):
        turn = one["metrics"][2]
        found = [turn[f"local.distance{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx([far] * 3, rel=1e-9)


@pytest.mark.slow
def test_bytes_are_those_of_the_shards_and_of_all_buffers() -> None:
    held = [(3, 2), (3, 2), (1, 0), (3, 2), (3, 2), (3, 2), (3, 2), (2, 1), (2, 1)]
    wide = [4, 1, 1, 1, 1, 1, 1, 5, 1]
    buffers, check = 8 * 10, 8 + 8 * 2
    for rank, one in enumerate(of("averaged")):
        shards = 8 * sum(rows[rank % 2] * w for rows, w in zip(held, wide, strict=True))
        sent = [m.get("local.bytes") for m in one["metrics"]]
        assert sent[2] == sent[5] == shards + buffers + check
        assert f"2 exchanges between 2 replicas, {2 * int(sent[2])} bytes" in "\n".join(
            one["summary"]
        )


@pytest.mark.slow
def test_random_numbers_are_of_the_replica_over_all_its_examples() -> None:
    first, same, second, last = of("noise")
    assert first == same != second == last
    model = net()
    model[1] = nn.Identity()
    both = [torch.cat(pair) for pair in zip(data(0, 0), data(1, 0), strict=True)]
    alone = trainc.compile(AVERAGED + NOISE, model).step((both[0], both[1]))
    assert first == pytest.approx(alone["consistency"], rel=1e-12)


@pytest.mark.slow
def test_what_is_observed_is_of_the_replica() -> None:
    first, same, second, last = of("observed")
    assert first
    assert first == same != second == last


@pytest.mark.slow
def test_each_replica_saves_on_its_own() -> None:
    assert of("saved") == [True] * 4


@pytest.mark.slow
def test_other_clauses_go_on() -> None:
    for one in of("with others"):
        assert any(name.startswith("norm_growth") for name in one["metrics"][0])
        assert one["metrics"][2]["local.bytes"] > 0


@pytest.mark.slow
def test_one_replica_of_all_processes_trains_as_without_the_clause_and_says_so() -> None:
    for same, notes, summary, sent in of("one replica"):
        assert same
        (note,) = notes
        assert "sharded over all 4 processes, which makes them one replica" in note
        assert "local: no exchange: all processes were one replica" in summary
        assert sent == 0


@pytest.mark.slow
def test_replicas_of_one_process_may_have_shards_too() -> None:
    results = of("one process each")
    for other in results[1:]:
        pairs = [(results[0]["weights"][i], other["weights"][i]) for i in (2, 5)]
        assert all(torch.equal(a[n], b[n]) for a, b in pairs for n in a)
    assert "between 4 replicas" in "\n".join(results[0]["summary"])


REFUSED = {
    "replicated": r"SiteError: `0\.weight` is sharded by FSDP2 with replicas \(HSDP, .*mesh\[\"shard\"\]",
    "uneven": r"SiteError: .* over ranks 0, 1, 2, and those of another over rank 3 alone: all need the same",
    "crossed": r"SiteError: .*: one replica is ranks 0, 3 and the next ranks 1, 2",
    "two divisions": r"SiteError: `0\.weight` is sharded over ranks \[\d, \d\] and `1\.weight` over ranks \[\d, \d\]",
    "other weights": r"ValueError: .* differ in their starting weights: rank 0 has `0\.weight` .*, rank 2 has `0\.w",
    "other step": r"ClauseFailed: .* they differ in the step: rank 0 has step 6, rank 2 has step 3",
    "groups of three": r"ClauseFailed: 2 replicas cannot be divided into groups of 3",
    "masked": r"SpecError: (?s:.*)`0\.weight` is sharded over processes",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_every_process_says_why_there_is_no_exchange(case: str) -> None:
    for result in of(case):
        assert isinstance(result, str), result
        assert re.match(REFUSED[case], result), result
        if result.startswith(("SiteError", "ClauseFailed")):
            assert result.endswith("(at local)")


@pytest.mark.slow
def test_all_cases_are_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert {case for size in (4, 8) for case in cases(size) if f'"{case}"' not in text} == set()


# one process


def test_replicas_are_parts_of_one_size() -> None:
    assert replicas_among([[0], [1], [2]]) == [(0,), (1,), (2,)]
    assert replicas_among([[0, 2], [1, 3], [0, 2], [1, 3]]) == [(0, 2), (1, 3)]
    assert replicas_among([[1, 0], [1, 0], [3, 2], [3, 2]]) == [(1, 0), (3, 2)]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([[0, 1], [0, 1], [1, 2]], "rank 2 shards its parameters over ranks 1, 2, and rank 1, which"),
        ([[0, 1], [0, 1], [2]], "sharded over ranks 0, 1, and those of another over rank 2 alone"),
        ([[0, 1], [1, 0]], "rank 0 shards its parameters over ranks 0, 1, and rank 1, which is one"),
        ([[0, 3], [1, 2], [1, 2], [0, 3]], "one replica is ranks 0, 3 and the next ranks 1, 2"),
    ],
)  # fmt: skip
def test_what_is_no_division_into_replicas_is_said_in_words(
    shares: list[list[int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        replicas_among(shares)
