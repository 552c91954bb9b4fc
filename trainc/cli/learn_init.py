"""`trainc learn-init`: learn the initial weights of a model over tasks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trainc.cli.common import Overrides, SpecFile, overrides, require_one_process

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.learn.learn_init import Keep, Progress

SAVED = 100
"""Tasks between two times at which the file is written."""
FRACTION, STARTS = 0.5, 10
"""What `--rate` and `--starts` are unless they are given."""


def _write(target: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    from safetensors.torch import save

    from trainc.kernels.library import atomic
    from trainc.runtime.storage.saved_weights import ORIGIN

    whole = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    atomic.write_bytes(target, save(whole, {ORIGIN: json.dumps(about)}))


def _begun(target: Path, wanted: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Return what an interrupted run of these options left; raises BadParameter for other ones."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from trainc.runtime.storage.foreign_files import interpreting
    from trainc.runtime.storage.saved_weights import ORIGIN

    with interpreting(target), safe_open(str(target), "pt") as file:
        about = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
    if "done" not in about:
        raise typer.BadParameter(
            f"{target} is not of an interrupted `learn-init`, so there is nothing to go on with: leave out --resume",
            param_hint="--resume",
        )
    other = [name for name, value in wanted.items() if about.get(name) != value]
    if other:
        raise typer.BadParameter(
            f"{target} was made with another `{other[0]}`: use the same options, or leave out --resume",
            param_hint="--resume",
        )
    return load_file(str(target)), int(about["done"])


def _teller() -> Callable[[Progress], None]:
    """Return what shows progress: a line twice a second at a terminal, one in ten tasks otherwise."""
    last = [0.0]

    def tell(progress: Progress) -> None:
        done, of = progress.done, progress.of
        text = f"task {done:,} of {of:,}: loss {progress.before:.4g} -> {progress.after:.4g}"
        if sys.stderr.isatty():
            if time.monotonic() - last[0] > 0.5 or done == of:
                last[0] = time.monotonic()
                end = "\n" if done == of else ""
                print(f"\r{text:<70}", end=end, file=sys.stderr, flush=True)
        elif done % max(1, of // 10) == 0:
            print(text, file=sys.stderr)

    return tell


@contextmanager
def _kept_on_errors(to: Path, tasks: int, write: Callable[..., None]) -> Iterator[Keep]:
    """Yield what is called after each task; on an error it writes what was learned until then, and says so."""
    last: list[tuple[dict[str, Tensor], int]] = []

    def keep(weights: dict[str, Tensor], done: int) -> None:
        last[:] = [(weights, done)]
        write(weights, done)

    try:
        yield keep
    except Exception:
        if last:
            write(*last[0], now=True)
            text = f"{to}: {last[0][1]:,} of {tasks:,} tasks, before this error; the same command with --resume goes on"
            print(text, file=sys.stderr)
        raise


def _learn(
    spec: Path, to: Path, tasks: int, inner: int, rate: float, given: dict[str, str], resume: bool
) -> int:
    """Learn the start by Reptile, and return the exit code."""
    from trainc.compiler.driver.compile import resolve_spec
    from trainc.compiler.learn.learn_init import learn_start
    from trainc.runtime.run.stop_signals import StopSignals

    checked, _ = resolve_spec(spec, given)
    wanted = {"spec": checked.fingerprint, "tasks": tasks, "inner": inner, "rate": rate}
    begin = _begun(to, wanted) if resume else None

    def keep(weights: dict[str, Tensor], done: int, *, now: bool = False) -> None:
        if now or done % SAVED == 0:
            what = f"learned over {done:,} of {tasks:,} tasks of {inner} steps at rate {rate:g} (Reptile)"
            _write(to, weights, {"what": what, "done": done, **wanted})

    with StopSignals() as signals, _kept_on_errors(to, tasks, keep) as keep_last:
        weights, done = learn_start(
            spec,
            tasks=tasks,
            inner=inner,
            rate=rate,
            overrides=given,
            begin=begin,
            told=_teller(),
            stopped=lambda: signals.requested() is not None,
            keep=keep_last,
        )
        keep(weights, done, now=True)
        reason = signals.requested()
    print(f"{to}: {done:,} of {tasks:,} tasks")
    if done < tasks:
        print(f"{reason}: the same command with --resume goes on", file=sys.stderr)
        return 130 if reason == "interrupted" else 143
    return 0


def _choose(
    spec: Path, to: Path, starts: int, tasks: int, inner: int, given: dict[str, str]
) -> int:
    """Write the best of several random starts, and return the exit code."""
    from trainc.compiler.learn.learn_init import choose_start, least
    from trainc.runtime.run.stop_signals import StopSignals

    with StopSignals() as signals:
        weights, values = choose_start(
            spec,
            starts=starts,
            tasks=tasks,
            inner=inner,
            overrides=given,
            told=_teller(),
            stopped=lambda: signals.requested() is not None,
        )
        reason = signals.requested()
    if reason is not None:
        print(f"{reason}: {len(values)} of {starts} starts were tried", file=sys.stderr)
    best = least(values)
    what = f"the best of {len(values)} random starts after {inner} steps on each of {tasks:,} tasks (seed {best})"
    _write(to, weights, {"what": what, "values": values})
    for seed, value in enumerate(values):
        print(f"seed {seed}: loss {value:.4g}{' *' * (seed == best)}")
    print(f"{to}: {what}")
    return {None: 0, "interrupted": 130}.get(reason, 143)


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("learn-init")
    def learn_init(
        spec: SpecFile,
        to: Annotated[
            Path,
            typer.Option("--to", help="File for the weights: FILE.safetensors.", dir_okay=False),
        ],
        tasks: Annotated[int, typer.Option("--tasks", min=1, help="Number of tasks.")],
        inner: Annotated[int, typer.Option("--inner", min=1, help="Steps on each task.")] = 8,
        rate: Annotated[
            float | None,
            typer.Option(
                "--rate",
                max=1,
                help=f"Fraction of the way to a task's end, at first, above 0. Default: {FRACTION}.",
            ),
        ] = None,
        select: Annotated[
            Literal["value"] | None,
            typer.Option(
                "--select",
                help="Learn nothing: keep the random start with the least loss after short runs.",
            ),
        ] = None,
        starts: Annotated[
            int | None,
            typer.Option(
                "--starts",
                min=2,
                help=f"With --select: number of random starts. Default: {STARTS}.",
            ),
        ] = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on with the file of an interrupted run.")
        ] = False,
        set_: Overrides = None,
    ) -> None:
        """Learn the initial weights of a model over tasks.

        The spec's data callable takes `task`, and task i is its data with `task = i`. On each task the spec's own
        optimizer and clauses take `--inner` steps, and the weights go a part of the way there, linearly less from
        task to task (Reptile). Use them by `model "module:callable" { init = "FILE.safetensors" }`.

        An interrupt keeps what was learned so far; `--resume` goes on, with the same numbers.

        For instance: trainc learn-init family.train --tasks 1000 --inner 8 --rate 0.5 --to init.safetensors
        """
        require_one_process("learn-init")
        given = overrides(set_)
        if select is not None:
            _not_beside("--select begins anew", resume or None, "--resume")
            _not_beside("--select learns nothing", rate, "--rate")
            _require_file(to, resume)
            raise typer.Exit(_choose(spec, to, starts or STARTS, tasks, inner, given))
        _not_beside("without --select there is one start", starts, "--starts")
        if rate is not None and not rate > 0:
            raise typer.BadParameter(
                "at 0 nothing is learned: expected more than 0", param_hint="--rate"
            )
        _require_file(to, resume)
        rate = FRACTION if rate is None else rate
        raise typer.Exit(_learn(spec, to, tasks, inner, rate, given, resume))


def _require_file(to: Path, resume: bool) -> None:
    """Raise BadParameter where the file cannot be written at the end, or is to be gone on with and is not there."""
    if to.suffix != ".safetensors":
        raise typer.BadParameter("expected FILE.safetensors", param_hint="--to")
    if resume and not to.exists():
        raise typer.BadParameter(
            f"{to} is missing, so there is nothing to go on with: leave out --resume",
            param_hint="--resume",
        )
    to.parent.mkdir(parents=True, exist_ok=True)


def _not_beside(why: str, given: object, option: str) -> None:
    """Raise BadParameter for an option that does nothing beside others."""
    if given is not None:
        raise typer.BadParameter(f"{why}: leave it out", param_hint=option)
