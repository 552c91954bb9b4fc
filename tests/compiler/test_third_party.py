"""A construct file of every kind, in an installed package of somebody else, works without any other edit."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainc
from tests.other_package import FILES, PACKAGE, installed
from trainc.cli.app import app
from trainc.cli.check import check_specs
from trainc.cli.explain import explain_topic
from trainc.compiler.catalog import catalog
from trainc.compiler.driver.recorded_clauses import panels_of
from trainc.compiler.driver.train import train
from trainc.dsl.printing.reference_pages import constructs_page, rules_page
from trainc.dsl.reading.construct import KINDS
from trainc.dsl.resolve.resolver import load_spec
from trainc.runtime.report.plots import read_runs
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

NOT_SERVED = {
    "model": "the driver reads the fields of trainc's own",
    "data": "the driver reads the fields of trainc's own",
    "run": "the driver reads the fields of trainc's own",
}
"""The kinds that a package cannot bring a construct of yet, and why. It may only shrink."""
HEAD = f"""
model "{PACKAGE}.task:net"
data "{PACKAGE}.task:data" {{ batch = 8 samples, micro = 4 samples }}
run {{ length = 8 steps, seed = 5, checkpoint = 4 steps }}
"""
BASE = {"loss": "loss mse", "optimizer": "optimizer sgd { lr = 0.1, momentum = 0.5 }"}


@pytest.fixture(scope="module", autouse=True)
def other_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install the package for the tests of this file."""
    with installed(tmp_path_factory.mktemp("site")):
        yield


def usage(kind: str) -> str:
    return catalog()[kind, FILES[kind]].usage


def text(kind: str) -> str:
    """Return a whole spec around the example of the construct."""
    return HEAD + "\n".join((BASE | {kind: usage(kind)}).values())


def without(kind: str) -> str:
    return HEAD + "\n".join(BASE.values())


def spec(folder: Path, kind: str) -> Path:
    path = folder / "spec.train"
    path.write_text(text(kind))
    return path


def weights(run: Path) -> dict[str, Any]:
    found = checkpoint.find_latest(run / "checkpoints").path
    assert found is not None
    model: dict[str, Any] = checkpoint.load_checkpoint(found)["program"]["model"]
    return model


def metrics(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = importlib.import_module(f"{PACKAGE}.task").net()
    return made


def test_every_kind_is_served_or_said_not_to_be() -> None:
    assert FILES.keys() | NOT_SERVED.keys() == set(KINDS)
    assert not FILES.keys() & NOT_SERVED.keys()
    assert {("regularize", "pull"), ("loss", "absolute")} <= set(catalog())


@pytest.mark.parametrize("kind", FILES)
def test_check_explain_and_pages_know_it(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, construct = FILES[kind], catalog()[kind, FILES[kind]]
    assert construct.__module__ == f"{PACKAGE}.{name}"
    assert check_specs([str(spec(tmp_path, kind))]) == 0
    (tmp_path / "bad.train").write_text(usage(kind).partition("{")[0] + " { no_such = 1 }")
    assert check_specs([str(tmp_path / "bad.train")]) == 1
    assert "no field `no_such`" in capsys.readouterr().out
    page = explain_topic([kind, name])
    assert page is not None
    assert page.startswith(f"# {kind} {name}\n")
    assert construct.usage in page
    assert f"\n### {kind} {name}\n" in constructs_page(catalog())


@pytest.mark.parametrize("kind", FILES)
def test_plan_shows_it(kind: str, tmp_path: Path) -> None:
    plan = trainc.plan(spec(tmp_path, kind))
    (clause,) = [c for c in plan.clauses if c["kind"] == kind]
    assert (clause["construct"], clause["dropped"]) == (FILES[kind], None)
    assert FILES[kind] in str(plan)


@pytest.mark.parametrize("kind", FILES)
def test_a_run_obeys_it_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    out, cut = tmp_path / "run", tmp_path / "cut"
    train(spec(tmp_path, kind), out, quiet=True)
    plain = tmp_path / "plain"
    (tmp_path / "plain.train").write_text(without(kind))
    train(tmp_path / "plain.train", plain, quiet=True)
    if kind in ("observe", "noise_scale", "distribute"):
        for name, weight in weights(out).items():
            torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-5, atol=1e-6)
        known = metrics(plain)[0].keys()
        assert any(row.keys() - known for row in metrics(out))
    else:
        got, bare = weights(out), weights(plain)
        changed = [n for n, w in bare.items() if not torch.equal(w, got[n])]
        assert changed, "the run is the one without it"
    shutil.copytree(out, cut)
    newest = checkpoint.find_latest(cut / "checkpoints").path
    assert newest is not None
    shutil.rmtree(newest)
    train(spec(tmp_path, kind), cut, resume=True, quiet=True)
    assert_same(weights(out), weights(cut))
    assert (out / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("kind", FILES)
def test_a_saved_program_is_loaded_with_it(kind: str, executor: Any, tmp_path: Path) -> None:
    batch = importlib.import_module(f"{PACKAGE}.task").data().train.batch(range(8))
    program = trainc.compile(spec(tmp_path, kind), model(), executor=executor)
    program.step(batch)
    program.save(tmp_path / "saved")
    assert f'"{FILES[kind]}"' in json.dumps(json.loads((tmp_path / "saved/plan.json").read_text()))
    loaded = trainc.load(tmp_path / "saved", model(), executor=executor)
    loaded.load_state_dict(program.state_dict())
    for _ in range(3):
        assert program.step(batch) == loaded.step(batch)
    assert_same(program.module.state_dict(), loaded.module.state_dict())


def test_what_it_measures_is_displayed_reported_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    clauses = "\n".join([*BASE.values(), usage("observe"), usage("noise_scale")])
    (tmp_path / "spec.train").write_text(HEAD + clauses)
    train(tmp_path / "spec.train", tmp_path / "run", plain=True)
    assert re.search(r"^8/8 steps .* length at most \d", capsys.readouterr().out, re.M)
    with pytest.raises(SystemExit) as left:
        app(["report", str(tmp_path / "run"), "--plot", str(tmp_path / "run.png")])
    assert not left.value.code
    out = capsys.readouterr().out
    assert re.search(r"^length at most +[\d.]+$", out, re.M)
    assert re.search(r"^influence +0?\.\d+$", out, re.M)
    assert re.search(r"^influence undetermined +0 of 2 steps$", out, re.M)
    assert re.search(r"^of all examples +[\d.e-]+$", out, re.M)
    assert (tmp_path / "run.png").stat().st_size > 10_000
    titles = [panel.title for panel in panels_of(read_runs([tmp_path / "run"]))]
    assert sorted(titles) == ["Influence of all examples", "length at most"]


def test_its_own_diagnostic_is_found_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clause = "regularize pull on all { weight = 0.1 }"
    checked = load_spec(HEAD + "\n".join([*BASE.values(), clause]), catalog()).unwrap()
    (warning,) = trainc.plan(checked).warnings
    assert warning.rule == "pull-on-bias"
    assert warning.explanation == catalog()["regularize", "pull"].rules["pull-on-bias"]
    assert explain_topic(["pull-on-bias"]) is not None
    assert "\n## pull-on-bias\n" in rules_page(catalog())
