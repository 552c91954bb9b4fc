"""Learned starts against the rule by hand, interrupted runs, the choice by value, and `init` of a model."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trainc
from examples.data import sines
from examples.models import tanh_net
from tests import learned_tasks
from tests.cli.test_app import command
from trainc.compiler.driver.train import train
from trainc.compiler.learn.learn_init import choose_start, learn_start, least
from trainc.compiler.learn.tasks import Tasks
from trainc.runtime.data.order import Order
from trainc.runtime.data.reader import Reader
from trainc.runtime.processes import launch
from trainc.runtime.run.stop_signals import StopSignals
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.random_streams import derive_seed
from trainc.runtime.storage.saved_weights import read_weights

SPEC = """train 1
model "examples.models:tanh_net" { width = 8 }
data "examples.data:sines" { batch = 5 samples }
loss mse
optimizer sgd { lr = 0.05, momentum = 0.9 }
run { length = 4 steps, seed = 3, device = cpu }
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "family.train"
    path.write_text(SPEC)
    return path


def test_it_is_reptile_by_hand(spec: Path) -> None:
    """theta + e (phi - theta), with momentum that begins anew on each task, and e from 0.5 to 0."""
    found, done = learn_start(spec, tasks=3, inner=4, rate=0.5)
    assert done == 3
    model = tanh_net(8)
    model.load_state_dict(Tasks(spec).start())
    for task in range(3):
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        samples, _ = sines(task)
        order = Order(derive_seed(3, "task", task), len(samples))
        for step in range(4):
            x, y = samples.batch(order.indices(5 * step, 5))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), start, strict=True):
                parameter.copy_(before + 0.5 * (1 - task / 3) * (parameter - before))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


BATCHES = {
    "batch = ramp(2 samples, to = 6 samples, over = 50%), micro = 2 samples": (2, 4, 6, 6),
    "batch = 2 samples": (2, 2, 6, 6),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_that_changes_begins_anew_on_each_task(
    spec: Path, batch: str, streamed: bool
) -> None:
    """By policies and by rules, of data sets and of samples in an order of their own: by hand."""
    sizes = BATCHES[batch]
    text = SPEC.replace("batch = 5 samples", batch).replace(", momentum = 0.9", "")
    if streamed:
        text = text.replace("examples.data:sines", "tests.learned_tasks:endless")
    if sizes == (2, 2, 6, 6):
        text += "when step >= 2 { batch = 6 samples }\n"
    spec.write_text(text)
    tasks = Tasks(spec)
    for task in range(2):
        start = tasks.start()
        found, _, _ = tasks.train(task, start, 4)
        model = tanh_net(8)
        model.load_state_dict(start)
        samples, _ = sines(task)
        order = Order(derive_seed(3, "task", task), len(samples))
        at = 0
        for size in sizes:
            places = [i % 10 for i in range(at, at + size)] if streamed else order.indices(at, size)
            x, y = samples.batch(places)
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.05 * parameter.grad)
            at += size
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_what_a_stream_draws_is_the_tasks_own(spec: Path) -> None:
    spec.write_text(SPEC.replace("examples.data:sines", "tests.learned_tasks:noisy"))
    whole, _ = learn_start(spec, tasks=3, inner=2, rate=0.7)
    begin = learn_start(spec, tasks=3, inner=2, rate=0.7, stopped=iter([False, True]).__next__)
    rest, _ = learn_start(spec, tasks=3, inner=2, rate=0.7, begin=begin)
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())


def test_starts_are_chosen_by_held_out_samples_without_an_end(spec: Path) -> None:
    """By `eval_batches` batches of them: here the ten samples once."""
    _, wanted = choose_start(spec, starts=2, tasks=1, inner=2)
    text = SPEC.replace("device = cpu", "device = cpu, eval_batches = 2")
    spec.write_text(text.replace("examples.data:sines", "tests.learned_tasks:endless"))
    _, found = choose_start(spec, starts=2, tasks=1, inner=2)
    assert len(found) == 2
    assert found != wanted  # other samples train first


