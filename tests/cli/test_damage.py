"""Any damage to one file of a run or a saved program is named, or an older good state is used: no other weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import trainc
from tests.cli.test_boundary import NET
from tests.damage import Damage, damages
from trainc.cli.app import main
from trainc.compiler.driver.saved_program import LoadError
from trainc.compiler.driver.train import train
from trainc.runtime.storage import checkpoint

SPEC = """train 1
model "net_of_damage:net"
data "net_of_damage:data" { batch = 4 samples }
loss cross_entropy
run { length = 6 steps, seed = 1, checkpoint = 2 steps, keep = 3, eval = 3 steps }
optimizer adamw { lr = 0.1 }
noise_scale gns on type(Linear) { smooth = 2 steps }
"""
CODES = {0, 1, 2, 3}


class Made:
    """A finished run, the folder that a kill after step 5 leaves of it, and a saved program."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, folder / "spec.train"
        (folder / "net_of_damage.py").write_text(NET)
        self.spec.write_text(SPEC)
        self.whole, self.killed, self.saved = (folder / n for n in ("whole", "killed", "saved"))
        train(self.spec, self.whole, quiet=True)
        shutil.copytree(self.whole, self.killed)
        shutil.rmtree(self.killed / "checkpoints/step-00000006")
        (self.killed / "summary.json").unlink()
        self.weights = weights_of(self.whole)
        self.program = trainc.compile(SPEC, torch.nn.Linear(4, 3))
        self.program.step((torch.ones(4, 4), torch.zeros(4, dtype=torch.long)))
        self.program.save(self.saved)

    def copy(self, source: Path) -> Path:
        """Return a copy of a folder, in the place of the last one."""
        target = self.folder / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target


def weights_of(run: Path) -> dict[str, Tensor]:
    found = checkpoint.find_latest(run / "checkpoints").path
    assert found is not None
    weights: dict[str, Tensor] = checkpoint.load_checkpoint(found)["program"]["model"]
    return weights


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.chdir(name)
        patch.syspath_prepend(name)
        yield Made(Path(name))
        sys.modules.pop("net_of_damage", None)


def command(*words: object) -> int:
    """Run the command line here; any error that it does not turn into a message is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainc", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0)


def lines(folder: Path) -> set[bytes]:
    """Return the lines of metrics that a run has, copies of a damaged file included."""
    files = [p for p in folder.glob("metrics.jsonl*") if p.is_file() and not p.is_symlink()]
    texts = [p.read_bytes() for p in files if p.stat().st_size < 1 << 20]
    return {line for text in texts for line in text.splitlines(keepends=True)}


def assert_resumes_or_says_why(made: Made, damage: Damage) -> None:
    run = made.copy(made.killed)
    file = damage.do(run)
    good = lines(made.whole) & lines(run)
    intact = lines(run) == lines(made.killed)
    code = command("run", made.spec, "-o", run, "--resume", "--plain")
    assert code in CODES
    assert good <= lines(run), f"lines of metrics are lost, after damage to {file}"
    if code == 0:
        found = weights_of(run)
        assert found.keys() == made.weights.keys()
        assert all(torch.equal(weight, made.weights[name]) for name, weight in found.items())
        if intact:
            want = (made.whole / "metrics.jsonl").read_bytes()
            assert (run / "metrics.jsonl").read_bytes() == want


@pytest.mark.parametrize("what", ["folder", "pipe", "link"])
@pytest.mark.parametrize(
    "name", ["plan.json", "spec.train", "timing.jsonl", "events.jsonl", ".lock"]
)
def test_what_is_no_plain_file_loses_no_metrics(made: Made, name: str, what: str) -> None:
    files = sorted(p for p in made.killed.rglob("*") if p.is_file())
    number = files.index(made.killed / name)
    assert_resumes_or_says_why(made, Damage(number, 0, what))


@settings(max_examples=12)
@given(damages())
def test_a_damaged_run_resumes_to_the_same_weights_or_says_why_not(
    made: Made, damage: Damage
) -> None:
    assert_resumes_or_says_why(made, damage)


def assert_reports(made: Made, damage: Damage) -> None:
    run = made.copy(made.whole)
    damage.do(run)
    assert command("report", run) in CODES


@settings(max_examples=40)
@given(damages())
def test_a_report_on_a_damaged_run_is_made_or_names_the_file(made: Made, damage: Damage) -> None:
    assert_reports(made, damage)


def assert_loads(made: Made, damage: Damage) -> None:
    folder, model = made.copy(made.saved), torch.nn.Linear(4, 3)
    damage.do(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    want, said = made.program.module.state_dict(), None
    try:
        trainc.load(folder, model)
    except LoadError as error:
        want, said = before, str(error)
    assert said is None or str(folder) in said
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, want[name])


@settings(max_examples=40)
@given(damages())
def test_a_damaged_program_is_refused_by_name_and_leaves_the_model(
    made: Made, damage: Damage
) -> None:
    assert_loads(made, damage)
