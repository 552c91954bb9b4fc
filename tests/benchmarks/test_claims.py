"""The scripts behind the claims, at their smallest settings: what they write is whole and sane."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOOKED = """
import torch
from benchmarks.noise_scale import SMALL, disagreement, model, random_text
from benchmarks.noise_scale_hooks import Hooks, one_by_one

size = SMALL["small"]
batch, truth = random_text(size), one_by_one(model(size), random_text(size))
right = Hooks(model(size), (torch.nn.Linear,))
wrong = Hooks(model(size), (torch.nn.Linear,))
measured = wrong.squares
wrong.squares = lambda: {name: one * 1.01 for name, one in measured().items()}
print(disagreement(right, batch, truth) < 1e-5, disagreement(wrong, batch, truth) > 5e-3)
"""
FIGURES = """
import math
from benchmarks.claims.figures import correlation, first_crossing, over_seeds, slope_through_origin, trailing_mean

print(first_crossing([1, 2, 3], [4.0, 2.0, 1.0], 1.5), first_crossing([1, 2], [4.0, 2.0], 1.0))
print(first_crossing([10, 20], [1.0, 0.5], 1.0), trailing_mean([1.0, 2.0, 3.0, 7.0], 3))
print(round(correlation([1, 2, 3], [2, 4, 6.0]), 12), correlation([1, 1], [2, 3]))
print(slope_through_origin([1, 2], [3, 6]), over_seeds([1.0, 2.0, 3.0])["interval"], over_seeds([1.0])["interval"])
"""


PACED = """
from benchmarks.claims import adaptation, sift
from benchmarks.claims.pace import METHODS, Run, Trials, Records, runs_of
from benchmarks.pace import *
from dataclasses import replace

turns = {name: [asdict(one) for one in every] for name, every in times(asdict(SMALL)).items()}
still = Run(adaptation.SMALL, 1e-20, METHODS["PACE, pair"][0], 1)
trials = Trials(Records(Path(sys.argv[1])))
learnt = [trials(one) for one in (still, replace(still, rate=0.1), still)]
few = [sift.carry_out(sift.Run(sift.SMALL, method, 1e-3, 1)) for method in (sift.SIFT, sift.LORA, sift.FULL)]
few.append(sift.shares([torch.tensor([3.0] + 299 * [0.0]), torch.tensor([0.0] + 299 * [0.5])]))
print(json.dumps([turns, memory("ours", SMALL), learnt, few]))
"""
GROWING = """
import json
import torch
from benchmarks.claims.growing import pairs, tenth
from benchmarks.claims.norm_growth import by_alignment, laws_of

