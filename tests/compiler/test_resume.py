"""Resuming under another spec: what still holds is kept, the rest restarts, and a note says so."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainc
from trainc.compiler.driver.train import train
from trainc.compiler.program.program import Program
from trainc.runtime.noise_scale.action import NoiseScaleAction
from trainc.runtime.noise_scale.estimate import Estimate
from trainc.runtime.noise_scale.resume import match_state
from trainc.runtime.noise_scale.settings import NoiseScaleSettings
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.checkpoint import DamagedCheckpoint
from trainc.runtime.storage.differences import ChangedRun
from trainc.runtime.storage.jsonl import read_jsonl

MEASURE = "noise_scale gns on type(LayerNorm) { smooth = 4 steps, calibrate = 2 steps }"
RULE = 'when gns > 1e9 { warn "large" }'
HEAD = """
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = ramp(4 samples, to = 8 samples, over = 60%), context = 16, limit_bytes = 30_000 }
loss cross_entropy
run { length = 12 steps, seed = 3, eval_batches = 1, checkpoint = 6 steps }
optimizer adamw { lr = 2e-3 }
"""


def carry_out(text: str, folder: Path, name: str = "spec", **options: Any) -> dict[str, list[str]]:
    """Train, and return what was noted by kind of event."""
    source = folder / f"{name}.train"
    source.write_text(text)
    train(source, folder / "run", quiet=True, executor="module", **options)
    lines = (folder / "run/events.jsonl").read_text().splitlines()
    noted: dict[str, list[str]] = {}
    for event in map(json.loads, lines):
        noted.setdefault(event.get("event", event.get("kind")), []).append(event.get("message", ""))
    return noted


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Return the folder of a run that has twelve steps behind it and may go on to twenty."""
    carry_out(HEAD + MEASURE + "\n" + RULE, tmp_path)
    return tmp_path


LONGER = HEAD.replace("12 steps", "20 steps")


def last(folder: Path) -> dict[str, Any]:
    return [line for line in read_jsonl(folder / "run/metrics.jsonl") if "loss" in line][-1]


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (
            MEASURE.replace("LayerNorm", "Linear"),
            "the sum over layers, the calibration, 5 layers restart; no longer measured:",
        ),
        (MEASURE.replace(", calibrate = 2 steps", ""), "no longer measured: the calibration"),
        (MEASURE.replace("smooth", "geometry = sign, smooth").replace(", calibrate = 2 steps", ""),
         "now measures samples in sign geometry, not samples in euclidean geometry: all averages restart"),
        ("", "gns: no longer in the program"),
    ],
)  # fmt: skip
def test_a_changed_measurement_keeps_what_fits(measure: str, said: str, stopped: Path) -> None:
    text = LONGER + measure + "\n" + (RULE if measure else "")
    with pytest.raises(trainc.SpecError, match="resume-needs-accept"):
        carry_out(text, stopped, "other", resume=True)
    noted = carry_out(text, stopped, "other", resume=True, accept=True)
    assert [line for line in noted["note"] if said in line]
    found = last(stopped)
    assert found["step"] == 20
    assert ("gns" in found) == bool(measure)
    assert ("gns.total" in found) == ("calibrate" in measure)


def test_an_unchanged_measurement_keeps_everything(stopped: Path) -> None:
    noted = carry_out(LONGER + MEASURE + "\n" + RULE, stopped, "other", resume=True, accept=True)
    assert "note" not in noted or not any(line.startswith("gns:") for line in noted["note"])
    (stopped / "straight").mkdir()
    carry_out(LONGER + MEASURE + "\n" + RULE, stopped / "straight")
    both = [last(folder)["gns.signal"] for folder in (stopped, stopped / "straight")]
    assert both[0] == pytest.approx(both[1], rel=1e-3)


def test_state_that_cannot_be_loaded_is_an_error(stopped: Path) -> None:
    text = LONGER.replace("adamw { lr = 2e-3 }", "adamw on type(Linear) { lr = 2e-3 }")
    text += "optimizer sgd as rest on all - type(Linear) { lr = 1e-3 }\n" + MEASURE
    with pytest.raises(trainc.SpecError) as caught:
        carry_out(text, stopped, "other", resume=True, accept=True)
    (found,) = caught.value.diagnostics
    assert found.rule == "resume-impossible"
    assert "which this clause does not optimize" in found.message
    assert "run { start = " in (found.help or "")


def test_a_run_of_an_old_plan_format_is_refused(stopped: Path) -> None:
    place = stopped / "run/checkpoints"
    newest = checkpoint.find_latest(place)
    assert newest.path is not None
    state = checkpoint.load_checkpoint(newest.path)
    state["program"]["made_by"] |= {"format": 0, "plan": "another"}
    checkpoint.save_checkpoint(place, newest.step, state)
    with pytest.raises(trainc.SpecError) as caught:
        carry_out(LONGER + MEASURE + "\n" + RULE, stopped, "other", resume=True, accept=True)
    (found,) = caught.value.diagnostics
    assert found.rule == "resume-impossible"
    assert "has format 0, but this version of trainc reads format" in found.notes[0]
    assert "start a new run in another folder" in (found.help or "")


