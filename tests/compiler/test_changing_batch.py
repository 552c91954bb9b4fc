"""A changing batch from the spec to the run: plans, accumulation, resumed runs, rules with a cooldown."""

import math
import re
from pathlib import Path
from typing import Any, Self

import pytest
import torch

import trainc
from trainc.compiler.driver.train import train
from trainc.runtime.rules.actions import Save, SetBatch, round_to_micro_batches
from trainc.runtime.rules.rule import Rule
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Signals, Step
from trainc.runtime.storage.jsonl import read_jsonl

STEPS = 24
SPEC = """
model "examples.models:gpt" {{ layers = 2, width = 32, heads = 2, context = 16 }}
data "examples.data:stdlib" {{ batch = {batch}, context = 16, limit_bytes = 30_000 }}
loss cross_entropy
run {{ length = {length}, seed = 5, eval_batches = 2 }}
optimizer adamw {{ lr = 3e-3 * (warmup({rise}) then cosine()), clip = 1.0 }}
lr batch_scaling
noise_scale gns on type(LayerNorm) {{ smooth = 5 steps }}
"""
POLICIES = {
    "ramp": "ramp(4 samples, to = 16 samples, over = 2k tokens, from = 200 tokens), micro = 2 samples",
    "follow": "follow(gns, factor = 4, min = 2 samples, max = 12 samples, every = 3 steps)",
    "signal_noise": "signal_noise(gns, max = 16 samples, min = 2 samples, every = 4 steps, from = 20%)",
}


def spec(batch: str, length: str = f"{STEPS} steps", rise: str = "10%", rule: str = "") -> str:
    return SPEC.format(batch=batch, length=length, rise=rise) + rule


class AfterSteps:
    """Asks a run to leave after some steps, as a signal does."""

    steps = 0

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the process's signals as they are."""

    def requested(self) -> str | None:
        self.asked += 1
        return "interrupted" if self.asked > self.steps else None


