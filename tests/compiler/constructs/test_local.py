"""Local SGD in processes that exchange, against replicas simulated one after the other in plain PyTorch."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.compiler.exchange_cases import ADAMW, EVERY_3, SGD, Weights, data, net, state
from tests.compiler.exchange_processes import AVERAGED, WITH_OTHERS, of
from trainc.compiler.constructs.distribute.local import Local
from trainc.dsl.text.errors import SpecError
from trainc.runtime.step.action import Phase

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def simulated(
    size: int,
    make: Make = sgd,
    turns: Iterable[int] = (3, 6),
    buffers: bool = True,
    optimizer_state: bool = False,
    names: Callable[[str], bool] = lambda _: True,
    steps: int = 7,
    rows: int = 5,
    skipped: Iterable[tuple[int, int]] = (),
) -> list[list[Weights]]:
    """Return every replica's weights and buffers after every step, the means taken after the steps `turns`."""
    models = [net() for _ in range(size)]
    optimizers = [make(model.parameters()) for model in models]
    found: list[list[Weights]] = [[] for _ in models]
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x, y = data(rank, step, rows)
            before = [buffer.clone() for buffer in model.buffers()]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            if (rank, step) not in skipped:
                optimizer.step()
                continue
            for buffer, kept in zip(model.buffers(), before, strict=True):
                buffer.copy_(kept)  # nothing of a step that is left out stays
        if step + 1 in turns:
            average([[p for n, p in m.named_parameters() if names(n)] for m in models])
            if buffers:
                average([[b for b in m.buffers() if b.is_floating_point()] for m in models])
            if optimizer_state:
                average([moments(o, m) for o, m in zip(optimizers, models, strict=True)])
        for model, history in zip(models, found, strict=True):
            history.append({n: t.detach().clone() for n, t in model.state_dict().items()})
    return found


def average(replicas: list[list[Tensor]]) -> None:
    for same in zip(*replicas, strict=True):
        mean = sum(t.detach() for t in same) / len(same)
        for tensor in same:
            tensor.data.copy_(mean)


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    states = [optimizer.state[p] for p in model.parameters()]
    return [s[key] for s in states for key in sorted(s) if s[key].dim()]


