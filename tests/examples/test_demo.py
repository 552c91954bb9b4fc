"""The demo's own functions, on runs of a few steps."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from examples import demo
from examples.demo import EXAMPLES, FIXED, WITH, WITHOUT, Trained
from trainc.compiler.catalog import check
from trainc.compiler.driver.compile import resolve_spec
from trainc.dsl.resolve.spec import Spec
from trainc.runtime.device import choice
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage.jsonl import Record, read_jsonl

SHORT = {"pretrain": {"length": "12 steps"}, "finetune": {"length": "6 steps"}}
PNG = b"\x89PNG\r\n\x1a\n"


def spec_of(name: str) -> Spec:
    spec, _ = resolve_spec(EXAMPLES / f"{name}.train")
    return spec


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
        patch.setattr(demo, "EXAMPLES", specs)
        demo.pair("pretrain", {"length": "2 steps"}, out, console)
        demo.demo(out, SHORT, console)
    return out, printed.getvalue()


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_plain_run_is_the_spec_without_its_methods(name: str) -> None:
    found = demo.versions(spec_of(name))
    spec, plain = found.get(FIXED, found[WITH]), found[WITHOUT]
    kinds = [clause.kind for clause in plain.clauses]
    assert kinds == ["model", "data", "loss", "run", "optimizer"]
    assert set(plain.clauses) < set(spec.clauses)
    assert demo.without_methods(plain) == plain


def test_the_run_with_a_fixed_batch_has_all_else_of_the_spec() -> None:
    found = demo.versions(spec_of("pretrain"))
    apart = [
        (ours, theirs)
        for ours, theirs in zip(found[WITH].clauses, found[FIXED].clauses, strict=True)
        if ours != theirs
    ]
    ((ours, theirs),) = apart
    assert str(ours.construct.batch).startswith("follow(gns")  # type: ignore[attr-defined]
    assert str(theirs.construct.batch) == "8 samples"  # type: ignore[attr-defined]
    assert FIXED not in demo.versions(spec_of("finetune"))


def test_rules_on_a_method_go_with_it() -> None:
    spec = spec_of("pretrain")
    clauses = "optimizer sgd { lr = 1 } noise_scale gns on all "
    ruled = check(clauses + "when gns > 2 * batch { batch = 2 * batch }").spec
    assert ruled is not None
    (own,) = ruled.rules
    spec = Spec(demo.with_fixed_batch(spec).clauses, (own, *spec.rules), spec.version)
    assert [demo.mentioned(rule) for rule in spec.rules] == [{"gns", "batch"}, {"loss", "nan"}]
    assert demo.without_methods(spec).rules == spec.rules[1:]


def test_it_trains_on_the_gpu_that_there_is_and_says_on_what(
    shown: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown[1].count(f"trains on {demo.demo_hardware(spec_of('pretrain'))}") == 8
    monkeypatch.setattr(choice, "available", lambda: {"mps": "M9", "cpu": "arm64"})
    assert str(demo.demo_hardware(spec_of("finetune"))) == (
        "cpu (MPS has no float64, in which gradients are measured) in float32"
    )
    monkeypatch.setattr(choice, "available", lambda: {"cuda": "A GPU", "cpu": "x86_64"})
    found = demo.demo_hardware(spec_of("finetune"))
    assert (found.device.type, str(found)) == ("cuda", "cuda (A GPU, auto) in float32")


def test_both_runs_of_a_pair_see_the_same_tokens(shown: tuple[Path, str]) -> None:
    for name in SHORT:
        runs = [records(folder) for folder in sorted((shown[0] / name).iterdir())]
        assert len(runs) == (3 if name == "pretrain" else 2)
        assert len({run[-1]["tokens"] for run in runs}) == 1
        assert all("lr_max" in run[0] for run in runs)


def test_the_pretraining_runs_begin_with_the_same_weights(shown: tuple[Path, str]) -> None:
    first = [records(shown[0] / "pretrain" / what)[0]["loss"] for what in (WITH, WITHOUT)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_it_tells_what_each_run_did(shown: tuple[Path, str]) -> None:
    text = shown[1]
    for words in (
        "evaluation loss",
        "batch_scaling: factors 1 to 1",
        "The batch that follows its policy took 12 steps and the fixed one 12",
        "temp_balance: alpha spread",
        "sift: ",
        "l2_sp: the weights ended",
        "pace: distance of the two views",
        "One seed each",
    ):
        assert words in text


def test_it_overwrites_its_own_runs_and_nothing_else(shown: tuple[Path, str]) -> None:
    out, _ = shown
    assert (out / "mine.txt").read_text() == "kept"
    assert [r["step"] for r in records(out / "pretrain" / WITH)] == list(range(1, 13))
    assert not list(out.rglob("previous-*"))


def test_it_draws_a_picture_of_each_pair(shown: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib")
    for name in SHORT:
        assert (shown[0] / f"{name}.png").read_bytes().startswith(PNG)


def test_the_mean_of_the_last_losses_counts_samples() -> None:
    steps = [
        {"step": 1, "samples": 8, "batch": 8, "loss": 9.0},
        {"step": 2, "samples": 16, "batch": 8, "loss": 4.0, "data_loss": 2.0},
        {"step": 2, "eval_loss": 7.0},
        {"step": 3, "samples": 40, "batch": 24, "loss": 1.0},
    ]
    assert demo.last_losses(steps, share=1.0) == pytest.approx((8 * 9 + 8 * 2 + 24 * 1) / 40)
    assert demo.last_losses(steps, share=0.5) == 1.0


def test_the_verdict_is_what_was_found(tmp_path: Path) -> None:
    ours = ended(tmp_path / WITH, [2.75, 2.5], seconds=3.0)
    plain = ended(tmp_path / WITHOUT, [2.25, 2.625], seconds=2.0)
    told = demo.verdict({WITH: ours, WITHOUT: plain})
    assert "0.1250 lower than without at the end and 0.2500 higher at its lowest" in told
    assert "1.50 times the time" in told


def ended(folder: Path, eval_losses: list[float], seconds: float) -> Trained:
    folder.mkdir()
    lines = [json.dumps({"step": i, "eval_loss": loss}) for i, loss in enumerate(eval_losses)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = Summary("finished", "", 1, 8, 512, 0.1, seconds, 2.0, eval_losses[-1], None)
    return Trained(folder, summary, 0.0)


def records(folder: Path) -> list[Record]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record]
