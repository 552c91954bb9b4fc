"""Rules that a run carries out: save, evaluate, stop and roll back, in one go and in parts."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.driver.train import train
from trainc.runtime.data.order import Order
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage.checkpoint import find_latest, load_checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

STEPS, SAMPLES, BATCH, SEED = 14, 41, 8, 3
HEAD = """
model "parts:model"
data "parts:data" { batch = 8 samples }
loss cross_entropy
optimizer sgd { lr = 0.2, momentum = 0.9 }
run { length = 14 steps, seed = 3, eval = 2 steps, checkpoint = 3 steps, on_nan = skip }
"""
PARTS = """
import torch
from torch import nn

class Split:
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (count,), generator=generator)
    def __len__(self):
        return len(self.x)
    def batch(self, indices):
        return self.x[list(indices)], self.y[list(indices)]

class data:
    tokens_per_sample = 1
    def __init__(self):
        self.train, self.evaluation = Split(41, 1), Split(16, 2)

def model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
"""


class AfterSteps:
    """Asks a run to leave after some looks at it, as a signal does."""

    looks = 0

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the process's signals as they are."""

    def requested(self) -> str | None:
        self.asked += 1
        return "interrupted" if self.asked > self.looks else None


def run(rules: str, out: Path, head: str = HEAD, **options: Any) -> Summary:
    (out.parent / "parts.py").write_text(PARTS)
    source = out.parent / "spec.train"
    source.write_text(head + rules)
    return train(source, out, quiet=True, **options)


def lines(out: Path) -> list[dict[str, Any]]:
    return read_jsonl(out / "metrics.jsonl")


def weights(out: Path) -> dict[str, Tensor]:
    path = find_latest(out / "checkpoints").path
    assert path is not None
    found: dict[str, Tensor] = load_checkpoint(path)["program"]["model"]
    return found


def events(out: Path, kind: str) -> list[str]:
    found = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [one["message"] for one in found if one.get("event") == kind]


def first_model(tmp_path: Path) -> nn.Module:
    """Return the model with the weights that a run begins with."""
    (tmp_path / "parts.py").write_text(PARTS)
    source = tmp_path / "first.train"
    source.write_text(HEAD)
    return trainc.compile(source).module


