"""`trainc fit`: laws that several runs follow together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainc.cli.common import Plot, require_drawable

if TYPE_CHECKING:
    from trainc.runtime.fits.batch import BatchLaw, Reached
    from trainc.runtime.fits.transfer import Trained, TransferLaw
    from trainc.runtime.report.run_records import RunRecords

SMOOTHED = 20
"""A training loss is the mean over the last of so many parts of a run's steps."""

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Folders of runs.", exists=True, file_okay=False),
]


def _read(folders: Sequence[Path]) -> list[RunRecords]:
    """Return the records of runs; raises ValueError for a folder without steps, of replicas, or given twice."""
    from trainc.runtime.report.run_records import RunRecords

    found = []
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (before := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise ValueError(
                f"{folder} is given twice, as {before} before: a law counts each run once, so leave one out"
            )
        if not (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} holds no run: there is no metrics.jsonl")
        run = RunRecords.of(folder, str(folder), "")
        if not run.steps:
            raise ValueError(f"{folder} holds no run: no step is recorded")
        if any("mean_loss" in record for record in run.steps):
            raise ValueError(
                f"{folder} is of replicas that trained apart: its losses, steps and samples are those of the replica of"
                " rank 0, while its weights have learned from the samples of all. Leave it out"
            )
        found.append(run)
    return found


def _of_plan(run: RunRecords, what: str, *keys: str) -> Any:
    """Return an entry of a run's plan; raises ValueError, which says what it lacks, where there is none."""
    found: Any = run.plan
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        raise ValueError(f"{run.name} lacks {what}: its plan.json has no `{'.'.join(keys)}`")
    return found


def trained(run: RunRecords) -> Trained:
    """Return what the law of transfer reads of a run; raises ValueError, which names the run and what it lacks."""
    from trainc.runtime.fits.transfer import Trained

    size = _of_plan(run, "the number of its parameters", "settings", "sizes", "without_embeddings")
    samples = _of_plan(run, "the size of its data", "settings", "units", "samples_per_epoch")
    tokens = _of_plan(run, "the tokens of a sample", "settings", "units", "tokens_per_sample")
    losses = [r["eval_loss"] for r in run.records if math.isfinite(r.get("eval_loss", math.nan))]
    if not losses:
        raise ValueError(
            f"{run.name} lacks an evaluation: give its data held-out samples, and `eval` in `run`"
        )
    if min(losses) <= 0:
        raise ValueError(
            f"{run.name} has a loss of {min(losses):.4g}, whose logarithm is no number"
        )
    seen = min(float(samples), float(run.steps[-1].get("samples", samples)))
    fields = {row["kind"]: row["fields"] for row in run.plan.get("clauses", ())}
    begun = fields.get("run", {}).get("start") or fields.get("model", {}).get("init")
    return Trained(run.name, float(size), seen * float(tokens), min(losses), begun is not None)


def losses_of(run: RunRecords, evaluated: bool) -> list[tuple[float, float, float]]:
    """Return steps, samples and losses over a run: of evaluations, or running means of the training loss.

    A mean stands at the middle of its steps: at their end it would be late, and more so in a longer run.
    """
    if not evaluated:
        steps = [r for r in run.steps if math.isfinite(r["loss"])]
        width = max(1, len(steps) // SMOOTHED)
        found = []
        for end in range(width, len(steps) + 1):
            part = steps[end - width : end]
            step, samples, mean = (
                sum(one[what] for one in part) / width for what in ("step", "samples", "loss")
            )
            found.append((step, samples, mean))
        return found
    samples = {r["step"]: r["samples"] for r in run.steps}
    rows = [r for r in run.records if math.isfinite(r.get("eval_loss", math.nan))]
    return [(r["step"], samples[r["step"]], r["eval_loss"]) for r in rows if r["step"] in samples]


def reached(run: RunRecords, course: Sequence[tuple[float, float, float]], loss: float) -> Reached:
    """Return when a run reached a loss, interpolated between two; raises ValueError for one that did not."""
    from trainc.compiler.driver.recorded_clauses import shown_signals
    from trainc.runtime.fits.batch import Reached

    before: tuple[float, float, float] | None = None
    if course and course[0][2] <= loss:
        raise ValueError(
            f"{run.name} has the loss {course[0][2]:.6g} already where its records begin, so it is not known when it"
            f" came to {loss:.6g}: give a lower `--loss`, or evaluate more often at its start"
        )
    for point in course:
        if point[2] <= loss:
            break
        before = point
    else:
        lowest = min((value for *_, value in course), default=math.nan)
        raise ValueError(
            f"{run.name} lacks the loss {loss:.6g}: its lowest is {lowest:.6g}. Train it longer, or give a higher"
            " `--loss`"
        )
    assert before is not None
    part = (before[2] - loss) / (before[2] - point[2])
    steps, samples = (a + part * (b - a) for a, b in zip(before[:2], point[:2], strict=True))
    noise = []
    for signal in shown_signals(run.plan):
        if signal.unit == "samples" and signal.main:
            values = [r[signal.name] for r in run.steps if r["step"] <= steps and signal.name in r]
            known = [value for value in values if math.isfinite(value)]
            if known:
                noise.append((signal.name, sum(known) / len(known)))
    return Reached(run.name, steps, samples, tuple(noise))


def _print_transfer(law: TransferLaw) -> None:
    print("D_T = k D_F^alpha N^beta, in tokens; 95% intervals by resampled residuals")
    for name in ("k", "alpha", "beta"):
        print(f"  {name:<6} {getattr(law, name)}")
    print(f"  r2     {law.r2:.4f} of log D_T, {len(law.points)} runs")
    (n0, n1), (d0, d1) = law.sizes, law.data
    print(
        f"  fitted for N {n0:,.0f} to {n1:,.0f} and D_F {d0:,.0f} to {d1:,.0f}: it says nothing beyond"
    )
    head = f"{'run':<30} {'N':>12} {'D_F':>12} {'D_E':>12} {'D_T':>12} {'by the law':>12}"
    print(f"\n{head}")
    for point in law.points:
        run = point.run
        by_law = law.amount(run.data, run.size)
        numbers = (run.size, run.data, point.effective, point.amount, by_law)
        print(f"{run.name[-30:]:<30} " + " ".join(f"{n:>12.4g}" for n in numbers))
    for line in law.left_out:
        print(f"left out: {line}")
    if not law.k.low <= law.k.high:
        print("no intervals: they need four fine-tuned runs or more")


def _print_batch(law: BatchLaw, of: str) -> None:
    print(
        f"(S / S_min - 1) (E / E_min - 1) = 1 for the {of} loss {law.loss:.6g}; 95% intervals by resampled residuals"
    )
    print(f"  S_min           {law.steps} steps")
    print(f"  E_min           {law.samples} samples")
    print(f"  critical batch  {law.critical} samples")
    print(f"  r2              {law.r2:.4f} of log S, {len(law.points)} runs")
    names = list(dict.fromkeys(name for point in law.points for name, _ in point.noise))
    head = f"{'run':<30} {'batch':>10} {'steps':>10} {'samples':>12} {'by the law':>10}"
    print(f"\n{head} " + " ".join(f"{name[:14]:>14}" for name in names))
    for point in sorted(law.points, key=lambda one: one.batch):
        noise = dict(point.noise)
        row = f"{point.name[-30:]:<30} {point.batch:>10.4g} {point.steps:>10.4g} {point.samples:>12.4g}"
        row += f" {law.steps_at(point.batch):>10.4g} "
        print(row + " ".join(f"{noise[n]:>14.4g}" if n in noise else f"{'-':>14}" for n in names))
    if names:
        print("the last columns are means, until then, of what these clauses measured, in samples")
    if not law.critical.low <= law.critical.high:
        print("no intervals: they need three runs or more")


def _require_alike(runs: Sequence[RunRecords]) -> None:
    """Raise ValueError for runs of models of different sizes, or with samples of different lengths."""
    places = {
        "weights": ("sizes", "weights"),
        "tokens a sample": ("units", "tokens_per_sample"),
    }
    for what, keys in places.items():
        seen: dict[Any, str] = {}
        for run in runs:
            found: Any = run.plan.get("settings", {})
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                seen.setdefault(found, run.name)
        if len(seen) > 1:
            (one, first), (other, second) = [*seen.items()][:2]
            raise ValueError(
                f"{first} has {one:,.0f} {what}, and {second} has {other:,.0f}: the law is of one model on one sort of"
                " samples, so leave one of them out"
            )


def fit_batch_of(
    folders: Sequence[Path], loss: float | None = None, told: Callable[[str], None] = print
) -> tuple[BatchLaw, str]:
    """Return the law of the batch of runs, and of what the loss is: `evaluation`, where all have two, or `training`.

    `told` is called where only some runs have two evaluations.
    """
    from trainc.runtime.fits.batch import fit_batch

    if loss is not None and not math.isfinite(loss):
        raise ValueError(f"no run comes to a loss of {loss}: give a number as `--loss`")
    runs = _read(folders)
    for run in runs:
        if not all("samples" in record for record in run.steps):
            raise ValueError(f"{run.name} lacks the samples of its steps: it was no `trainc run`")
        if not any(math.isfinite(record["loss"]) for record in run.steps):
            raise ValueError(f"{run.name} has no finite loss: leave it out")
    _require_alike(runs)
    seldom = [run.name for run in runs if len(losses_of(run, True)) < 2]
    evaluated = not seldom
    if 0 < len(seldom) < len(runs):
        told(f"by training losses, since {seldom[0]} has fewer than two evaluations")
    courses = [losses_of(run, evaluated) for run in runs]
    target = loss if loss is not None else max(min(v for *_, v in course) for course in courses)
    pairs = zip(runs, courses, strict=True)
    found = [reached(run, course, target) for run, course in pairs]
    return fit_batch(target, found), "evaluation" if evaluated else "training"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    fit = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
    app.add_typer(fit, name="fit", help="Fit laws to several runs.")

    @fit.command("transfer")
    def transfer(runs: Runs, plot: Plot = None) -> None:
        """Fit what pre-training is worth, in data: D_T = k D_F^alpha N^beta.

        D_F is the data of a fine-tuned run, N its parameters without embeddings, and D_T the data that the same model
        would need besides to reach its loss from scratch. Give runs from scratch on several amounts of data, at each
        size, and runs that began with other weights (`start` of `run`, or `init` of `model`). Losses are the lowest of
        the evaluations. The law holds for little data: runs with more than a tenth of what saturates their size are
        left out, and told.

        For instance: trainc fit transfer runs/scratch-* runs/tuned-* --plot transfer.png
        """
        from trainc.runtime.fits.transfer import fit_transfer

        require_drawable(plot)
        law = fit_transfer([trained(run) for run in _read(runs)])
        _print_transfer(law)
        if plot is not None:
            from trainc.runtime.fits.pictures import draw_transfer

            print(f"drew {draw_transfer(law, plot)}")

    @fit.command("batch")
    def batch(
        runs: Runs,
        loss: Annotated[
            float | None,
            typer.Option("--loss", help="The loss to reach. Default: the lowest that all reached."),
        ] = None,
        plot: Plot = None,
    ) -> None:
        """Fit steps and samples to a loss against the batch size, and find the critical batch.

        Give runs that differ in their batch, each with a learning rate that suits it: the law compares runs at their
        best. At the critical batch steps and samples are each twice the least. Beside it stands what clauses of the
        runs measured that counts samples.

        For instance: trainc fit batch runs/batch-* --loss 2.1 --plot batch.png
        """
        require_drawable(plot)
        law, of = fit_batch_of(runs, loss)
        _print_batch(law, of)
        if plot is not None:
            from trainc.runtime.fits.pictures import draw_batch

            print(f"drew {draw_batch(law, plot)}")
