"""Runs whose processes train a replica each have the numbers of a loop of one's own and of one process."""

import math
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainc
from tests.compiler.apart_runs import CASES, ENDED, READ, SAMPLES, SEED, STEPS, Dropping
from tests.compiler.test_launched_runs import tensors
from tests.torchrun import Points, torchrun
from trainc.cli.app import main
from trainc.compiler.catalog import check
from trainc.compiler.driver.compile import compile_with_data
from trainc.compiler.driver.distribution import Distribution
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.order import Order
from trainc.runtime.processes.launch import Launch
from trainc.runtime.storage import checkpoint, saved_weights
from trainc.runtime.storage.foreign_files import read_json
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.random_streams import seed_step

FILE = Path(__file__).with_name("apart_runs.py")


def launched(size: int, folder: Path) -> list[dict[str, Any]]:
    """Run all cases in several processes; return what each found."""
    done = torchrun(size, str(FILE), str(folder), cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, launched(2, folder)


@pytest.fixture(scope="module")
def four(two: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two[0] / "average", folder / "of two")
    return folder, launched(4, folder)


def state(out: Path, rank: int) -> dict[str, Any]:
    found = checkpoint.find_latest(out / "checkpoints")
    assert found.damage == ()
    assert found.path is not None
    return checkpoint.load_checkpoint(found.path, rank=rank)


def records(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records of steps and of evaluations."""
    found = read_jsonl(out / "metrics.jsonl")
    return [r for r in found if "samples" in r], [r for r in found if "eval_loss" in r]


def said(out: Path) -> list[str]:
    return [record.get("message", "") for record in read_jsonl(out / "events.jsonl")]


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("name", CASES)
def test_two_replicas_have_the_numbers_of_a_loop_of_ones_own(name: str, two: Any) -> None:
    folder, found = two
    for rank in range(2):
        assert_same(state(folder / name, rank)["program"]["model"], found[rank][name]["model"])


def test_four_replicas_in_groups_do_so_too(four: Any) -> None:
    folder, found = four
    for rank in range(4):
        got = state(folder / "groups", rank)
        assert_same(got["program"]["model"], found[rank]["groups"]["model"])
    assert len({float(state(folder / "groups", r)["loss"]) for r in range(4)}) == 4


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(name: str, two: Any) -> None:
    folder, resumed = two[0], f"{name} resumed"
    lines = [(folder / one / "metrics.jsonl").read_bytes() for one in (name, resumed)]
    assert lines[0] == lines[1]
    for rank in range(2):
        want, got = (state(folder / one, rank) for one in (name, resumed))
        assert_same(tensors(got["program"]), tensors(want["program"]))
        assert got["clock"] | {"seconds": 0, "before": 0} == want["clock"] | {
            "seconds": 0,
            "before": 0,
        }


def test_four_resume_too(four: Any) -> None:
    folder = four[0]
    for rank in range(4):
        want, got = (state(folder / one, rank) for one in ("groups", "groups resumed"))
        assert_same(tensors(got["program"]), tensors(want["program"]))


def test_two_replicas_are_two_programs_of_one_process_that_divide_one_order(two: Any) -> None:
    text = CASES["average"]
    alone = text[: text.index("distribute local")]
    programs = [trainc.compile(alone) for _ in range(2)]
    points, order = Points(SAMPLES, 1), Order(SEED, SAMPLES)
    losses = []
    for step in range(STEPS):
        for rank, program in enumerate(programs):
            ids = order.indices(8 * step + 4 * rank, 4)
            seed_step(SEED, step, 0)
            program.begin()
            seed_step(SEED, step, 1, rank)
            found = program.step([points.batch(ids[:2]), points.batch(ids[2:])])
            losses.append(found["loss"])
        if (step + 1) % 3 == 0:
            average(programs)
    out = two[0] / "average"
    for rank, program in enumerate(programs):
        got = state(out, rank)["program"]["model"]
        for name, value in program.module.state_dict().items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7, msg=name)
    steps, _ = records(out)
    assert [r["loss"] for r in steps] == pytest.approx(losses[::2], rel=1e-6)
    means = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert [r["mean_loss"] for r in steps] == pytest.approx(means, rel=1e-6)
    for name, end in (("min_loss", min), ("max_loss", max)):
        ends = [end(pair) for pair in zip(losses[::2], losses[1::2], strict=True)]
        assert [r[name] for r in steps] == pytest.approx(ends, rel=1e-6)


def average(programs: list[Any]) -> None:
    """Let weights, buffers and optimizer state of two programs be their means."""
    states = [program.state_dict() for program in programs]
    for pairs in zip(*(tensors(one).items() for one in states), strict=True):
        (name, one), (_, other) = pairs
        if one.is_floating_point() and one.dim() and not name.startswith("/execution"):
            mean = ((one.double() + other.double()) / 2).to(one.dtype)
            one.copy_(mean)
            other.copy_(mean)
    for program, found in zip(programs, states, strict=True):
        program.load_state_dict(found)


def test_an_epoch_is_a_pass_of_all_replicas(two: Any) -> None:
    steps, _ = records(two[0] / "average")
    assert [r["samples"] for r in steps] == [4 * n for n in range(1, STEPS + 1)]
    assert [r["epochs"] for r in steps] == [8 * n / SAMPLES for n in range(1, STEPS + 1)]
    plan = read_json(two[0] / "average/plan.json")
    assert plan["settings"]["units"]["replicas"] == 2


def test_each_evaluates_its_own_weights_and_rank_0_is_shown(two: Any) -> None:
    out = two[0] / "leader"
    _, found = records(out)
    assert [r["step"] for r in found] == [4, 8, 10]
    assert all(r["mean_eval_loss"] != r["eval_loss"] for r in found)
    for r in found:
        ends = r["min_eval_loss"], r["max_eval_loss"]
        assert r["eval_loss"] in ends
        assert ends[0] < r["mean_eval_loss"] < ends[1]
        assert r["mean_eval_loss"] == pytest.approx(sum(ends) / 2, rel=1e-12)
    weights = saved_weights.read_weights(out)
    assert_same(weights, state(out, 0)["program"]["model"])
    assert not torch.equal(weights["head.weight"], state(out, 1)["program"]["model"]["head.weight"])
    program = trainc.compile(CASES["leader"])
    program.module.load_state_dict(weights)
    points = Points(37, 2)
    total, count, _ = program.evaluate(points.x[:8], points.y[:8])
    assert total / count == pytest.approx(found[-1]["eval_loss"], rel=1e-5)


def test_other_commands_take_the_replica_of_rank_0(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = two[0] / "leader"
    monkeypatch.chdir(tmp_path)
    said = {
        "report": "3 exchanges between 2 replicas",
        "influence --on 0 --last-layer": "proponents",
        "delta --out change.safetensors": "change.safetensors",
    }
    for words, text in said.items():
        command, *options = words.split()
        monkeypatch.setattr(sys, "argv", ["trainc", command, str(out), *options])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        assert text in capsys.readouterr().out
    first = state(out, 0)["program"]["model"]
    alone = CASES["leader"][: CASES["leader"].index("distribute local")]
    started = alone.replace("run {", f'run {{ start = "{out}", ').replace("= 10 steps", "= 1 steps")
    started = started.replace("eval = 4 steps, checkpoint = 3 steps, ", "").replace("1e-2", "0.0")
    train(started, tmp_path / "on", quiet=True)
    got = state(tmp_path / "on", 0)["program"]["model"]
    assert torch.equal(got["head.weight"], first["head.weight"])


@pytest.mark.parametrize("name", READ)
def test_data_of_every_kind_is_divided(name: str, two: Any) -> None:
    found = [one[name] for one in two[1]]
    assert found[0] == found[1] == ("finished", "the run has reached its length", STEPS, 0)
    steps, _ = records(two[0] / name)
    assert all(math.isfinite(r["loss"]) and r["loss"] != r["mean_loss"] for r in steps)


def test_worker_processes_read_the_same_numbers(two: Any) -> None:
    singles, workers = (records(two[0] / name) for name in ("singles", "workers"))
    assert singles == workers


ENDS = {
    "nan": ("nan", "rank 1: the loss is nan at step 3: the run stops with the weights", 3, 3),
    "skipped": ("finished", "the run has reached its length", STEPS, 4),
    "spoiled": (
        "nan",
        "rank 1: the gradient norm is inf, although the loss is 1.",
        3,
        3,
    ),
    "spoiled and skipped": ("finished", "the run has reached its length", STEPS, 4),
    "stopped": ("stopped", "the rule `when loss < 1.3` stopped the run", None, 0),
    "saved": ("finished", "the run has reached its length", STEPS, 0),
    "evaluated": ("stopped", "the rule `when eval_loss < 1000000000` stopped the run", 4, 0),
    "rolled back": ("finished", "the run has reached its length", STEPS, 0),
    "batches": ("finished", "the run has reached its length", STEPS, 0),
}


@pytest.mark.parametrize("name", ENDED)
def test_all_replicas_end_alike(name: str, two: Any) -> None:
    reason, message, steps, code = ENDS[name]
    found = [one[name] for one in two[1]]
    assert found[0] == found[1]
    assert found[0][0] == reason
    assert message in found[0][1]
    assert found[0][2] == (found[0][2] if steps is None else steps)
    assert found[0][3] == code
    newest = [state(two[0] / name, rank)["clock"]["steps"] for rank in range(2)]
    assert newest == [found[0][2]] * 2


@pytest.mark.parametrize("name", ["skipped", "spoiled and skipped"])
def test_a_step_that_one_replica_skips_is_told_of(name: str, two: Any) -> None:
    assert said(two[0] / name).count("rank 1 skips step 4") == 1
    steps, _ = records(two[0] / name)
    assert steps[3]["mean_loss"] == steps[3]["loss"]


def test_a_rule_of_one_replica_saves_all(two: Any) -> None:
    saved = [r for r in read_jsonl(two[0] / "saved/events.jsonl") if r["event"] == "saved"]
    assert {r["step"] for r in saved} - {3, 6, 9, 10}


def test_batches_that_rules_change_divide_the_order_without_overlap(two: Any) -> None:
    steps, _ = records(two[0] / "batches")
    assert [r["batch"] for r in steps] == [4, 4, 8, 8, 12, *[12] * 5]


def test_what_replicas_cannot_do_is_refused_at_its_place(two: Any) -> None:
    for found in two[1]:
        assert (
            "2 replicas with 52 samples each take more in a step than the training data has, 101"
            in found["too few samples"]
        )
        assert "write at most `50 samples`" in found["too few samples"]
        assert "the replicas have come to batches of different sizes" in found["own batch"]
        assert all("batch = " in found[name] for name in ("too few samples", "own batch"))


def test_another_number_of_replicas_is_refused(two: Any, four: Any, tmp_path: Path) -> None:
    text = "the checkpoint is of 2 replicas, and the run goes on with 4 replicas: start 2 processes"
    for found in four[1]:
        assert text in found["of two"]
        assert text in found["accepted"]
        assert "distribute local" in found["of two"]
    shutil.copytree(two[0] / "average", tmp_path / "one")
    with pytest.raises(SpecError, match="goes on with one model: start 2 processes"):
        train(CASES["average"], tmp_path / "one", resume=True, accept=True, quiet=True)
    text = CASES["average"]
    longer = text[: text.index("distribute local")].replace("= 10 steps", "= 12 steps")
    with pytest.raises(SpecError, match="goes on from the replica of rank 0"):
        train(longer, tmp_path / "one", resume=True, quiet=True)
    assert train(longer, tmp_path / "one", resume=True, accept=True, quiet=True).steps == 12


def test_a_damaged_file_of_a_replica_is_found(two: Any, tmp_path: Path) -> None:
    shutil.copytree(two[0] / "average", tmp_path / "out")
    newest = max((tmp_path / "out/checkpoints").glob("step-*"))
    assert sorted(path.name for path in newest.iterdir()) == [
        "manifest.json",
        "replica-00001.json",
        "replica-00001.safetensors",
        "state.json",
        "tensors.safetensors",
    ]
    (newest / "replica-00001.safetensors").write_bytes(b"")
    found = checkpoint.find_latest(tmp_path / "out/checkpoints")
    assert found.step == 9
    assert "replica-00001.safetensors is damaged" in found.damage[0]


def test_a_plan_says_what_a_step_of_all_replicas_takes() -> None:
    text = f"{trainc.plan(CASES['average'])!s}"
    assert (
        "`local`: with R processes each trains a replica of its own, and a step takes 4 samples"
        in text
    )
    assert "4 samples in each, R x 4 together; an epoch is one pass over the data by all" in text


def test_no_process_group_outlives_its_run(two: Any) -> None:
    assert [found["kept"] for found in two[1]] == [[], []]


def test_the_run_says_what_it_does(two: Any) -> None:
    text = (
        "2 processes train a replica each by `distribute local`: 4 samples a step each, 8 together"
    )
    found = said(two[0] / "average")
    assert sum(text in message for message in found) == 1
    assert sum("the last step, 10, has no turn of `local`" in message for message in found) == 1


@pytest.mark.parametrize(
    ("length", "last"),
    [
        ("10 steps", 10),
        ("12 steps", None),
        ("37 samples", 10),
        ("48 samples", None),
        ("50 tokens", 13),
        ("1 epochs", 13),  # each of the two reads half of the 101 samples, four a step
        ("2 epochs", 26),
        ("90 seconds", None),
    ],
)
def test_a_last_step_without_a_turn_is_known_in_every_unit(length: str, last: int | None) -> None:
    text = CASES["average"].replace(f"length = {STEPS} steps", f"length = {length}")
    for more, known in (("", True), ("when steps >= 5 { batch = 8 }", length == "10 steps")):
        spec = check(text + more).spec
        assert spec is not None
        distribution, device = Distribution(spec, Launch(0, 2, 0)), torch.device("cpu")
        prepare = partial(distribution.prepare, device=device)
        program, data = compile_with_data(spec, Dropping(), prepare=prepare, replicas=2)
        distribution.join(program, data, device)
        _, *notes = distribution.notes
        assert [note.split(" has")[0] for note in notes] == [f"the last step, {last},"] * len(notes)
        assert bool(notes) == (known and last is not None)