def batches(tmp_path: Path, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a run from a step on."""
    known: dict[str, Any] = {}
    exec(PARTS, known)
    split, order = known["data"]().train, Order(SEED, SAMPLES)
    for step in range(first, 10 * STEPS):
        yield split.batch(order.indices(step * BATCH, BATCH))


def test_a_run_goes_back_with_a_smaller_rate_and_other_samples(tmp_path: Path) -> None:
    rules = "when steps >= 8 cooldown 100% { rollback, sgd.lr = sgd.lr / 4 }"
    summary = run(rules, tmp_path / "run")
    model = first_model(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    data, losses = batches(tmp_path, 0), list[float]()
    kept: Any = None

    def step() -> None:
        x, y = next(data)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for number in range(8):
        if number == 6:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        step()
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    optimizer.param_groups[0]["lr"] = 0.05
    del losses[6:]
    for _ in range(6, STEPS):
        step()
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in found] == [*range(1, STEPS + 1)]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-12)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(
            weights(tmp_path / "run")[name], expected, rtol=1e-12, atol=1e-13
        )
    (told,) = events(tmp_path / "run", "rolled-back")
    assert "from step 8 to step 6; the next samples follow those of step 8" in told
    assert any("sgd.lr 0.2 -> 0.05" in note for note in events(tmp_path / "run", "note"))
    assert f"{rules.partition(' {')[0]}: fired once, at step 8" in summary.lines


RULES = (
    "when steps > 3 and loss > mean(loss, 2 steps) cooldown 3 steps { rollback, sgd.lr = sgd.lr / 2 }\n"
    "when eval_loss < best(eval_loss) + 0.01 cooldown 3 steps { save }\n"
    'when steps >= 5 cooldown 100% { freeze "0.*" }'
)


@pytest.mark.parametrize("looks", [2, 4, 5, 7, 9, 12])
def test_a_run_with_rules_goes_on_bit_for_bit(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(RULES, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("trainc.runtime.run.loop.StopSignals", AfterSteps)
        patch.setattr(AfterSteps, "looks", looks)
        assert run(RULES, tmp_path / "parts").reason == "interrupted"
    run(RULES, tmp_path / "parts", resume=True)
    files = [tmp_path / name / "metrics.jsonl" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ends = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "parts")]
    assert [line for line in ends[0]["lines"] if "fired" in line] == [
        line for line in ends[1]["lines"] if "fired" in line
    ]
    assert len(events(tmp_path / "whole", "rolled-back")) >= 2


@pytest.mark.parametrize("last", [3, 6, 9, 12])
def test_a_run_that_was_killed_goes_on_from_what_it_had_saved(last: int, tmp_path: Path) -> None:
    head = HEAD.replace("on_nan", "keep = 9, on_nan")
    run(RULES, tmp_path / "whole", head)
    run(RULES, tmp_path / "parts", head)
    for path in (tmp_path / "parts/checkpoints").iterdir():  # as if killed before the next one
        if path.name >= f"step-{last + 1:08d}":
            path.rename(path.with_name(f".writing-{path.name}"))
    (tmp_path / "parts/summary.json").unlink()
    run(RULES, tmp_path / "parts", head, resume=True)
    files = [tmp_path / name / "metrics.jsonl" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_that_makes_no_progress_ends(tmp_path: Path) -> None:
    summary = run("when steps >= 5 { rollback }", tmp_path / "run")
    assert (summary.reason, summary.steps) == ("stopped", 5)
    assert "for the 11th time to step 3" in summary.message


def test_without_a_checkpoint_a_run_cannot_go_back(tmp_path: Path) -> None:
    summary = run("when steps >= 2 { rollback }", tmp_path / "run")
    assert summary.reason == "stopped"
    assert "and none was due before step 2" in summary.message


def test_early_stopping_is_that_of_the_evaluations_by_hand(tmp_path: Path) -> None:
    run("", tmp_path / "whole")
    found = {
        line["step"]: line["eval_loss"] for line in lines(tmp_path / "whole") if "eval_loss" in line
    }
    best, at, stop = float("inf"), 0, STEPS
    for step in range(STEPS):
        if found.get(step, best) < best:
            best, at = found[step], step
        if at and step - at > 3:
            stop = step
            break
    summary = run("when since_best(eval_loss) > 3 steps { stop }", tmp_path / "stopped")
    assert (summary.steps, summary.reason) == (stop, "stopped")
    assert stop < STEPS


def test_a_rule_evaluates_when_it_says_so(tmp_path: Path) -> None:
    run("when steps is finite cooldown 4 steps { evaluate }", tmp_path / "run")
    found = [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert found == sorted({1, 5, 9, 13} | set(range(2, STEPS + 1, 2)))


def test_a_step_that_is_not_finite_is_gone_back_from(tmp_path: Path) -> None:
    rules = "when steps >= 4 and sgd.lr > 0.1 { sgd.lr = 1.7e154 * 1e154 }\n"
    rules += "when not (loss is finite) { rollback, sgd.lr = 0.01 }"
    summary = run(rules, tmp_path / "run")
    assert (summary.reason, summary.steps, summary.skipped) == ("finished", STEPS, 0)
    assert "set by rules at the end: sgd.lr = 0.01" in summary.lines
    source = tmp_path / "spec.train"
    source.write_text(
        HEAD.replace("on_nan = skip", "on_nan = stop") + "when loss is nan { rollback }"
    )
    (found,) = trainc.check(source).errors
    assert found.rule == "never-acts"
    assert found.help == "write `on_nan = skip` in `run`"
    source.write_text(HEAD.replace(", checkpoint = 3 steps", "") + rules)
    (found,) = trainc.check(source).errors
    assert found.help == "write `checkpoint = 200 steps` in `run`, or let another rule `save`"


def test_a_loop_of_the_users_own_is_told_what_only_a_run_does(tmp_path: Path) -> None:
    rule = "when steps >= 2 cooldown 9 steps { rollback, sgd.lr = 0.05 }"
    spec = f"loss cross_entropy\noptimizer sgd {{ lr = 0.1 }}\n{rule}"
    program = trainc.compile(spec, first_model(tmp_path))
    data = batches(tmp_path, 0)
    state: Any = None
    for number in range(2):
        program.step(next(data))
        if number == 0:
            state = copy.deepcopy(program.state_dict())
    with pytest.raises(
        trainc.RollBack, match="goes back to the last good checkpoint: in a loop of your own, call"
    ):
        program.step(next(data))
    program.roll_back(state)
    assert [program.step(next(data))["lr_max"] for _ in range(2)] == [0.05, 0.05]
    assert program.clock.steps == 3


def test_a_loop_of_the_users_own_asks_the_report_what_to_save_and_evaluate(tmp_path: Path) -> None:
    spec = "loss cross_entropy\noptimizer sgd { lr = 0.1 }\nwhen steps < 1 { save, evaluate }"
    program = trainc.compile(spec, first_model(tmp_path))
    asked = []
    for _, batch in zip(range(2), batches(tmp_path, 0), strict=False):
        program.step(batch)
        asked.append((program.report().save, program.report().evaluate))
    assert asked == [(True, True), (False, False)]