def test_it_starts_with_the_weights_that_the_run_would(spec: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) for name, value in tanh_net(8).state_dict().items()}
    save_file(weights, tmp_path / "begun.safetensors")
    spec.write_text(SPEC.replace("seed = 3", f'seed = 3, start = "{tmp_path}/begun.safetensors"'))
    start = Tasks(spec).start()
    assert all(torch.equal(value, start[name]) for name, value in weights.items())
    with pytest.raises(ValueError, match="the same weights for every seed: let it draw them"):
        choose_start(spec, starts=2, tasks=1, inner=1)
    spec.write_text(SPEC.replace("seed = 3", 'seed = 3, start = "nowhere"'))
    with pytest.raises(trainc.SpecError, match="nowhere"):
        Tasks(spec)


@pytest.mark.parametrize("how", ["eval", "rule"])
def test_rules_read_the_evaluations_of_a_task(spec: Path, how: str) -> None:
    """From the first evaluation on, after two steps, the rate is 0."""
    text = SPEC if how == "rule" else SPEC.replace("seed = 3", "seed = 3, eval = 2 steps")
    text += "when eval_loss < 1e9 { sgd.lr = 0 }\n"
    if how == "rule":
        text += "when step >= 1 { evaluate }\n"
    spec.write_text(text.replace(", momentum = 0.9", ""))
    tasks = Tasks(spec)
    ends = [tasks.train(0, tasks.start(), steps)[0] for steps in (2, 3, 4)]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])
        assert torch.equal(value, ends[2][name])
    plain = SPEC.replace(", momentum = 0.9", "")
    spec.write_text(plain)
    free, _, _ = Tasks(spec).train(0, tasks.start(), 4)
    assert any(not torch.equal(value, ends[2][name]) for name, value in free.items())


def test_rules_that_read_evaluations_need_held_out_samples(spec: Path) -> None:
    text = SPEC.replace("examples.data:sines", "tests.learned_tasks:noisy")
    spec.write_text(text + "when eval_loss < 1 { sgd.lr = 0 }\nwhen step >= 1 { evaluate }\n")
    with pytest.raises(trainc.SpecError, match="the data has no samples to evaluate on"):
        Tasks(spec)


def test_what_reads_a_task_is_closed(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(Reader, "close", lambda self: closed.append(self))
    learn_start(spec, tasks=3, inner=1, rate=0.5)
    assert len(closed) == 3


@pytest.mark.parametrize("select", ["gradient", "magnitude"])
def test_a_mask_begins_with_the_weights_of_the_start(spec: Path, select: str) -> None:
    """Where entries of 16-bit weights have values of their own, which an optimizer updates."""
    text = SPEC.replace("examples.models:tanh_net", "tests.learned_tasks:in_16_bits")
    text = text.replace("lr = 0.05", "lr = 1e-9")
    spec.write_text(text + f"mask sift on ndim(2) {{ density = 50%, select = {select} }}\n")
    tasks = Tasks(spec)
    start = {name: value + 1 for name, value in tasks.start().items()}
    end, _, _ = tasks.train(0, start, 3)
    assert all(torch.equal(value, start[name]) for name, value in end.items())


def test_an_interrupted_run_goes_on_with_the_same_numbers(spec: Path) -> None:
    whole, _ = learn_start(spec, tasks=6, inner=2, rate=0.7)
    asked = iter(range(9))
    begin = learn_start(spec, tasks=6, inner=2, rate=0.7, stopped=lambda: next(asked) == 2)
    assert begin[1] == 2
    rest, done = learn_start(spec, tasks=6, inner=2, rate=0.7, begin=begin)
    assert done == 6
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())


def test_a_learned_start_fits_new_tasks_faster_than_a_random_one(spec: Path) -> None:
    learned, _ = learn_start(spec, tasks=150, inner=4, rate=0.5)
    tasks = Tasks(spec)
    random = tasks.start()
    values = []
    for start in (learned, random):
        found = []
        for task in range(1000, 1020):
            tasks.train(task, start, 4)
            found.append(tasks.value(task))
        values.append(sum(found) / len(found))
    assert values[0] < values[1]


