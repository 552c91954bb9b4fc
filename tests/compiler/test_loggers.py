"""Loggers of a run: what they get is what the folder has, and none of them can end a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainc.cli.app import main
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage.jsonl import read_jsonl

SPEC = """
model "tests.compiler.test_loggers:net"
data "tests.compiler.test_loggers:data" {{ batch = 4 samples }}
loss mse
run {{ length = {steps} steps, eval = 2 steps, checkpoint = 2 steps {log} }}
optimizer sgd {{ lr = 0.1 }}
noise_scale gns on all {{ smooth = 1 steps }}
"""


class Split:
    def __init__(self, samples: int) -> None:
        torch.manual_seed(samples)
        self.x, self.y = torch.randn(samples, 3), torch.randn(samples, 2)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        return self.x[[*indices]], self.y[[*indices]]


class Data:
    tokens_per_sample = 1
    train, evaluation = Split(16), Split(8)


def data() -> Data:
    return Data()


def net() -> nn.Module:
    return nn.Linear(3, 2)


class Recorded:
    """What a logger got, as a library's own objects would keep it."""

    def __init__(self, fails: str = "") -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.opened: list[dict[str, Any]] = []
        self.finished = 0
        self.fails = fails

    def may_fail(self, where: str) -> None:
        if where in self.fails.split():
            raise ConnectionError("no network")

    def modules(self) -> dict[str, ModuleType]:
        """Return wandb and trackio with the signatures of theirs that are called, and more of their arguments."""
        recorded = self

        class Run:
            def log(
                self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
            ) -> None:
                recorded.may_fail("log")
                assert step is not None
                recorded.records.append((step, data))

            def finish(self, exit_code: int | None = None) -> None:
                recorded.may_fail("finish")
                recorded.finished += 1

        def init_wandb(
            entity: str | None = None,
            project: str | None = None,
            dir: str | None = None,
            id: str | None = None,
            name: str | None = None,
            config: dict[str, Any] | str | None = None,
            resume: str | bool | None = None,
        ) -> Run:
            recorded.may_fail("open")
            assert isinstance(config, dict)
            recorded.opened.append({"project": project, "id": id, "name": name, "resume": resume})
            return Run()

        def init_trackio(
            project: str,
            name: str | None = None,
            group: str | None = None,
            space_id: str | None = None,
            config: dict[str, Any] | None = None,
            resume: str = "never",
        ) -> Run:
            recorded.may_fail("open")
            recorded.opened.append({"project": project, "id": name, "name": name, "resume": resume})
            return Run()

        class SummaryWriter:
            def __init__(
                self, log_dir: str | None = None, comment: str = "", purge_step: int | None = None
            ) -> None:
                recorded.may_fail("open")
                recorded.opened.append({"id": log_dir, "purge_step": purge_step})

            def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
                recorded.may_fail("log")
                if not recorded.records or recorded.records[-1][0] != global_step:
                    recorded.records.append((global_step, {}))
                recorded.records[-1][1][tag] = scalar_value

            def close(self) -> None:
                recorded.may_fail("finish")
                recorded.finished += 1

        return {
            "wandb": _module("wandb", init=init_wandb),
            "trackio": _module("trackio", init=init_trackio),
            "tensorboard": _module("tensorboard"),
            "torch.utils.tensorboard": _module(
                "torch.utils.tensorboard", SummaryWriter=SummaryWriter
            ),
        }


def _module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin="a fake")
    made.__dict__.update(members)
    return made


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    for name, module in found.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def trained(out: Path, log: str | None = None, *, steps: int = 5, **given: Any) -> Summary:
    spec = SPEC.format(steps=steps, log="" if log is None else f", log = {log}")
    return train(spec, out, quiet=True, **given)


def events(out: Path, kind: str) -> list[str]:
    return [line["message"] for line in read_jsonl(out / "events.jsonl") if line["event"] == kind]


def merged(records: Any) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for step, metrics in records:
        found.setdefault(step, {}).update(metrics)
    return found


