"""The demo's own functions, on runs of a few steps."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples import demo, demo_adaptation, demo_runs
from examples.demo_runs import EXAMPLES, FIXED, WITH, WITHOUT, Trained, spec_of
from trainc.compiler.catalog import check
from trainc.dsl.resolve.spec import Spec
from trainc.runtime.device import choice
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage.jsonl import Record, read_jsonl
from trainc.runtime.storage.saved_weights import read_weights

pytest.importorskip("sklearn")
SHORT = {
    "pretrain": {"length": "12 steps"},
    "digits_known": {"length": "2 steps"},
    "digits_adapt": {"length": "6 steps"},
}
SEEDS = (1,)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the demo's folder and what it printed; it pretrained twice, over its own runs."""
    out, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    console = Console(file=printed, width=100, highlight=False)
    (out / "mine.txt").write_text("kept")
    specs = tmp_path_factory.mktemp("specs")
    for name in SHORT:
        text = (EXAMPLES / f"{name}.train").read_text()
        (specs / f"{name}.train").write_text(
            re.sub("eval_batches = [0-9]+", "eval_batches = 1", text)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_runs, "EXAMPLES", specs)
        patch.setattr(demo, "SEEDS", SEEDS)
        demo.pair("pretrain", {"length": "2 steps"}, out, console)
        demo.demo(out, SHORT, console)
    return out, printed.getvalue()


@pytest.mark.parametrize("name", ["pretrain", "digits_adapt"])
def test_the_plain_run_is_the_spec_without_its_methods(name: str) -> None:
    found = demo_runs.versions(spec_of(name))
    spec, plain = found.get(FIXED, found[WITH]), found[WITHOUT]
    kinds = [clause.kind for clause in plain.clauses]
    adapted = ["adapt"] if name == "digits_adapt" else []
    assert kinds == ["model", "data", "loss", "run", *adapted, "optimizer"]
    assert set(plain.clauses) < set(spec.clauses)
    assert demo_runs.without_methods(plain) == plain


def test_the_run_with_a_fixed_batch_has_all_else_of_the_spec() -> None:
    found = demo_runs.versions(spec_of("pretrain"))
    apart = [
        (ours, theirs)
        for ours, theirs in zip(found[WITH].clauses, found[FIXED].clauses, strict=True)
        if ours != theirs
    ]
    ((ours, theirs),) = apart
    assert str(ours.construct.batch).startswith("follow(gns")  # type: ignore[attr-defined]
    assert str(theirs.construct.batch) == "8 samples"  # type: ignore[attr-defined]
    assert FIXED not in demo_runs.versions(spec_of("digits_adapt"))


def test_rules_on_a_method_go_with_it() -> None:
    spec = spec_of("pretrain")
    clauses = "optimizer sgd { lr = 1 } noise_scale gns on all "
    ruled = check(clauses + "when gns > 2 * batch { batch = 2 * batch }").spec
    assert ruled is not None
    (own,) = ruled.rules
    spec = Spec(demo_runs.with_fixed_batch(spec).clauses, (own, *spec.rules), spec.version)
    assert [demo_runs.mentioned(rule) for rule in spec.rules] == [{"gns", "batch"}, {"loss", "nan"}]
    assert demo_runs.without_methods(spec).rules == spec.rules[1:]