def test_the_best_of_several_starts_has_the_least_loss(spec: Path) -> None:
    drawn = [Tasks(spec, None, number).start()["0.weight"] for number in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    torch.manual_seed(1)
    assert torch.equal(drawn[1], tanh_net(8).state_dict()["0.weight"])
    best, values = choose_start(spec, starts=3, tasks=2, inner=3)
    number = values.index(min(values))
    assert len(values) == 3
    assert all(
        torch.equal(value, best[name]) for name, value in Tasks(spec, None, number).start().items()
    )
    tasks = Tasks(spec, None, number)
    means = []
    for task in range(2):
        tasks.train(task, best, 3)
        _, held_out = sines(task)
        x, y = held_out.batch(range(10))
        means.append(float(nn.functional.mse_loss(tasks.program.module(x), y).detach()))
    assert values[number] == pytest.approx(sum(means) / 2, rel=1e-6)


def test_masks_regularizers_and_the_precision_take_part(spec: Path) -> None:
    clauses = "regularize ema { decay = 0.5 }\nmask magnitude on ndim(2) { density = 50% }\n"
    spec.write_text(SPEC.replace("device = cpu", "device = cpu, precision = bf16") + clauses)
    found, _ = learn_start(spec, tasks=2, inner=2, rate=1.0)
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("examples.data:sines", "examples.data:curve", "argument .task"),
        ("loss mse\n", "", "loss"),
    ],
)
def test_a_spec_without_tasks_is_refused(spec: Path, old: str, new: str, said: str) -> None:
    spec.write_text(SPEC.replace(old, new))
    with pytest.raises(trainc.SpecError, match=said):
        learn_start(spec, tasks=1, inner=1, rate=0.5)


def test_steps_that_diverge_are_an_error(spec: Path) -> None:
    spec.write_text(SPEC.replace("lr = 0.05", "lr = 1e30"))
    with pytest.raises(ValueError, match="task 0 ends at step 1: the loss is inf"):
        learn_start(spec, tasks=2, inner=4, rate=0.5)


