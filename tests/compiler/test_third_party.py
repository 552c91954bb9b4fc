"""A construct file of every kind, in an installed package of somebody else, works without any other edit."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainc
from trainc.cli.check import check_specs
from trainc.cli.explain import explain_topic
from trainc.compiler.catalog import GROUP, catalog
from trainc.compiler.driver.train import train
from trainc.dsl.printing.reference_pages import constructs_page, rules_page
from trainc.dsl.reading.construct import KINDS
from trainc.dsl.resolve.resolver import load_spec
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

PACKAGE = "othermethods"
FILES = {
    "loss": "absolute",
    "optimizer": "plain",
    "lr": "slow",
    "mask": "still",
    "noise_scale": "spread",
    "observe": "length",
    "perturb": "shifted",
    "regularize": "pull",
    "distribute": "greeting",
}
"""The construct of each kind: the name of its file in tests/third_party."""
NOT_SERVED = {
    "model": "the driver reads the fields of trainc's own",
    "data": "the driver reads the fields of trainc's own",
    "run": "the driver reads the fields of trainc's own",
    "normalize": "no mechanism changes how a layer computes",
    "adapt": "no mechanism adds parameters",
}
"""The kinds that a package cannot bring a construct of yet, and why. It may only shrink."""
HEAD = f"""
model "{PACKAGE}.task:net"
data "{PACKAGE}.task:data" {{ batch = 8 samples, micro = 4 samples }}
run {{ length = 8 steps, seed = 5, checkpoint = 4 steps }}
"""
BASE = {"loss": "loss mse", "optimizer": "optimizer sgd { lr = 0.1, momentum = 0.5 }"}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install the package in a folder of its own, as pip would, for the tests of this file."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(Path(__file__).parents[1] / "third_party", site / PACKAGE)
    info = site / f"{PACKAGE}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    lines = [f"{kind}.{name} = {PACKAGE}.{name}\n" for kind, name in FILES.items()]
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "".join(lines))
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    catalog.cache_clear()
    yield site
    sys.path.remove(str(site))
    catalog.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


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
        changed = [n for n, w in weights(out).items() if not torch.equal(w, weights(plain)[n])]
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