def test_it_trains_on_the_gpu_that_there_is_and_says_on_what(
    shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown[1].count(f"trains on {demo_runs.demo_hardware(spec_of('pretrain'))}") == 9
    monkeypatch.setattr(choice, "available", lambda: {"mps": "M9", "cpu": "arm64"})
    assert str(demo_runs.demo_hardware(spec_of("digits_adapt"))) == (
        "cpu (MPS has no float64, in which gradients are measured) in float32"
    )
    monkeypatch.setattr(choice, "available", lambda: {"cuda": "A GPU", "cpu": "x86_64"})
    found = demo_runs.demo_hardware(spec_of("digits_adapt"))
    assert (found.device.type, str(found)) == ("cuda", "cuda (A GPU, auto) in float32")


def test_all_runs_of_a_half_see_the_same_samples(shown: tuple[Path, str]) -> None:
    for name, count in (("pretrain", 3), ("digits_adapt", 2)):
        folders = sorted(one for one in (shown[0] / name).iterdir() if one.is_dir())
        runs = [records(folder) for folder in folders]
        assert len(runs) == count
        assert len({run[-1]["samples"] for run in runs}) == 1
        assert all("lr_max" in run[0] for run in runs)


def test_the_pretraining_runs_begin_with_the_same_weights(shown: tuple[Path, str]) -> None:
    first = [records(shown[0] / "pretrain" / what)[0]["loss"] for what in (WITH, WITHOUT)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_each_seed_begins_with_what_is_known_and_a_new_head(shown: tuple[Path, str]) -> None:
    known = read_weights(shown[0] / "digits_known")
    start = read_weights(shown[0] / "digits_adapt" / "start-1.safetensors")
    assert known.keys() == start.keys()
    apart = {name for name, weight in known.items() if not torch.equal(weight, start[name])}
    assert apart == {"head.weight", "head.bias"}


def test_it_tells_what_each_run_did(shown: tuple[Path, str]) -> None:
    text = shown[1]
    for words in (
        "evaluation loss",
        "batch_scaling: factors 1 to 1",
        "The batch that follows its policy took 12 steps and the fixed one 12",
        "temp_balance: alpha spread",
        "One seed each",
        "means over 1 seeds",
        "of 1 seeds are more accurate",
    ):
        assert words in text


def test_it_overwrites_its_own_runs_and_nothing_else(shown: tuple[Path, str]) -> None:
    out, _ = shown
    assert (out / "mine.txt").read_text() == "kept"
    assert [r["step"] for r in records(out / "pretrain" / WITH)] == list(range(1, 13))
    assert not list(out.rglob("previous-*"))


def test_it_draws_a_picture_of_each_pair(shown: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("pretrain", "digits_adapt"):
        assert (shown[0] / f"{name}.png").read_bytes().startswith(PNG)


def test_the_mean_of_the_last_losses_counts_samples(tmp_path: Path) -> None:
    steps = [
        {"step": 1, "samples": 8, "batch": 8, "loss": 9.0},
        {"step": 2, "samples": 16, "batch": 8, "loss": 4.0, "data_loss": 2.0},
        {"step": 2, "eval_loss": 7.0},
        {"step": 3, "samples": 40, "batch": 24, "loss": 1.0},
    ]
    run = ended(tmp_path / "run", steps, seconds=1.0)
    assert run.last_losses(share=1.0) == pytest.approx((8 * 9 + 8 * 2 + 24 * 1) / 40)
    assert run.last_losses(share=0.5) == 1.0


def test_the_verdict_is_what_was_found(tmp_path: Path) -> None:
    losses = {WITH: (2.75, 2.5), WITHOUT: (2.25, 2.625)}
    ours, plain = (
        ended(tmp_path / what, [{"eval_loss": loss} for loss in losses[what]], seconds)
        for what, seconds in ((WITH, 3.0), (WITHOUT, 2.0))
    )
    told = demo.verdict({WITH: ours, WITHOUT: plain})
    assert "0.1250 lower than without at the end and 0.2500 higher at its lowest" in told
    assert "1.50 times the time" in told


def test_the_gain_of_the_second_half_has_an_interval_over_seeds(tmp_path: Path) -> None:
    def runs(what: str, accuracies: Sequence[float], seconds: float) -> list[Trained]:
        return [
            ended(tmp_path / f"{what}-{i}", [{"eval_accuracy": one, "eval_loss": 2 * one}], seconds)
            for i, one in enumerate(accuracies)
        ]

    found = {
        WITH: runs(WITH, (0.82, 0.80, 0.81), 3.0),
        WITHOUT: runs(WITHOUT, (0.81, 0.81, 0.78), 2.0),
    }
    told = demo_adaptation.verdict(found)
    # Gains of 1, -1 and 3: deviation 2, and 2.92 is Student's 95% quantile for two degrees of freedom.
    assert "2 of 3 seeds are more accurate" in told
    assert "in points by 1.0 in the mean (90% interval -2.4 to 4.4)" in told
    assert "changes by 0.02 in the mean (90% interval -0.05 to 0.09); in 1.50 times" in told


def ended(folder: Path, measured: Sequence[Record], seconds: float) -> Trained:
    folder.mkdir()
    lines = [json.dumps(record) for record in measured]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = Summary("finished", "", 1, 8, 512, 0.1, seconds, 2.0, None, None)
    return Trained(folder, summary, 0.0)


def records(folder: Path) -> list[Record]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record]
