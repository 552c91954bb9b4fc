"""Train the model of a spec on its data, as `trainc run` does: from a file to a summary."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from trainc.compiler.bind.report import labels
from trainc.compiler.driver.compile import compile, resolve_spec
from trainc.compiler.driver.resume import cannot_resume, check_resume
from trainc.compiler.driver.site_diagnostics import site_diagnostic
from trainc.compiler.errors import SiteError
from trainc.compiler.model.factories import build_data, missing_clause, seeded_model
from trainc.compiler.model.import_path import searching
from trainc.compiler.program.execution import Executor
from trainc.compiler.program.program import Program
from trainc.compiler.program.save import PLAN, json_text
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.render import render_text
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.loop import train as loop
from trainc.runtime.run.summary import Summary
from trainc.runtime.step.action import IncompatibleState
from trainc.runtime.storage import checkpoint

SPEC, SPEC_TEXT = "spec.json", "spec.train"


def train(
    spec: str | Path,
    out: Path,
    *,
    overrides: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    accept: bool = False,
    plain: bool = False,
    quiet: bool = False,
    executor: Executor = "auto",
) -> Summary:
    """Train the spec's model on its data and return a summary of the run.

    `out` is the folder of the run; `resume` continues the run in it. Raises SpecError for a wrong spec, and for a
    resume with a changed spec unless `accept`.
    """
    checked, path = resolve_spec(spec, overrides)
    run = checked.one("run")
    if run is None:
        raise missing_clause("the spec has no run", "write `run { length = 1000 steps }`")
    with searching(path):
        model = seeded_model(checked)
        start: str | None = run.construct.start  # type: ignore[attr-defined]
        if start is not None:
            load_weights(model, Path(start), run)
        program = compile(checked, model, without=without, executor=executor)
        data = build_data(checked)
    if resume:
        check_resume(program.plan, out, accept)
    if program.plan.warnings and not quiet:
        print(render_text(program.plan.warnings).strip("\n"), file=sys.stderr)
    assert program.length is not None
    length = program.length
    try:
        return loop(
            program,
            data,
            out=out,
            resume=resume,
            overwrite=overwrite,
            display=None
            if quiet
            else LiveDisplay(length.amount, length.unit, title=str(spec), plain=plain),
            texts=_texts(program, checked, path),
            keep=program.settings.keep,
            load_compatible=accept,
        )
    except SiteError as error:
        raise SpecError([site_diagnostic(error, checked)]) from error
    except IncompatibleState as error:
        raise cannot_resume(out, error) from error


def _texts(program: Program, spec: Spec, path: Path | None) -> dict[str, str]:
    """Return the files that say what a run trains with, by name."""
    texts = {PLAN: json_text(program.plan.to_json()), SPEC: json_text(spec.to_json())}
    return texts if path is None else texts | {SPEC_TEXT: path.read_text()}


def load_weights(model: nn.Module, source: Path, run: Clause) -> None:
    """Load weights from the newest checkpoint of a run's folder or from a .safetensors file.

    Raises SpecError where there are none or they do not fit the model.
    """
    try:
        if source.is_dir():
            found = checkpoint.find_latest(source / "checkpoints")
            if found.path is None:
                why = found.damage[0] if found.damage else "the folder has no checkpoint"
                raise ValueError(why)
            weights = checkpoint.load_checkpoint(found.path)["program"]["model"]
        else:
            weights = load_file(str(source))
        model.load_state_dict(weights)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        message = f"the weights in {source} cannot be loaded into this model: {error}"
        at = labels((run.part_span("start"), ""))
        raise SpecError([Diagnostic("model-failed", message, at)]) from error