def assert_equal(results: list[Any], expected: list[list[Weights]]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert len(result["weights"]) == len(wanted)
        for found, want in zip(result["weights"], wanted, strict=True):
            assert found.keys() == want.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_weights_and_running_statistics_are_the_means_of_the_replicas(size: int) -> None:
    assert_equal(of("averaged", size), simulated(size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("state too", {"make": adamw, "optimizer_state": True}),
        ("own buffers", {"buffers": False}),
        ("head only", {"names": lambda name: name.startswith("4.")}),
        ("late", {"turns": (2, 4)}),
    ],
)
def test_fields_selector_and_times_are_obeyed(case: str, options: dict[str, Any]) -> None:
    expected = simulated(2, **options)
    assert_equal(of(case, 2), expected)
    with pytest.raises(AssertionError):
        assert_equal(of(case, 2), simulated(2, make=options.get("make", sgd)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_turn_after_every_step_of_plain_sgd_is_one_large_batch(size: int) -> None:
    """The mean of w - lr g_r is w - lr mean(g_r); batch norm aside, whose statistics are of a replica's rows."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(7):
        outputs = []
        for rank in range(size):
            x, y = data(rank, step)
            outputs.append(F.mse_loss(model(x), y))
        optimizer.zero_grad()
        (sum(outputs) / size).backward()  # type: ignore[union-attr]
        optimizer.step()
    for result in of("every step", size):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                result["weights"][-1][name], parameter.detach(), rtol=1e-12, atol=1e-12
            )


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_are_bit_equal_after_a_turn_and_differ_after_the_next_step(size: int) -> None:
    first, *others = [result["weights"] for result in of("averaged", size)]
    for other in others:
        for step in (2, 5):
            assert all(torch.equal(first[step][name], other[step][name]) for name in first[step])
        assert not any(torch.equal(first[3][n], other[3][n]) for n in ("0.weight", "4.bias"))


@pytest.mark.slow
def test_a_loop_of_ones_own_with_accumulation_averages() -> None:
    models = [net() for _ in range(2)]
    optimizers = [sgd(model.parameters()) for model in models]
    for step in range(4):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x, y = data(rank, step, 6)
            optimizer.zero_grad()
            for rows in (slice(0, 4), slice(4, 6)):
                (F.mse_loss(model(x[rows]), y[rows]) * (len(x[rows]) / 6)).backward()
            optimizer.step()
        if step == 2:
            average([[*m.parameters(), m[1].running_mean, m[1].running_var] for m in models])  # type: ignore[index]
    expected = [[{n: t.detach() for n, t in m.state_dict().items()}] for m in models]
    results = [{"weights": one["weights"][-1:]} for one in of("accumulates", 2)]
    assert_equal(results, expected)


@pytest.mark.slow
def test_other_clauses_act_in_a_replica_as_they_do_alone() -> None:
    programs = [trainc.compile(SGD + WITH_OTHERS, net()) for _ in range(2)]
    histories: list[list[Weights]] = [[], []]
    for step in range(7):
        for rank, program in enumerate(programs):
            program.step(data(rank, step))
        if step in (2, 5):
            modules = [program.module for program in programs]
            average([[*m.parameters(), m[1].running_mean, m[1].running_var] for m in modules])  # type: ignore[index]
        for program, history in zip(programs, histories, strict=True):
            history.append(state(program))
    assert_equal(of("with others", 2), histories)


@pytest.mark.slow
def test_a_skipped_step_keeps_its_turn() -> None:
    results = of("nan", 2)
    assert [one["skipped"] for one in results] == [[False] * 4, [False, False, True, False]]
    assert_equal(results, simulated(2, steps=4, skipped=[(1, 2)]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_resuming_between_turns_is_bit_equal(size: int) -> None:
    for metrics, weights, summary, at_the_turn in of("resumes", size):
        assert metrics
        assert weights
        assert summary
        assert at_the_turn["local.bytes"] > 0


@pytest.mark.slow
def test_bytes_are_those_of_the_tensors() -> None:
    trained = 8 * sum(p.numel() for p in net().parameters())
    buffers = 8 * (6 + 6)
    moments = 2 * trained
    check = 8 + 8 * 2  # a digest, then loss and distance
    results = of("averaged", 2)
    for metrics in (one["metrics"] for one in results):
        assert [m.get("local.bytes") for m in metrics] == [
            None, None, trained + buffers + check, None, None, trained + buffers + check, None
        ]  # fmt: skip
    assert results[0]["signals"]["local.bytes"] == trained + buffers + check
    (line,) = [line for line in results[0]["summary"] if line.startswith("local")]
    assert f"2 exchanges between 2 replicas, {2 * (trained + buffers + check)} bytes" in line
    assert line.endswith("the last after step 6; step 7 was each replica's own")
    assert of("state too", 2)[0]["metrics"][2]["local.bytes"] == trained + moments + buffers + check
    own = of("own buffers", 2)[0]["metrics"][2]
    assert own["local.bytes"] == trained + check


def distances(replicas: list[Weights], others: list[Weights]) -> list[float]:
    """Return the L2 distance of each replica's parameters from those of another."""
    names = [name for name, _ in net().named_parameters()]
    return [
        math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in names))
        for one, other in zip(replicas, others, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["averaged", "outer"])
def test_a_turn_measures_losses_and_how_far_the_replicas_were_from_their_mean(
    case: str, size: int
) -> None:
    before = [history[2] for history in simulated(size, turns=())]
    mean = {
        n: torch.stack([one[n].double() for one in before]).mean(0)
        for n, _ in net().named_parameters()
    }
    far = distances(before, [mean] * size)
    results = of(case, size)
    losses = [one["metrics"][2]["loss"] for one in results]
    for one in results:
        turn, (by_replica,) = one["metrics"][2], [one["series"][2]["local.loss"]]
        for name, numbers in (("distance", far), ("loss", losses)):
            found = [turn[f"local.{name}{end}"] for end in ("", "_low", "_high")]
            wanted = [sum(numbers) / size, min(numbers), max(numbers)]
            assert found == pytest.approx(wanted, rel=1e-12)
        assert by_replica == {f"replica {rank}": loss for rank, loss in enumerate(losses)}
        assert "local.distance" not in one["metrics"][3]
        assert one["signals"]["local.distance"] == one["metrics"][5]["local.distance"] > 0


@pytest.mark.slow
def test_statistics_and_noise_are_those_of_the_replica() -> None:
    for with_turns, on_its_own in of("measures", 2):
        assert with_turns == on_its_own
    assert of("measures", 2)[0] != of("measures", 2)[1]
    first, second = of("noise", 2)
    assert first != second


# one process


def test_one_process_trains_as_without_the_clause_and_says_so() -> None:
    programs = [trainc.compile(text, net()) for text in (SGD, AVERAGED)]
    notes = []
    for step in range(6):
        metrics = [program.step(data(0, step)) for program in programs]
        turn = {"local.bytes": 0.0, "local.replicas": 1.0}
        assert metrics[1] == metrics[0] | (turn if step in (2, 5) else {})
        notes.append(programs[1].report().notes)
    absent, present = map(state, programs)
    assert all(torch.equal(absent[name], present[name]) for name in absent)
    assert [len(some) for some in notes] == [0, 0, 1, 0, 0, 0]
    assert "local: this process trains alone" in notes[2][0]
    assert "local: no exchange: this process trained alone" in programs[1].summary()


def test_the_plan_shows_the_turns() -> None:
    plan = trainc.plan(ADAMW + EVERY_3 + " { optimizer_state = average }", net())
    rows = [row for row in plan.steps if row["clause"] == "local"]
    assert [(row["phase"], row["every"]) for row in rows] == [(Phase.EXCHANGE, "every 3 steps")] * 2
    assert [row["action"] for row in rows][1] == "average the optimizer's state over replicas"
    assert len([row for row in trainc.plan(AVERAGED, net()).steps if row["clause"] == "local"]) == 1


@pytest.mark.parametrize(
    ("spec", "rule", "words"),
    [
        (
            SGD + "distribute local every 8 samples",
            "bad-value",
            r"`8 samples` may be another number of steps on each: write `from`, `until` and `every` in steps",
        ),
        (
            SGD + "distribute local from 1 epochs every 8 steps",
            "wrong-unit",
            "epoch",
        ),
        (
            SGD + "run { length = 9k tokens } distribute local every 10%",
            "bad-value",
            "in steps",
        ),
        (
            AVERAGED + " mask sift on ndim(2) { density = 10% }",
            "conflicting-effects",
            r"`distribute local` cannot exchange `0\.weight`, because a mask chooses",
        ),
        (SGD + "distribute local on ndim(9) every 2 steps", "selector-matches-nothing", "ndim"),
        (SGD + "distribute local { rule = median }", "bad-value", "median"),
    ],
)
def test_what_cannot_be_exchanged_is_an_error_with_its_place(
    spec: str, rule: str, words: str
) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        trainc.plan(spec, net())
    (found,) = caught.value.diagnostics
    assert found.rule == rule
    assert found.span is not None


def test_frozen_parameters_are_not_exchanged() -> None:
    model = net()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(SpecError, match=r"`0\.weight` is frozen, so all replicas have the same"):
        trainc.plan(SGD + "distribute local on all every 3 steps", model)
    trainc.plan(AVERAGED, model)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of two processes after their first turn, and the means of what they trained."""
    apart = [history[2] for history in simulated(2, turns=())]
    tensors = [{n: t for n, t in one.items() if t.is_floating_point()} for one in apart]
    found = of("averaged", 2)[1]["weights"][2]
    return {name: found[name] for name in tensors[0]}, Local().reference(tensors)