def run(text: str, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Train in `out`, and return the lines that tell of steps."""
    source = out.with_suffix(".train")
    source.write_text(text)
    train(source, out, quiet=True, executor="module", **options)
    return [line for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_left_in_the_midst_goes_on_bit_for_bit(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = spec(POLICIES[policy])
    lines = run(text, tmp_path / "whole")
    sizes = [line["batch"] for line in lines]
    assert len(set(sizes)) > 1
    change = next(i for i, size in enumerate(sizes) if size != sizes[0])
    with monkeypatch.context() as patch:
        patch.setattr("trainc.runtime.run.loop.StopSignals", AfterSteps)
        patch.setattr(AfterSteps, "steps", change + 1)
        run(text, tmp_path / "parts")
        run(text, tmp_path / "parts", resume=True)
    run(text, tmp_path / "parts", resume=True)
    files = [tmp_path / name / "metrics.jsonl" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    told = [(tmp_path / n / "summary.json").read_text() for n in ("whole", "parts")]
    assert all("data: batch changed" in text for text in told)


def test_the_batch_is_whole_micro_batches_and_drops_no_sample(tmp_path: Path) -> None:
    lines = run(spec(POLICIES["ramp"]), tmp_path / "run")
    assert {line["batch"] % 2 for line in lines} == {0}
    assert lines[0]["batch"] == 4
    assert lines[-1]["batch"] == 16
    assert lines[-1]["samples"] == sum(line["batch"] for line in lines)
    assert lines[-1]["tokens"] == 16 * lines[-1]["samples"]


def test_the_table_of_a_ramp_is_what_the_run_does(tmp_path: Path) -> None:
    text = spec(POLICIES["ramp"], length="5k tokens", rise="10%")
    rows = {row["steps"]: row for row in trainc.plan(text).schedules}
    lines = {line["step"]: line for line in run(text, tmp_path / "run")}
    assert max(rows) == max(lines)
    for step, row in rows.items():
        if step:
            assert (row["samples"], row["tokens"]) == (
                lines[step]["samples"],
                lines[step]["tokens"],
            )
        if step + 1 in lines:
            assert row["values"]["batch"] == lines[step + 1]["batch"]
            scaled = row["values"]["adamw lr"] * (row["values"]["batch"] / 4) ** 0.5
            assert lines[step + 1]["lr_max"] == pytest.approx(scaled, rel=1e-12)


def test_a_schedule_in_tokens_is_exact_whatever_the_batch_does(tmp_path: Path) -> None:
    lines = run(spec(POLICIES["follow"], length="6k tokens", rise="1500 tokens"), tmp_path / "run")
    lead, before = 2 * 16, 0
    for line in lines:
        rate = 3e-3 * (line["batch"] / 2) ** 0.5 * min(1.0, (before + lead) / 1500)
        if before < 1500:
            assert line["lr_max"] == pytest.approx(rate, rel=1e-12)
        before = line["tokens"]


def test_the_plan_says_what_sets_the_batch_and_what_is_an_estimate() -> None:
    measured = "noise_scale gns on type(LayerNorm) { smooth = 5 steps }\n"
    text = spec(POLICIES["ramp"], length="5k tokens", rise="10 steps").replace(measured, "")
    plan = trainc.plan(text)
    batch = plan.settings["batch"]
    assert (batch["start"], batch["end"], batch["micro_batch"]) == (4, 16, 2)
    assert batch["notes"] == ["10 steps is taken as 640 tokens, computed for the starting batch"]
    (row,) = [row for row in plan.steps if row["clause"] == "data"]
    assert (row["phase"], row["writes"]) == (1, ["batch"])
    assert row["action"].startswith("batch = ramp(4 samples")
    exact = trainc.plan(text.replace("10 steps", "10%"))
    assert exact.settings["batch"]["notes"] == []
    followed = trainc.plan(spec(POLICIES["follow"])).settings["batch"]
    assert "depends on measured signals" in followed["notes"][-1]
    rule = "when gns > 2 * batch cooldown 5 steps { batch = batch + 2 samples }"
    by_rule = trainc.plan(spec("4 samples, micro = 2 samples", rule=rule))
    assert by_rule.settings["batch"]["set_by"] == "when rules"
    assert by_rule.steps[0]["every"] == "cooldown 5 steps"
    assert "batch" not in trainc.plan(spec("4 samples").replace("lr batch_scaling", "")).settings


def test_a_saved_program_sets_its_batch_too(tmp_path: Path) -> None:
    from examples.models import gpt

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return gpt(layers=2, width=32, heads=2, context=16)

    program = trainc.compile(spec(POLICIES["ramp"]), model())
    loaded = trainc.load(program.save(tmp_path / "saved"), model())
    ids = torch.randint(0, 256, (16, 17), generator=torch.Generator().manual_seed(0))
    for made in (program, loaded):
        for _ in range(12):
            made.begin()
            made.step((ids[: made.batch_size, :-1], ids[: made.batch_size, 1:]))
    assert program.batch_size == loaded.batch_size > 4
    assert program.plan.settings["batch"] == loaded.plan.settings["batch"]


def test_the_python_form_is_the_same_spec() -> None:
    from trainc.compiler.constructs.data.data import Data
    from trainc.dsl.resolve.spec import Spec
    from trainc.dsl.resolve.statements import Clause

    policy = "follow(gns, max = 64 samples, min = 16 samples, factor = 50%, grow_only = true)"
    gns = "noise_scale gns on type(LayerNorm)"
    text = trainc.check(f'data "m:f" {{ batch = {policy} }}\n{gns}').spec
    assert text is not None
    python = Spec((Clause(Data(path="m:f", batch=policy)), text.clauses[1]))  # type: ignore[arg-type]
    assert python == text
    assert Spec.from_json(text.to_json(), trainc.catalog()) == text
    with pytest.raises(trainc.SpecError, match="unknown-name"):
        Spec((Clause(Data(path="m:f", batch=policy)),))  # type: ignore[arg-type]


# Rules that rest


def fired(rule: Rule, steps: int, machine: StepMachine | None = None) -> list[int]:
    made = machine or machine_of(rule)
    for _ in range(steps):
        step: Step = made.begin()
        step.samples, step.tokens = step.batch_size, 8 * step.batch_size
        made.finish()
    return list(rule.fired)


def machine_of(rule: Rule) -> StepMachine:
    made = StepMachine([rule], Clock(), {}, Signals())
    made.batch_size = made.micro_size = 4
    return made


def rule_of(hold: TimeSpan | None, cooldown: TimeSpan | None, true_at: range = range(1000)) -> Rule:
    def condition(clock: Clock, values: object) -> bool:
        return clock.steps in true_at

    return Rule("rule 1", "when x", "when x { save }", condition, hold, [Save()], (), cooldown)


def steps(amount: int) -> TimeSpan:
    return TimeSpan(amount, "steps")


def test_a_rule_rests_for_its_cooldown_after_it_fired() -> None:
    assert fired(rule_of(None, None), 5) == [0, 1, 2, 3, 4]
    assert fired(rule_of(None, steps(3)), 10) == [0, 3, 6, 9]
    assert fired(rule_of(None, TimeSpan(64, "tokens")), 6) == [0, 2, 4]


def test_a_resting_rule_does_not_look_so_a_hold_begins_after_it() -> None:
    assert fired(rule_of(steps(2), steps(5)), 20) == [2, 9, 16]
    assert fired(rule_of(steps(2), None), 12) == [2, 5, 8, 11]
    assert fired(rule_of(None, steps(5), range(2, 5)), 12) == [2]


@pytest.mark.parametrize("left", [1, 3, 4, 9])
def test_a_rule_rests_on_after_a_resume(left: int) -> None:
    made = [rule_of(steps(2), steps(5)) for _ in range(3)]
    first = machine_of(made[1])
    fired(made[1], left, first)
    second = machine_of(made[2])
    second.load_state_dict(first.state_dict())
    assert fired(made[2], 20 - left, second) == fired(made[0], 20)


def test_a_cooldown_in_percent_is_a_part_of_the_run(tmp_path: Path) -> None:
    rule = "when step >= 0 cooldown 25% { batch = batch + 2 samples }"
    lines = run(spec("2 samples", rule=rule), tmp_path / "run")
    assert [line["batch"] for line in lines] == [4] * 6 + [6] * 6 + [8] * 6 + [10] * 6


# Rules and whole micro-batches


@pytest.mark.parametrize("micro", [1, 4, 7])
def test_a_rules_batch_lies_between_the_present_one_and_what_it_asks_for(micro: int) -> None:
    for present in range(micro, 12 * micro, micro):
        for wanted in (-3.0, 0.0, 0.5, 1.0, 3.9, 8.0, 9.0, 10.5, 27.99, 28.0, 1e6):
            size = round_to_micro_batches(wanted, present, micro)
            assert size % micro == 0
            assert size >= micro
            if wanted >= micro:
                assert min(present, wanted) <= size <= max(present, wanted)
                # and no whole number of micro-batches is nearer
                assert abs(wanted - size) < micro
            else:
                assert size == micro


def asked(value: float, start: int = 8) -> tuple[Rule, StepMachine]:
    performs = [SetBatch(lambda clock, values: value)]
    rule = Rule("rule 1", "when x", "when x {}", lambda clock, values: True, None, performs)
    made = machine_of(rule)
    made.batch_size = start
    return rule, made


def notes(machine: StepMachine, steps: int) -> list[str]:
    found = []
    for _ in range(steps):
        step = machine.begin()
        step.samples = step.batch_size
        found += step.notes
        machine.finish()
    return found


def test_a_rule_that_asks_for_less_than_a_micro_batch_more_moves_nothing_and_says_so_once() -> None:
    rule, made = asked(9)
    assert notes(made, 3) == [
        "batch stays at 8 samples: 9 samples were rounded to micro-batches of 4: when x"
    ]
    assert made.batch_size == 8
    again, resumed = asked(9)
    resumed.load_state_dict(made.state_dict())
    assert notes(resumed, 2) == []
    assert again.fired == [*rule.fired, 3, 4]


def test_a_rule_that_asks_for_what_there_is_says_nothing() -> None:
    assert notes(asked(8)[1], 2) == []


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_batch_that_is_no_number_changes_nothing_and_is_told_once(value: float) -> None:
    rule, made = asked(value)
    assert notes(made, 2) == [f"batch stays as it is, because its value is {value}: when x"]
    assert made.batch_size == 8
    assert rule.fired == []


def test_a_rule_grows_the_batch_up_to_its_bound_and_no_further(tmp_path: Path) -> None:
    rule = "when step >= 0 cooldown 4 steps { batch = min(2 * batch, 11 samples) }"
    lines = run(spec("2 samples, micro = 2 samples", rule=rule), tmp_path / "run")
    assert [line["batch"] for line in lines] == [4] * 4 + [8] * 4 + [10] * (STEPS - 8)


@pytest.mark.parametrize(
    ("sizes", "ways"),
    [
        ((10, 4), {"batch = 8 samples", "batch = 12 samples", "micro = 2 samples"}),
        ((4, 8), {"batch = 8 samples", "micro = 4 samples"}),
        ((7, 4), {"batch = 4 samples", "batch = 8 samples", "micro = 1 samples"}),
    ],
)
def test_each_way_out_of_a_batch_that_is_no_whole_number_of_micro_batches_is_one(
    sizes: tuple[int, int], ways: set[str]
) -> None:
    text = 'data "m:f" {{ batch = {} samples, micro = {} samples }}'
    checked = trainc.check(text.format(*sizes))
    (wrong,) = checked.diagnostics
    assert wrong.span is not None
    assert wrong.span.text == f"{sizes[0]} samples"
    assert set(re.findall(r"`(\w+ = \d+ samples)`", wrong.labels[0].text)) == ways
    for way in ways:
        name, size = way.removesuffix(" samples").split(" = ")
        mended = dict(zip(("batch", "micro"), sizes, strict=True)) | {name: int(size)}
        assert not trainc.check(text.format(mended["batch"], mended["micro"])).diagnostics