at = list(range(1, 400, 7))
one = {"norm": {"at": at, "norm": [3 + 2 * t**0.5 for t in at]}}
two = {"norm": {"at": at, "norm": [5 + 3 * t**0.5 for t in at]}}
moved = {"norm": {"norm": [3.0, 5.0, 7.0], "step": [3.0, 4.0]}}
torch.manual_seed(0)
model = torch.nn.Linear(64, 64, bias=False)
seen = pairs(model, torch.randn(6, 5, 64))
ends = [tenth(range(1, 21), 0), tenth(range(1, 21), -1)]
print(json.dumps([laws_of([one, two]), by_alignment(moved), seen["same token"], seen["another token"], ends]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, where the benchmarks are a package."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def result(out: Path, *arguments: str) -> Any:
    """Run a script at its smallest setting and return what it wrote."""
    done = run("-m", *arguments, "--small", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_cost_of_a_noise_scale_is_taken_beside_plain_steps(tmp_path: Path) -> None:
    found = result(tmp_path / "noise_scale.json", "benchmarks.noise_scale", "--rounds", "3")
    rows = found["measured"]["small"]["versions"]
    assert {"plain", "trainc, norms, graph", "trainc, all layers, modules", "hooks, norms"} <= set(
        rows
    )
    for name, row in rows.items():
        if "not measured" in row:
            assert "pip install" in row["not measured"]
            continue
        assert row["to plain"]["cpu"]["median"] > 0
        assert row["peak of a step, MiB"] > 0
        off = row["off the norms by definition"]
        assert (off is None) == (name in ("plain", "plain again", "trainc, no measurement"))
        assert off is None or off < 1e-4
    assert set(found["met"]["small"]) == {
        "norms <= 1.02",
        "all layers <= 1.1",
        "Opacus / trainc >= 2.0",
    }


def test_pace_is_timed_beside_others_and_what_it_learns_is_measured(tmp_path: Path) -> None:
    done = run("-c", PACED, str(tmp_path / "records.jsonl"))
    assert done.returncode == 0, done.stderr
    times, memory, (still, moved, again), few = json.loads(done.stdout.splitlines()[-1])
    assert times.keys() == {
        "plain",
        "published pair",
        "ours",
        "ours, upper half",
        "history",
        "lazy",
    }
    assert all(len(every) == 2 and every[0]["cpu"] > 0 for every in times.values())
    assert memory.keys() == {"whole", "of a step"}
    assert again == still  # the second time only reads
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
    for figure in ("distance", "distance of weights"):
        assert still[figure] < 1e-6 < moved[figure]
    for one in (still, moved):
        assert 0 <= one["accuracy"] <= 100
        assert one["gradient"] > 0
        assert one["gradient of outputs"] > 0
    entries, adapters, full, shares = few
    assert adapters["trained"] == 512  # in + out of four layers, of 12288 entries
    assert 512 < entries["trained"] <= 512 + 4
    assert full["trained"] > 12288
    assert all(0 < one[loss] < 6 for one in few[:3] for loss in ("loss", "loss on the old text"))
    # 6 of 600 entries are 1 %: 3.0 and five of 0.5; of each tensor three of 300.
    each = (1 + (3 / 299) ** 0.5) / 2
    assert shares == pytest.approx(
        {"together": ((9 + 5 / 4) / (9 + 299 / 4)) ** 0.5, "each matrix": each}
    )


def test_norms_that_are_wrong_are_noticed() -> None:
    done = run("-c", HOOKED)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.slow
def test_norms_and_total_are_related_over_steps(tmp_path: Path) -> None:
    out = tmp_path / "norms.json"
    found = result(out, "benchmarks.claims.norms_predict_total", "--seeds", "2")
    assert set(found["measured"]) == {"LayerNorm", "RMSNorm"}
    for alphas in found["measured"].values():
        assert list(alphas) == ["0.9", "0.95", "0.99"]
        for one in alphas.values():
            assert all(0 < points <= 27 for points in one["points"])
            assert -1 <= one["correlation"]["mean"] <= 1
            assert all(slope > 0 for slope in one["slope"]["by seed"])
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_schedules_of_the_batch_are_compared_and_runs_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "batch.json"
    options = ("benchmarks.claims.batch_schedule", "--seeds", "1", "--optimizers", "sgd")
    found = result(out, *options)
    lines = out.with_suffix(".jsonl").read_text()
    runs = [json.loads(line) for line in lines.splitlines()]
    assert len(runs) == 5 + 6  # the rates on seed 0, then every policy
    for one in runs:
        setting, curve = one["run"]["setting"], one["curve"]
        assert curve["tokens"][-1] >= setting["tokens"]
        assert all(math.isfinite(loss) for loss in curve["loss"])
        assert all(setting["least"] <= size <= setting["fixed"] for size in curve["batch"])
    told = found["measured"]["sgd"]
    assert told["rate"] in (0.05, 0.1, 0.2, 0.4, 0.8)
    for policy in ("fixed, half", "ramp", "follow", "ramp, coupled", "follow, coupled"):
        assert told[policy]["tokens saved"]["mean"] < 1
        assert len(told[policy]["tokens saved"]["by seed"]) == 1
    # Nothing is run twice: the second time only reads.
    assert result(out, *options)["measured"] == found["measured"]
    assert out.with_suffix(".jsonl").read_text() == lines


@pytest.mark.slow
def test_what_is_held_where_the_batch_is_another_one_is_compared(tmp_path: Path) -> None:
    out = tmp_path / "small_batch.json"
    found = result(out, "benchmarks.claims.small_batch", "--seeds", "1")
    runs = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(runs) == 4 + 9  # the rates on seed 0, then every policy
    curves = found["first seed"]
    assert all(math.isfinite(loss) for curve in curves.values() for loss in curve["loss"])
    assert all(curve["tokens"][-1] >= 4096 for curve in curves.values())
    for policy in ("ramp, both", "small, both", "seesaw, both"):
        held = curves[policy]
        for size, beta, decay in zip(
            held["batch"], held["beta2"], held["weight_decay"], strict=True
        ):
            assert beta == pytest.approx(0.99 ** (size / 8))
            scaled = size / 8 if policy.startswith("seesaw") else (size / 8) ** 0.5
            assert decay == pytest.approx(0.5 * scaled)
    assert set(curves["small"]["batch"]) == {2.0}
    assert max(curves["ramp"]["batch"]) > 32
    assert set(curves["ramp"]["beta2"]) == {0.99}
    assert len(found["differences of the loss"]) == 8


def test_figures_of_known_curves() -> None:
    done = run("-c", FIGURES)
    assert done.stdout.splitlines() == [
        "2.5 inf",
        "10.0 [1.0, 1.5, 2.0, 4.0]",
        "1.0 nan",
        "3.0 [0.3141, 3.6859] None",
    ], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.models
def test_loops_of_others_are_timed_step_by_step_in_turn() -> None:
    code = "import json; from benchmarks.loops import SMALL, measure; print(json.dumps(measure([SMALL])))"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name.partition(",")[0] for name in found["measured"]} == {"Trainer", "DDP"}
    for one in found["measured"].values():
        assert one["seconds"].keys() == {"plain", "empty", "gns", "plain again"}
        assert all(
            times[clock]["least"] > 0
            for times in one["seconds"].values()
            for clock in ("wall", "cpu")
        )
        assert one["ratio"].keys() == {"empty", "gns"}


@pytest.mark.slow
def test_spectra_are_timed_beside_singular_values(tmp_path: Path) -> None:
    found = result(tmp_path / "spectra.json", "benchmarks.spectra", "--rounds", "1")
    assert set(found["measured"]) == {"GPT-2 small", "RoBERTa base"}
    for one in found["measured"].values():
        assert one["all"]["faster"] > 0
        for part in ("blocks", "ends"):
            assert all(0 <= error < 1e-3 for error in one[part]["alpha error"].values())
    assert found["met"]["error <= 0.001"]
    assert all(run["overhead"] > 0 for run in found["runs"].values())


@pytest.mark.slow
def test_measured_rates_are_compared_with_their_controls(tmp_path: Path) -> None:
    out = tmp_path / "temp_balance.json"
    options = ("benchmarks.claims.temp_balance", "--seeds", "2", "--text-seeds", "1")
    found = result(out, *options)
    measured = found["measured"]
    assert set(measured["digits"]["accuracy, %"]) == {
        "uniform", "published", "default", "permuted", "reversed", "static",
    }  # fmt: skip
    for row in measured["digits"]["accuracy, %"].values():
        assert all(0 <= one <= 100 for one in row["figure"]["by seed"])
    told = measured["digits"]["accuracy, %"]["published"]["to uniform"]
    assert len(told["by seed"]) == 2
    assert set(measured["text"]["loss"]) == {"uniform", "recipe", "embeddings", "permuted"}
    assert all(math.isfinite(row["figure"]["mean"]) for row in measured["text"]["loss"].values())
    assert out.with_suffix(".png").stat().st_size > 1000
    lines = out.with_suffix(".jsonl").read_text()
    assert len(lines.splitlines()) == 6 * 2 + 4 * 2
    assert result(out, *options)["measured"] == measured  # the second time only reads
    assert out.with_suffix(".jsonl").read_text() == lines


@pytest.mark.slow
def test_allocations_of_sparsity_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "allocation.json"
    found = result(out, "benchmarks.claims.allocation", "--seeds", "2")
    assert len(found["perplexity"]) == 8
    for row in found["perplexity"].values():
        assert {len(one["by seed"]) for one in row.values()} == {2}
        assert all(one["mean"] > 1 for one in row.values())
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_remedies_of_a_large_batch_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "ghost.json"
    found = result(out, "benchmarks.claims.ghost", "--seeds", "2")
    steps = found["steps"]
    assert steps["plain"] == steps["sqrt"] == steps["ghost"] < steps["longer"]
    assert steps["longer"] == steps["ghost, longer"] == steps["small"]
    for row in found["held-out accuracy"].values():
        assert len(row["by seed"]) == 2
        assert all(0 <= one <= 100 for one in row["by seed"])
    assert len(found["differences of the held-out accuracy, in points"]) == 7
    assert out.with_suffix(".png").stat().st_size > 1000
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 4 + 6 * 2


@pytest.mark.slow
def test_rankings_of_wrong_labels_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "influence.json"
    found = result(out, "benchmarks.claims.influence", "--seeds", "2")
    rows = found["measured"]["wrong labels found, %"]
    assert len(rows) == 6
    for row in rows.values():
        assert row.keys() == {"area", "first 10%", "first 20%"}
        assert all(0 <= x <= 100 for one in row.values() for x in one["by seed"])
        assert all(
            a <= b for a, b in zip(*(row[f"first {n}0%"]["by seed"] for n in (1, 2)), strict=True)
        )
    assert len(found["differences of the area, in points"]) == 5
    assert out.with_suffix(".png").stat().st_size > 1000
    lines = out.with_suffix(".jsonl").read_text()
    assert len(lines.splitlines()) == 2
    assert result(out, "benchmarks.claims.influence", "--seeds", "2")["met"] == found["met"]
    assert out.with_suffix(".jsonl").read_text() == lines


@pytest.mark.slow
def test_rules_of_exchange_are_compared_at_equal_communication(tmp_path: Path) -> None:
    out = tmp_path / "leader.json"
    found = result(out, "benchmarks.claims.leader", "--seeds", "2")
    rows = found["measured"]["held-out digits"]
    assert len(rows) == 7
    for row in rows.values():
        assert all(math.isfinite(x) for one in row.values() for x in one["by seed"])
    average, every = rows["average"], rows["plain, every step"]
    # After the last turn of averages, and where gradients are averaged, all processes have the mean's weights.
    for row in (average, every):
        assert row["loss"]["by seed"] == pytest.approx(
            row["loss of a process"]["by seed"], abs=1e-4
        )
    assert rows["alone"]["loss"] != rows["alone"]["loss of a process"]
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 7 + 7 * 2
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_the_order_of_frequencies_is_taken_with_both_profiles(tmp_path: Path) -> None:
    out = tmp_path / "frequency.json"
    found = result(out, "benchmarks.claims.frequency", "--seeds", "2")
    assert found["order"].keys() == {"falling", "rising"}
    for methods in found["order"].values():
        assert methods.keys() == {"Adam", "CG", "BFGS", "Powell", "swarm"}
        assert all(-1 <= value <= 1 for one in methods.values() for value in one["by seed"])
    assert len(found["met"]) == 10
    for runs in found["learned at step"]["rising"].values():
        assert all(one.keys() == {"k = 1", "k = 3", "k = 5"} for one in runs)
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 20


@pytest.mark.slow
def test_learned_starts_are_compared_at_equal_gradient_steps(tmp_path: Path) -> None:
    found = result(tmp_path / "learned.json", "benchmarks.claims.learned_init", "--seeds", "2")
    assert found["errors"]["by start"].keys() == {"Reptile", "joint", "random"}
    for one in found["errors"]["by start"].values():
        assert all(0 < value < 100 for figure in one.values() for value in figure["by seed"])
    assert found["setting"]["rates"].keys() == {"Reptile", "joint"}


@pytest.mark.slow
def test_growing_norms_and_saturation_are_seen_in_the_same_runs(tmp_path: Path) -> None:
    norms = result(tmp_path / "norm_growth.json", "benchmarks.claims.norm_growth", "--seeds", "2")
    lines = (tmp_path / "growing.jsonl").read_text()
    runs = [json.loads(line) for line in lines.splitlines()]
    assert len(runs) == 2 * 2 * 2
    for one in runs:
        assert one["norm"]["at"] == [1, 3, 5, 7, 9, 11]
        assert one["saturation"]["at"] == [0, 2, 4, 6, 8, 10]
        # 2 w.d + d.d of every change d is how far the squared norm moves
        norm, steps, cosines = (one["norm"][name] for name in ("norm", "step", "alignment"))
        for before, now, step, cosine in zip(norm, norm[1:], steps, cosines, strict=False):
            moved = 2 * before * step * cosine + step**2
            assert now**2 - before**2 == pytest.approx(moved, rel=1e-2, abs=1e-3)
        assert all(-1 <= value <= 1 for value in one["saturation"]["output"])
        assert one["held out"]["at"] == [0, 3, 5, 7, 9, 11]
    for laws in norms["fits"].values():
        assert set(laws) == {"sqrt", "linear", "log", "root4"}
        assert all(0 <= r2 <= 1 for law in laws.values() for r2 in law["r2"]["by seed"])
    assert len(norms["met"]) == 4 * 4
    saturated = result(tmp_path / "saturation.json", "benchmarks.claims.saturation", "--seeds", "2")
    assert (tmp_path / "growing.jsonl").read_text() == lines  # no run is carried out twice
    assert set(saturated["measured"]) == {"logits", "hidden", "held-out text"}
    starts = [row["at the start"]["by seed"] for row in saturated["measured"]["logits"].values()]
    assert all(row == starts[0] for row in starts)  # of the same weights and the same batch
    assert len(saturated["met"]) == 1 + 3 * 4
    assert all(
        (tmp_path / f"{one}.png").stat().st_size > 1000 for one in ("norm_growth", "saturation")
    )


def test_fits_and_cosines_of_growing_norms_are_those_of_known_ones() -> None:
    done = run("-c", GROWING)
    assert done.returncode == 0, done.stderr
    laws, part, own, other, ends = json.loads(done.stdout.splitlines()[-1])
    assert laws["sqrt"]["r2"]["by seed"] == [1.0, 1.0]
    assert laws["sqrt"]["slope"]["mean"] == 2.5
    assert laws["linear"]["r2"]["mean"] < 0.99
    assert part == pytest.approx(1 - (9 + 16) / (49 - 9))
    assert own == pytest.approx(1, abs=1e-6)  # a model without biases is saturated from the start
    assert abs(other) < 0.5
    assert ends == [1.5, 19.5]
