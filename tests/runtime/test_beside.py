"""Policies that measure beside the step: the same figures, from copies, and factors that act one step later."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainc
from tests.runtime.test_refresh import BATCH, SPEC, program
from trainc.compiler.constructs.lr.temp_balance import TempBalance
from trainc.runtime.factors.action import AwaitFigures
from trainc.runtime.step.record import Step
from trainc.runtime.storage.checkpoint import load_checkpoint, save_checkpoint

STEP = (BATCH[0].double(), BATCH[1])
BESIDE = ", shrink = false, beside = true"


def rates(made: trainc.Program) -> dict[str, float]:
    """Return the rates of the last step."""
    found: dict[str, float] = made.state_dict()["rates"]["in_force"]
    return found


def weights(made: trainc.Program) -> list[Tensor]:
    return [p.detach().clone() for p in made.module.parameters()]


def same(ours: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        "",
        ", parts = 2, smooth = 0.5, hysteresis = 0.05",
        ", ramp = 4 steps, control = permuted",
        ", tolerance = 0.001, control = reversed",
    ],
)
def test_it_is_the_policy_without_it_a_step_later(fields: str) -> None:
    times, fields = "every 3 steps until 10 steps", f", shrink = false{fields}"
    plain, known = program(times, fields)
    made, action = program(times, f"{fields}, beside = true")
    source = torch.Generator().manual_seed(4)
    before: dict[str, float] = {}
    seen = set()
    for _ in range(14):
        with torch.no_grad():  # other rates would give other weights
            pairs = zip(plain.module.parameters(), made.module.parameters(), strict=True)
            for own, other in pairs:
                own.copy_(torch.randn(own.shape, generator=source).double().pow(3))
                other.copy_(own)
        plain.step(STEP)
        made.step(STEP)
        assert made.report().series == plain.report().series
        assert action.alphas == known.alphas
        now = rates(made)
        assert now == (before or dict.fromkeys(now, 0.5))
        before = rates(plain)
        seen.add(tuple(before.values()))
    assert action.measurements == known.measurements == 4
    assert len(seen) > 1


def test_it_measures_the_weights_of_before_the_step_while_the_passes_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed, threads = threading.Event(), list[threading.Thread]()
    measure, run = TempBalance.measure, AwaitFigures.run

    def waiting(of: TempBalance, matrices: Mapping[str, Any]) -> dict[str, float]:
        threads.append(threading.current_thread())
        assert passed.wait(60)
        return measure(of, matrices)

    def moved(of: AwaitFigures, step: Step) -> None:
        assert not same(weights(made), weights(plain))
        passed.set()
        run(of, step)

    monkeypatch.setattr(TempBalance, "measure", waiting)
    monkeypatch.setattr(AwaitFigures, "run", moved)
    made, action = program("", BESIDE)
    plain, known = program("", ", shrink = false")
    made.step(STEP)
    plain.step(STEP)
    assert action.alphas == known.alphas
    assert threads[0] is not threads[1] is threading.current_thread()


@pytest.mark.parametrize("open_step", [False, True])
@pytest.mark.parametrize("fields", ["", ", ramp = 3 steps, parts = 2", ", tolerance = 0.01"])
def test_a_run_resumed_before_the_factors_act_is_the_uninterrupted_one(
    fields: str, open_step: bool, tmp_path: Path
) -> None:
    whole, action = program("every 4 steps", BESIDE + fields)
    for number in range(12):
        if number == 4 and open_step:  # it is being measured
            whole.loss(STEP)
            assert action.measuring._begun is not None
        if number == 5 - open_step:  # or is, and no step has had the factors
            state = load_checkpoint(save_checkpoint(tmp_path, number, whole.state_dict()))
            whole.discard_step()
        whole.step(STEP)
    other, resumed = program("every 4 steps", BESIDE + fields)
    other.step(STEP)
    other.load_state_dict(state)
    for _ in range(5 - open_step, 12):
        other.step(STEP)
    assert same(weights(whole), weights(other))
    assert action.alphas == resumed.alphas
    assert rates(whole) == rates(other) != dict.fromkeys(rates(other), 0.5)


def test_a_step_that_is_skipped_or_begun_again_ends_its_measurement() -> None:
    made, action = program("every 2 steps", BESIDE)
    broken = (STEP[0] * float("nan"), STEP[1])
    made.loss(STEP)
    made.discard_step()
    assert not action.measurements
    made.step(broken)
    assert made.skipped_steps == 1
    assert action.measuring.failed is None
    made.step(STEP)
    found = {0.5 * one.factor for one in action.lr_factors.values()}
    assert len(found) > 1  # measured once, in the step that was skipped
    assert found <= set(rates(made).values())


def test_what_fails_is_raised_by_the_next_step() -> None:
    made, action = program("every 1 steps", BESIDE)
    whole = weights(made)
    with torch.no_grad():
        made.module.get_parameter("1.weight")[2, 3] = float("nan")
    made.step(STEP)
    with pytest.raises(ValueError, match=r"`1\.weight` has entries that are not finite"):
        made.step(STEP)
    with torch.no_grad():
        for own, good in zip(made.module.parameters(), whole, strict=True):
            own.copy_(good)
    made.step(STEP)
    assert action.measurements == 1


def test_it_is_told_by_the_plan_and_has_no_budget() -> None:
    made, _ = program("", BESIDE)
    rows = [r for r in made.plan.steps if r["clause"] == "temp_balance"]
    assert [(r["name"], r["action"]) for r in rows] == [
        ("rates", "measure spectra and set factors of the next step, beside this one"),
        ("exchange", "wait for what is measured beside the step"),
    ]
    (found,) = trainc.check(SPEC % ("", ", beside = true, budget = 1%")).diagnostics
    assert found.rule == "bad-value"
    assert "with `beside` its cost is" in str(found.labels)
