"""The GPU benchmark, tried on a CPU: all but graphs and events runs; it notices mistakes and survives failures."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.device import DryRun, Work, clocks_of
from benchmarks.measure import Json
from benchmarks.on_gpu import catalogue, timed
from benchmarks.on_gpu.predictions import verdicts
from benchmarks.operators import Size, norm
from benchmarks.whole_steps import GRAPHS

ROOT = Path(__file__).parents[2]
SABOTAGE = """
import torch
from dataclasses import replace
from benchmarks.device import check
from benchmarks.operators import Size, norm

problem = norm(rms=False, add=False, probed=True)(Size(3, 5, 16), torch.float32, "cpu")
good, calls = problem.ours, iter(range(100))
unsteady = replace(problem, ours=lambda *given: good(*given) * (1 + 1e-6 * next(calls)))
wrong = replace(problem, ours=lambda *given: good(*given) * 1.01)
unwritten = replace(problem, ours=lambda *given: good(*given).index_fill(0, torch.tensor([1]), torch.nan))
for one in (problem, unsteady, wrong, unwritten):
    found = check(one, torch.float32)
    print(found["passed"], found["repeatable"])
"""

# A machine that has torch, triton and numpy alone, made of this one: neither trainc nor what it depends on is found,
# and without `site` no editable install speaks up.
BARE = """
import runpy, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lark", "pydantic", "rich", "safetensors", "typer", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
sys.path[:] = [one for one in sys.path if one]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CHECKOUT = (
    "benchmarks", "compiler", "dsl", "examples", "kernels", "runtime", "trainc", "pyproject.toml",
)  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, where the benchmarks are a package."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def rows_of(out: Path) -> dict[str, Json]:
    """Return the rows in a file of results by their keys."""
    return {row["key"]: row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.slow
def test_a_dry_run_checks_and_times_every_operator(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    parts = ("--parts", "risks", "operators", "host")
    done = run("-m", "benchmarks.gpu", "--dry-run", *parts, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["device"] == "dry run"
    assert found["left out"] == []
    assert [one["when"] for one in found["conditions"]] == ["start", "end"]
    assert all(one["copy TB/s"] > 0 for one in found["conditions"])
    wanted = catalogue.rows(
        large=False, backend="aot_eager", full=False, weights="float32", only=()
    )
    rows = rows_of(out)
    assert rows.keys() == {row.key for row in wanted if row.part in parts}
    assert all(row["passed"] and "failed" not in row for row in rows.values())
    for row in rows.values():
        if row["part"] != "operators":
            continue
        assert row["repeatable"], row
        assert row["kernels"]
        for phase in row["times"]["ours"].values():
            assert phase["median"] > 0
            assert phase["how"] == "eager"
    # The true rival makes all that backward makes, and nothing forward.
    assert any(
        row["times"].get("one graph", {}).keys() == {"backward"}
        for row in rows.values()
        if "times" in row
    )


@pytest.mark.slow
def test_a_dry_run_checks_and_times_whole_steps(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ("--dry-run", "--parts", "steps", "--only", "124m plain", "124m gns")
    done = run("-m", "benchmarks.gpu", *options, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(out)
    names = ("plain", "gns on norms", "plain, graphs", "gns on norms, graphs")
    assert [*rows] == [f"steps: 124m {name}" for name in names]
    for row in rows.values():
        assert row["passed"], row
        assert row["uncompiled"] is None, row
        assert row["tokens/s"] > 0
        assert row["case"] in done.stdout
    # What replayed nothing says so, and is not taken for what did.
    assert rows["steps: 124m gns on norms"]["graphs refused"] is None
    assert "the model is on cpu" in rows["steps: 124m gns on norms, graphs"]["graphs refused"]
    judged = {one["what"]: one for one in json.loads(out.read_text())["predictions"]}
    step = judged["compiled step with gns on norms: to plain compiled"]
    assert step["verdict"] in ("confirmed", "refuted")
    assert step["measured"] > 0


def test_time_that_is_spent_leaves_rows_out_and_a_second_start_takes_them_up(
    tmp_path: Path,
) -> None:
    out = tmp_path / "gpu.json"
    options = ("--dry-run", "--parts", "risks", "--only", "layer_norm", "--out", str(out))
    assert run("-m", "benchmarks.gpu", *options, "--seconds", "0").returncode == 0
    found = json.loads(out.read_text())
    assert found["rows"] == []
    assert len(found["left out"]) > 3
    assert run("-m", "benchmarks.gpu", *options).returncode == 0
    first = rows_of(out)
    assert [*first] == found["left out"]
    done = run("-m", "benchmarks.gpu", *options)
    assert done.returncode == 0
    assert rows_of(out) == first  # not run again, or their seconds and errors would be others
    assert done.stdout.count("ok    layer_norm") == len(first)
    # Of another state of the sources nothing stands.
    out.write_text(json.dumps(json.loads(out.read_text()) | {"sources": "other"}))
    done = run("-m", "benchmarks.gpu", *options, "--seconds", "0")
    assert done.returncode == 0
    assert rows_of(out) == {}
    # It is not lost either.
    (aside,) = tmp_path.glob("gpu.before-*.json")
    assert rows_of(aside) == first
    assert f"of other sources: it is {aside} now" in done.stderr


SHORT = """
import json, sys
from benchmarks.device import DryRun
from benchmarks.on_gpu import supervisor
from benchmarks.on_gpu.record import Row

class Fails(DryRun):
    def conditions(self, when):
        if when == sys.argv[1]:
            raise RuntimeError("no memory for a copy")
        return {"when": when}

class Unfit(DryRun):
    def versions(self):
        raise ImportError("No module named 'triton'")

right = lambda device, until: {"passed": True}
rows = [Row("part", "short", 0.1, right), Row("part", "long", 100.0, right), Row("part", "last", 0.1, right)]
device = Unfit if sys.argv[1] == "unfit" else Fails
try:
    found = supervisor.supervise(rows, device, None, 60.0, lambda row, all: None, lambda all: [])
except supervisor.Unusable as error:
    found = {"stopped": str(error), "rows": [], "left out": []}
print(json.dumps([[row["name"] for row in found["rows"]], found["left out"], found.get("stopped")]))
"""


@pytest.mark.parametrize(
    ("where", "rows", "why"),
    [
        ("nowhere", ["short", "last"], None),
        ("start", [], "its process ended with 1, while no row ran"),
        ("end", ["short", "last"], "its process ended with 1, while no row ran"),
        ("unfit", [], "its process ended with 1 before it named its device"),
    ],
)
def test_no_row_starts_that_ends_too_late_and_what_breaks_off_between_rows_is_said(
    where: str, rows: list[str], why: str | None
) -> None:
    done = run("-c", SHORT, where)
    assert done.returncode == 0, done.stderr
    names, left_out, stopped = json.loads(done.stdout)
    assert names == rows
    assert left_out == (["part: long"] if rows else [])
    assert (stopped or "").startswith(why or "")
    assert (stopped is None) == (why is None)


BROKEN_OFF = """
from benchmarks import gpu

found = {"rows": [], "conditions": [], "predictions": [], "left out": []}
gpu.supervise = lambda *_: found
print(gpu.main(["--dry-run"]))
found["stopped"] = "its process ended with 1, while no row ran"
print(gpu.main(["--dry-run"]))
"""


def test_measuring_that_breaks_off_is_no_success() -> None:
    done = run("-c", BROKEN_OFF)
    assert done.stdout.splitlines() == ["0", "1"]
    assert done.stderr == "Not all was measured: its process ended with 1, while no row ran.\n"


def test_a_profiler_that_fails_costs_the_names_of_kernels_alone() -> None:
    class Blind(DryRun):
        def kernels(self, works: Sequence[Work]) -> Json:
            raise RuntimeError("CUPTI is not there")

    build, size = norm(rms=True, add=False, probed=True), Size(2, 3, 8)
    found = timed.measure(Blind(), build, size, torch.float32, ["ours"], math.inf, "aot_eager")
    assert found["profiler"] == "RuntimeError: CUPTI is not there"
    assert found["passed"]
    assert found["times"]["ours"]["backward"]["median"] > 0


def test_clocks_are_those_of_the_device_that_is_measured() -> None:
    names = "uuid", "clocks.sm", "power.draw"
    one, two = "GPU-1234, 1980, 700", "GPU-5678, 210, 70"
    assert clocks_of("5678", [one, two], names) == {"clocks.sm": "210", "power.draw": "70"}
    # A part of a device has a UUID of its own.
    assert clocks_of("abcd", [one], names) == {"clocks.sm": "1980", "power.draw": "700"}
    assert clocks_of("abcd", [one, two], names) == {
        "clocks": "unknown: none of several devices is this one"
    }


HANGS = """
import json, os, sys, time
from pathlib import Path
from benchmarks.device import DryRun
from benchmarks.on_gpu import supervisor
from benchmarks.on_gpu.record import Row

supervisor.GRACE = 2.0
class Lost(DryRun):
    lost = False
    def clear(self):
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

def lose(device, until):
    device.lost = True
    raise RuntimeError("an illegal memory access was encountered")

def fails(device, until):
    raise ValueError("out of shape")

runs = {
    "first": lambda device, until: {"passed": True}, "fails": fails, "hangs": lambda device, until: time.sleep(60),
    "between": lambda device, until: {"passed": True}, "dies": lambda device, until: os._exit(9), "loses": lose,
    "last": lambda device, until: {"passed": not device.lost},
}
rows = [Row("part", name, 0.1, find) for name, find in runs.items()]
told = []
out = Path(sys.argv[1])
found = supervisor.supervise(rows, Lost, out, 60.0, lambda row, all: told.append(row["name"]), lambda all: [])
assert found == json.loads(out.read_text())
print(json.dumps([told, found["rows"], [one["when"] for one in found["conditions"]]]))
"""


def test_a_row_that_fails_hangs_dies_or_loses_the_device_leaves_the_others(tmp_path: Path) -> None:
    done = run("-c", HANGS, str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    told, rows, conditions = json.loads(done.stdout)
    assert told == ["first", "fails", "hangs", "between", "dies", "loses", "last"]
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {
        "fails": "ValueError: out of shape",
        "hangs": "took more than 2 s",
        "dies": "its process ended with 9",
        "loses": "RuntimeError: an illegal memory access was encountered",
    }
    assert [row["name"] for row in rows if row.get("passed")] == ["first", "between", "last"]
    # Each process that starts says under which conditions it measured.
    assert conditions == ["start"] * 4 + ["end"]


def full_table(seconds: float, how: str = "graph", refused: str | None = None) -> Json:
    """Return results in which each row of the real catalogue took the same time."""
    phase = {"median": seconds, "how": how}
    versions: Json = {
        name: {"forward": phase, "backward": phase} for name in ("ours", "inductor", "aten")
    }
    versions["one graph"] = {"backward": phase}
    rows = [
        {
            "key": row.key, "name": row.name, "times": versions, "bytes": {"forward": 1e9, "backward": 2e9},
            "kernels": {"norm_finish": {"us": seconds, "a call": 1}}, "seconds a step": phase,
            "ours": {"forward": seconds}, "graphs refused": refused if row.name.endswith(GRAPHS) else None,
        }
        for row in catalogue.rows(large=True, backend="inductor", full=False, weights="float32", only=())
    ]  # fmt: skip
    return {"rows": rows, "conditions": [{"when": "start", "copy TB/s": 4.0}]}


def test_every_prediction_is_of_rows_that_there_are_and_can_be_refuted() -> None:
    assert {one["verdict"] for one in verdicts({"rows": [], "conditions": []})} == {"not measured"}
    quick, slow = (verdicts(full_table(seconds)) for seconds in (4.0, 1000.0))
    assert all(one["verdict"] == "confirmed" for one in quick)
    verdict = {one["what"]: one["verdict"] for one in slow}
    assert verdict["norm_finish at (64, 64, 4096), us"] == "refuted"
    assert verdict["loss, kl, 32768 classes, forward: of the copy rate"] == "refuted"
    # As slow as everything else is what these promise.
    assert verdict["layer_norm: to the best without statistics, 512 MB"] == "confirmed"
    assert [one["measured"] for one in slow if one["what"].startswith("layer_norm forward")] == [
        0.25
    ]


def test_what_no_graph_ran_confirms_and_refutes_nothing() -> None:
    """Where the host's time may hide the device's, or a step of graphs was none."""
    judged = [
        {one["what"]: one["verdict"] for one in verdicts(full_table(4.0, *how))}
        for how in ((), ("eager",), ("graph", "the host reads"))
    ]
    all_known, eager, refused = judged
    unknown = [{n for n in all_known if one[n] == "not measured"} for one in judged]
    by_profiler = {n for n in all_known if "norm_finish" in n or "launches" in n}
    steps = {n for n in all_known if "step" in n or "in CUDA graphs" in n}
    assert len(by_profiler) == len(steps) == 2
    assert unknown == [
        set(), all_known.keys() - by_profiler - steps, {"the same, both with passes in CUDA graphs"},
    ]  # fmt: skip
    assert {*eager.values()} == {*refused.values()} == {"confirmed", "not measured"}


def test_what_is_right_is_found_out_first_and_what_was_predicted_next() -> None:
    rows = catalogue.rows(large=True, backend="inductor", full=False, weights="float32", only=())
    parts = [row.part for row in rows]
    risks = parts.count("risks")
    assert parts[:risks] == ["risks"] * risks
    predicted = parts.index("steps")
    assert {
        "layer_norm, probe 64x64x4096 bfloat16",
        "cross_entropy_consistency, kl 1x4096x50257 bfloat16",
    } <= {row.name for row in rows[risks:predicted]}
    widths = {size for row in rows for size in row.name.replace(" ", "x").split("x")}
    assert {"3584", "5120", "50257", "128256"} <= widths


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    done = run("-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_check_notices_wrong_unwritten_and_unsteady_results() -> None:
    done = run("-c", SABOTAGE)
    assert done.stdout.splitlines() == ["True True", "True False", "False True", "False False"], (
        done.stderr
    )


@pytest.mark.slow
def test_it_starts_from_a_bare_checkout_where_nothing_of_ours_is_installed(tmp_path: Path) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "gpu.json"
    checkout.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name)
        else:
            shutil.copy(ROOT / name, checkout)
    installed = [path for path in sys.path if "site-packages" in path]
    command = [sys.executable, "-S", "-W", "ignore", "-c", BARE, "benchmarks/gpu.py"]
    done = subprocess.run(
        [
            *command,
            "--dry-run",
            "--only",
            "rms_norm",
            "cross_entropy",
            "124m plain",
            "124m gns",
            "--out",
            str(out),
        ],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(installed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("dry run; torch ")
    found = json.loads(out.read_text())
    names = {row["name"] for row in found["rows"]}
    assert any(name.startswith("rms_norm, probe") for name in names)
    assert any(name.startswith("cross_entropy_consistency, kl") for name in names)
    assert not [row for row in found["rows"] if "failed" in row]
    assert found["commit"] is None
    # Compiling a spec needs more than torch, triton and numpy; plain steps do not.
    steps = {
        row["name"]: row.get("not measured") for row in found["rows"] if row["part"] == "steps"
    }
    needs = "needs lark, pydantic, safetensors"
    assert steps == {
        "124m plain": None, "124m plain, graphs": None, "124m gns on norms": needs, "124m gns on norms, graphs": needs,
    }  # fmt: skip
    assert "not measured: needs lark" in done.stdout