LIBRARIES = ["tensorboard", "wandb", "trackio"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_logger_gets_what_metrics_jsonl_has(
    name: str, recorded: Recorded, tmp_path: Path
) -> None:
    trained(tmp_path / "run", name)
    lines = merged((line.pop("step"), line) for line in read_jsonl(tmp_path / "run/metrics.jsonl"))
    got = merged(recorded.records)
    assert sorted(got) == [1, 2, 3, 4, 5]
    for step, line in lines.items():
        assert got[step].pop("samples_per_second") > 0
        wanted = {key: value for key, value in line.items() if key != "series"}
        assert got[step] == pytest.approx(wanted, nan_ok=True)
    assert "eval_loss" in got[2]
    assert "gns.noise" in got[1]
    assert recorded.finished == 1
    assert not events(tmp_path / "run", "logger")


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_resumed_run_continues_its_own_and_another_one_does_not(
    name: str, recorded: Recorded, tmp_path: Path
) -> None:
    trained(tmp_path / "run", steps=4)
    trained(tmp_path / "run", name, steps=4, overwrite=True)
    trained(tmp_path / "run", name, steps=6, resume=True, accept=True)
    trained(tmp_path / "other", name, steps=2)
    first, resumed, other = (one["id"] for one in recorded.opened)
    assert first == resumed != other
    if name == "tensorboard":
        assert [one["purge_step"] for one in recorded.opened] == [1, 5, 1]
    else:
        assert {one["resume"] for one in recorded.opened} == {"allow"}
        assert {one["project"] for one in recorded.opened} == {"trainc"}
    assert [step for step, line in recorded.records if "loss" in line][4:6] == [5, 6]


def test_another_logger_is_no_other_method(recorded: Recorded, tmp_path: Path) -> None:
    trained(tmp_path / "run", steps=4)
    spec = SPEC.format(steps=4, log=", log = wandb")
    assert train(spec, tmp_path / "run", quiet=True, resume=True).reason == "finished"


@pytest.mark.parametrize("fails", ["open", "log", "finish", "log finish"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_logger_that_fails_is_told_once_and_ends_no_run(
    name: str, fails: str, recorded: Recorded, tmp_path: Path
) -> None:
    recorded.fails = fails
    summary = trained(tmp_path / "run", name, steps=9)
    alone = trained(tmp_path / "alone", steps=9)
    assert (summary.reason, summary.loss) == ("finished", alone.loss)
    told = events(tmp_path / "run", "logger")
    assert [line for line in told if "no network" in line] == told[:1]
    assert told[0].startswith(f"the logger `{name}` ")
    assert ("did not get" in told[-1]) == ("log" in fails)


def test_a_logger_that_fails_for_a_while_goes_on_later(
    tmp_path: Path,
) -> None:
    class Sometimes:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            if step < 3:
                raise TimeoutError("slow")
            self.steps.append(step)

        def finish(self) -> None:
            pass

    logger = Sometimes()
    train(SPEC.format(steps=8, log=""), tmp_path / "run", quiet=True, log=logger)
    assert logger.steps[-1] == 8
    told = events(tmp_path / "run", "logger")
    assert told[0].startswith("the logger `Sometimes` failed at step 1")
    assert told[1] == "the logger `Sometimes` did not get 5 of the records"
    assert len(told) == 2


@pytest.mark.parametrize("found", [None, ModuleSpec("a folder without a package", None)])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_an_error_at_the_field(
    name: str, found: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainc.runtime.run.loggers.find_spec", lambda _: found)
    with pytest.raises(SpecError, match=f"pip install {name}") as error:
        trained(tmp_path / "run", name)
    (told,) = error.value.diagnostics
    assert told.rule == "missing-library"
    span = told.labels[0].span
    assert span.source.text[span.start : span.end] == name
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", steps=1)  # the others need none


def test_the_command_line_chooses_the_logger(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tmp_path / "small.train"
    spec.write_text("train 1\n" + SPEC.format(steps=2, log=", log = wandb"))
    words = ["trainc", "run", str(spec), "-o", str(tmp_path / "run"), "--log", "tensorboard"]
    monkeypatch.setattr("sys.argv", [*words, "--plain"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert [one["id"] for one in recorded.opened] == [str(tmp_path / "run" / "tensorboard")]


def test_a_loop_of_ones_own_has_the_same_loggers(recorded: Recorded, tmp_path: Path) -> None:
    from trainc.integrations.loggers import open_logger

    logger = open_logger("wandb", tmp_path / "run", config={"width": 3})
    logger.log({"loss": 0.5}, 1)
    recorded.fails = "log"
    logger.log({"loss": 0.4}, 2)
    logger.finish()
    assert (recorded.records, recorded.finished) == ([(1, {"loss": 0.5})], 1)
    with pytest.raises(
        ValueError, match="there is no logger `comet`: there are tensorboard, wandb"
    ):
        open_logger("comet", tmp_path)


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")  # protobuf's own
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="`make models` installs it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path / "run", "tensorboard", steps=4)
    read = EventAccumulator(str(tmp_path / "run/tensorboard"))
    read.Reload()
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run/metrics.jsonl") if "loss" in line]
    shown = read.Scalars("loss")
    assert [one.step for one in shown] == [1, 2, 3, 4]
    assert [one.value for one in shown] == pytest.approx(losses, rel=1e-6)