def test_checkpoints_of_an_old_format_are_refused(stopped: Path) -> None:
    for manifest in (stopped / "run/checkpoints").glob("*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    said = "has format 1, but this version of trainc reads 3: resume with the version that saved it, or start a new run"
    with pytest.raises(DamagedCheckpoint, match=said):
        carry_out(LONGER + MEASURE + "\n" + RULE, stopped, "other", resume=True, accept=True)
    text = HEAD.replace("seed = 3", f'seed = 3, start = "{stopped}/run"') + MEASURE
    (stopped / "second").mkdir()
    with pytest.raises(trainc.SpecError) as caught:
        carry_out(text, stopped / "second")
    assert said in caught.value.diagnostics[0].message


def test_the_error_writes_fields_as_a_spec_does(stopped: Path) -> None:
    text = (LONGER + MEASURE + "\n" + RULE).replace("over = 60%", "over = 30%")
    with pytest.raises(trainc.SpecError) as caught:
        carry_out(text, stopped, "other", resume=True)
    (found,) = caught.value.diagnostics
    assert (
        "needs --accept: `data.batch` was ramp(4 samples, over = 60%, to = 8 samples) and is"
        " ramp(4 samples, over = 30%, to = 8 samples)"
    ) in found.notes
    assert "needs --accept: `run.length` was 12 steps and is 20 steps" in found.notes


def test_every_difference_is_listed_with_what_it_means(stopped: Path) -> None:
    text = LONGER.replace("checkpoint = 6 steps", "checkpoint = 5 steps, keep = 4")
    text = text.replace("lr = 2e-3", "lr = 1e-3, clip = 1")
    text += MEASURE.replace("{", '- "blocks.0.ln1" from 1 steps {') + "\n"
    text += "regularize l2_sp on ndim(2) until 90% { weight = 0.1 }\nwhen gns > 7 { save }"
    with pytest.raises(trainc.SpecError) as caught:
        carry_out(text, stopped, "other", resume=True)
    (found,) = caught.value.diagnostics
    assert found.notes == (
        "needs --accept: `adamw.clip` was not given and is 1",
        "needs --accept: `adamw.lr` was 0.002 and is 0.001",
        "needs --accept: `on` of `gns` was changed: without `blocks.0.ln1`",
        "needs --accept: `from` of `gns` was not given and is 1 steps",
        "needs --accept: `l2_sp` was added",
        "safe: `run.checkpoint` was 6 steps and is 5 steps",
        "safe: `run.keep` was 2 and is 4",
        "needs --accept: `run.length` was 12 steps and is 20 steps",
        'needs --accept: the rule `when gns > 1000000000 { warn "large" }` was removed',
        "needs --accept: the rule `when gns > 7 { save }` was added",
        "needs --accept: the next step of `adamw` had learning rate 0.002 and has 0.001, before factors",
    )


def test_a_safe_difference_needs_no_accept(stopped: Path) -> None:
    text = HEAD.replace("checkpoint = 6 steps", "checkpoint = 5 steps, keep = 4") + MEASURE
    noted = carry_out(text + "\n" + RULE, stopped, "other", resume=True)
    assert "safe: `run.checkpoint` was 6 steps and is 5 steps" in noted["note"]
    assert "safe: `run.keep` was 2 and is 4" in noted["note"]


def test_a_model_of_another_shape_cannot_be_accepted(stopped: Path) -> None:
    text = LONGER.replace("width = 16", "width = 24") + MEASURE + "\n" + RULE
    with pytest.raises(trainc.SpecError) as caught:
        carry_out(text, stopped, "other", resume=True, accept=True)
    (found,) = caught.value.diagnostics
    assert found.rule == "resume-impossible"
    said = "the model's parameter `embed.token.weight` was float32[256, 16] and is float32[256, 24]"
    assert f"impossible: {said}" in found.notes
    assert "needs --accept: `run.length` was 12 steps and is 20 steps" in found.notes


CONSTANT = "4 samples, micro = 2 samples"
SMALL = HEAD.replace("ramp(4 samples, to = 8 samples, over = 60%)", CONSTANT)


@pytest.mark.parametrize(
    ("before", "after", "batch"),
    [
        (CONSTANT, "8 samples, micro = 2 samples", 8),
        ("ramp(4 samples, to = 8 samples, over = 60%)", "4 samples", 4),
        (CONSTANT, "ramp(6 samples, to = 16 samples, over = 100%), micro = 2 samples", 12),
    ],
)
def test_an_accepted_batch_is_the_batch(
    tmp_path: Path, before: str, after: str, batch: int
) -> None:
    first, longer = SMALL.replace(CONSTANT, before), SMALL.replace("12 steps", "20 steps")
    carry_out(first, tmp_path)
    second = longer.replace(CONSTANT, after)
    with pytest.raises(trainc.SpecError, match=r"needs --accept: `data.batch` was"):
        carry_out(second, tmp_path, resume=True)
    carry_out(second, tmp_path, resume=True, accept=True)
    records = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [r["batch"] for r in records if r["step"] == 13 and "loss" in r] == [batch]


def test_a_batch_that_a_rule_set_survives_other_changes(tmp_path: Path) -> None:
    text = SMALL + "when step > 4 cooldown 100 steps { batch = 6 samples }"
    carry_out(text, tmp_path)
    carry_out(text.replace("12 steps", "20 steps"), tmp_path, resume=True, accept=True)
    assert last(tmp_path)["batch"] == 6


def test_a_batch_that_no_rule_sets_any_more_is_that_of_the_spec(tmp_path: Path) -> None:
    carry_out(SMALL + "when step > 4 cooldown 100 steps { batch = 6 samples }", tmp_path)
    longer = SMALL.replace("12 steps", "20 steps")
    noted = carry_out(longer, tmp_path, resume=True, accept=True)["note"]
    assert "batch: 4 samples again, because no rule sets it" in noted
    assert last(tmp_path)["batch"] == 4


def test_a_changed_rule_starts_anew(tmp_path: Path) -> None:
    rule = 'when step > 4 cooldown 100 steps { warn "one" }'
    carry_out(SMALL + rule, tmp_path)
    other = rule.replace("4", "5").replace("one", "two")
    text = SMALL.replace("12 steps", "20 steps") + other
    noted = carry_out(text, tmp_path, resume=True, accept=True)["note"]
    said = "rule 1: `when step > 5 cooldown 100 steps` has not fired yet, because the rule is another one"
    assert said in noted
    assert noted.count("two") == 1


def test_a_program_loads_only_states_of_its_own_spec() -> None:
    def compiled(steps: int) -> Program:
        text = f"loss mse optimizer sgd {{ lr = 0.1 * cosine() }} run {{ length = {steps} steps }}"
        return trainc.compile(text, nn.Linear(3, 1))

    before, same, longer = compiled(10), compiled(10), compiled(20)
    for _ in range(5):
        before.step((torch.ones(2, 3), torch.zeros(2, 1)))
    state = copy.deepcopy(before.state_dict())
    with pytest.raises(ChangedRun) as caught:
        longer.load_state_dict(state)
    assert [str(one) for one in caught.value.differences] == [
        "needs --accept: `run.length` was 10 steps and is 20 steps",
        "needs --accept: the next step of `sgd` had learning rate 0.05 and has 0.0853553, before factors",
    ]
    assert longer.clock.steps == 0
    same.load_state_dict(state)
    assert longer.load_compatible(state) == []
    assert longer.clock.steps == same.clock.steps == 5


def test_a_checkpoint_has_the_rates_that_its_last_step_used(stopped: Path) -> None:
    found = checkpoint.find_latest(stopped / "run/checkpoints").path
    assert found is not None
    rates = checkpoint.load_checkpoint(found)["program"]["rates"]["in_force"]
    assert set(rates.values()) == {last(stopped)["lr_min"]}
    assert "blocks.0.ln1.weight" in rates


def test_layers_that_stay_keep_their_averages() -> None:
    settings = NoiseScaleSettings(8.0, "samples")
    before = NoiseScaleAction("gns", {"a": ("a.w",), "b": ("b.w",)}, settings)
    for sums in (before.total, *before.layers.values()):
        sums.add(Estimate(3.0, 2.0), 0.5)
    after = NoiseScaleAction("gns", {"b": ("b.w",), "c": ("c.w",)}, settings)
    said = after.load_compatible(before.state_dict())
    assert said == ("gns: the sum over layers, 1 layer restart; no longer measured: `a`")
    assert after.layers["b"].state() == before.layers["b"].state()
    assert not any(after.layers["c"].state())
    assert not any(after.total.state())
    with pytest.raises(ValueError, match="gns: the checkpoint has measurements of another clause"):
        after.load_state_dict(before.state_dict())


def test_estimates_of_another_kind_are_not_kept() -> None:
    state = {"quantity": "documents in euclidean geometry", "total": torch.zeros(3)}
    assert match_state(state, {"total": 3}, "samples in euclidean geometry") == (
        {},
        "now measures samples in euclidean geometry, not documents in euclidean geometry: all averages restart",
    )
    assert (
        match_state({"total": torch.zeros(3)}, {"total": 4}, "x")[1]
        == "the sum over layers restarts"
    )


def test_a_sum_that_starts_anew_begins_as_one_of_a_fresh_run_does() -> None:
    """Its first estimate stands for one step, however much of the run has passed."""
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Signals, Step

    late = NoiseScaleAction("gns", {"a": ("a.w",)}, NoiseScaleSettings(100.0, "samples"))
    step = Step(Clock(steps=500, samples=4000), {}, Signals(), 8, 8, samples=8)
    assert late._elapsed(step) == 8
    assert late.position == 4008
    assert math.isnan(late.total.noise_scale())