def test_the_verb_writes_a_file_with_which_a_model_starts(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = tmp_path / "init.safetensors"
    given = ["learn-init", str(spec), "--tasks", "3", "--inner", "2", "--to", str(init)]
    assert command(monkeypatch, *given) == 0
    assert "3 of 3 tasks" in capsys.readouterr().out
    text = SPEC.replace("width = 8", f'width = 8, init = "{init}"')
    program = trainc.compile(text)
    for name, value in load_file(str(init)).items():
        assert torch.equal(program.module.state_dict()[name], value)
    other = tmp_path / "other.train"
    other.write_text(text)
    train(other, tmp_path / "run", quiet=True)
    notes = (tmp_path / "run" / "events.jsonl").read_text()
    assert "learned over 3 of 3 tasks of 2 steps at rate 0.5 (Reptile)" in notes
    assert command(monkeypatch, *given[:-1], str(tmp_path / "x.bin")) == 2
    assert command(monkeypatch, *given, "--rate", "0.25", "--resume") == 2


def test_the_verb_chooses_by_value(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = tmp_path / "init.safetensors"
    given = [
        "--tasks",
        "1",
        "--inner",
        "1",
        "--select",
        "value",
        "--starts",
        "2",
        "--to",
        str(init),
    ]
    assert command(monkeypatch, "learn-init", str(spec), *given) == 0
    assert capsys.readouterr().out.count("seed ") == 3
    assert load_file(str(init))


def test_weights_that_do_not_fit_are_an_error_at_init(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file({"0.weight": torch.zeros(2, 2)}, wrong)
    text = SPEC.replace("width = 8", f'width = 8, init = "{wrong}"')
    with pytest.raises(trainc.SpecError, match="cannot be loaded into this model") as failed:
        trainc.compile(text)
    (found,) = failed.value.diagnostics
    assert json.loads(found.labels[0].span.text) == str(wrong)


@pytest.mark.parametrize("about", ["[1]", "{}", "made by hand"])
def test_weights_of_which_another_program_says_something_are_read(
    tmp_path: Path, about: str
) -> None:
    init = tmp_path / "init.safetensors"
    save_file(dict(tanh_net(8).state_dict()), init, {"trainc": about})
    path = tmp_path / "one.train"
    path.write_text(SPEC.replace("width = 8", f'width = 8, init = "{init}"'))
    train(path, tmp_path / "run", quiet=True)
    events = read_jsonl(tmp_path / "run/events.jsonl")
    (said,) = (r for r in events if f"the model starts with {init}: sha256" in r.get("message", ""))
    assert said["event"] == "note"


def test_init_and_start_together_are_an_error(tmp_path: Path) -> None:
    text = SPEC.replace("width = 8", 'width = 8, init = "a.safetensors"')
    text = text.replace("seed = 3", 'seed = 3, start = "b.safetensors"')
    with pytest.raises(trainc.SpecError, match="in place of those of `init`"):
        trainc.compile(text)
    with pytest.raises(trainc.SpecError, match="in place of those of `init`"):
        trainc.plan(text)


@pytest.mark.parametrize("field", ["init", "start"])
def test_a_resumed_run_does_not_read_its_first_weights_again(tmp_path: Path, field: str) -> None:
    init = tmp_path / "init.safetensors"
    save_file(dict(tanh_net(8).state_dict()), init)
    old, new = ("width = 8", "width = 8, ") if field == "init" else ("seed = 3", "seed = 3, ")
    path = tmp_path / "one.train"
    text = SPEC.replace(old, f'{new}{field} = "{init}"')
    text = text.replace("device = cpu", "device = cpu, checkpoint = 2 steps, keep = 9")
    path.write_text(text + "regularize l2_sp on all { weight = 0.1 }\n")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(path, whole, quiet=True)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/step-00000004")
    (parts / "summary.json").unlink()
    init.unlink()
    train(path, parts, quiet=True, resume=True)
    found, wanted = (read_weights(run) for run in (parts, whole))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    events = (parts / "events.jsonl").read_text()
    assert events.count("the model starts with") == (field == "init")


def test_init_beside_a_model_that_is_passed_is_warned_of() -> None:
    text = SPEC.replace("width = 8", 'width = 8, init = "a.safetensors"')
    for made in (trainc.compile(text, tanh_net(8)).plan, trainc.plan(text, tanh_net(8))):
        (warning,) = made.warnings
        assert warning.rule == "no-effect"
        assert "`init` has no effect" in warning.message
        assert warning.span is not None
        assert warning.span.text == '"a.safetensors"'
    assert not trainc.compile(SPEC, tanh_net(8)).plan.warnings


LEFT_OUT = {
    "--rate 0": "at 0 nothing is learned",
    "--rate 2": "--rate",
    "--rate nan": "--rate",
    "--starts 3": "without --select there is one start",
    "--select value --rate 0.5": "--select learns nothing",
    "--select value --resume": "--select begins anew",
    "--resume": "is missing, so there is nothing to go on with",
}


def test_several_processes_are_refused(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(launch, "_CONNECT", timedelta(seconds=0.1))  # the other one is not there
    init = tmp_path / "init.safetensors"
    given = ["learn-init", str(spec), "--tasks", "1", "--to", str(init)]
    assert command(monkeypatch, *given) == 1
    said = "works in one process, and a launcher started 2"
    assert f"`trainc learn-init` {said}" in capsys.readouterr().err
    assert command(monkeypatch, "influence", str(tmp_path)) == 1
    assert f"`trainc influence` {said}" in capsys.readouterr().err


@pytest.mark.parametrize("words", LEFT_OUT)
def test_options_that_do_nothing_are_errors(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    init = tmp_path / "init.safetensors"
    given = ["learn-init", str(spec), "--tasks", "1", "--inner", "1", "--to", str(init)]
    assert command(monkeypatch, *given, *words.split()) == 2
    assert LEFT_OUT[words] in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not init.exists()


def test_the_folder_of_the_file_is_made_before_anything_is_learned(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = tmp_path / "new/folder/init.safetensors"
    given = ["learn-init", str(spec), "--tasks", "1", "--inner", "1", "--to", str(init)]
    assert command(monkeypatch, *given) == 0
    assert load_file(str(init))


def test_a_start_whose_loss_is_not_finite_is_never_the_best(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert least([float("nan"), 3.0, 2.0, float("-inf")]) == 2
    with pytest.raises(ValueError, match="no loss of 2 starts is finite"):
        least([float("nan"), float("inf")])
    values = iter([float("nan"), 1.0])
    monkeypatch.setattr(Tasks, "value", lambda self, task: next(values))
    init = tmp_path / "init.safetensors"
    given = ["--tasks", "1", "--inner", "1", "--select", "value", "--starts", "2", "--to"]
    assert command(monkeypatch, "learn-init", str(spec), *given, str(init)) == 0
    assert "seed 1: loss 1 *" in capsys.readouterr().out
    wanted = Tasks(spec, None, 1).start()
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(str(init)).items())


ODD = """train 1
model "tests.learned_tasks:classes" {}
data "tests.learned_tasks:odd" { batch = 20 samples }
loss cross_entropy
optimizer sgd { lr = 0.1 }
run { length = 2 steps, device = cpu }
"""


@pytest.mark.parametrize("select", [(), ("--select", "value", "--starts", "2")])
def test_what_is_wrong_in_a_task_is_told_with_its_clause_and_its_number(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    select: tuple[str, ...],
) -> None:
    spec.write_text(ODD)
    given = ["learn-init", str(spec), "--tasks", "3", "--to", str(tmp_path / "x.safetensors")]
    assert command(monkeypatch, *given, *select) == 1
    said = capsys.readouterr().err
    assert "error[loss-mismatch]: a target is the class 3" in said
    assert "family.train:4:1" in said
    assert "in task 1, whose data is that of `task = 1`" in said


def test_what_was_learned_before_an_error_is_kept(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What no clause explains has the number of its task; with mended data `--resume` gives the same numbers."""
    init, whole = tmp_path / "init.safetensors", tmp_path / "whole.safetensors"
    spec.write_text(ODD)

    def given(to: Path) -> list[str]:
        return ["learn-init", str(spec), "--tasks", "3", "--inner", "2", "--to", str(to)]

    good = learned_tasks.odd

    def wide(task: int) -> object:
        return good(2 * (task == 2))

    monkeypatch.setattr(learned_tasks, "odd", wide)
    assert command(monkeypatch, *given(init)) == 1
    said = capsys.readouterr().err
    assert f"{init}: 2 of 3 tasks, before this error" in said
    assert "task 2: mat1 and mat2 shapes cannot be multiplied" in said
    monkeypatch.setattr(learned_tasks, "odd", lambda task: good(0))
    assert command(monkeypatch, *given(init), "--resume") == 0
    assert command(monkeypatch, *given(whole)) == 0
    for name, value in load_file(str(whole)).items():
        assert torch.equal(load_file(str(init))[name], value)


def test_a_file_that_was_chosen_by_value_is_not_gone_on_with(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = tmp_path / "init.safetensors"
    given = ["learn-init", str(spec), "--tasks", "1", "--inner", "1", "--to", str(init)]
    assert command(monkeypatch, *given, "--select", "value", "--starts", "2") == 0
    assert command(monkeypatch, *given, "--resume") == 2
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "is not of an interrupted `learn-init`" in said


def test_an_interrupted_choice_says_of_how_many_starts_it_is(
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = iter([None, "interrupted"])
    monkeypatch.setattr(StopSignals, "requested", lambda self: next(asked, "interrupted"))
    given = ["learn-init", str(spec), "--tasks", "1", "--inner", "1", "--to"]
    init = str(tmp_path / "init.safetensors")
    assert command(monkeypatch, *given, init, "--select", "value", "--starts", "3") == 130
    found = capsys.readouterr()
    assert "interrupted: 1 of 3 starts were tried" in found.err
    assert "the best of 1 random starts" in found.out
