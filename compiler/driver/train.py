"""Train: what `trainc run` does, from a file to a summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainc.compiler.driver.compile import compile, read
from trainc.compiler.driver.site_diagnostics import of_site
from trainc.compiler.errors import SiteError
from trainc.compiler.model.factories import build_data, missing_clause, seeded_model
from trainc.compiler.model.import_path import searching
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.render import render_text
from trainc.dsl.values.value_json import from_json
from trainc.runtime.run.live_display import Display
from trainc.runtime.run.loop import train as loop
from trainc.runtime.run.summary import Summary
from trainc.runtime.step.action import IncompatibleState
from trainc.runtime.storage import checkpoint

if TYPE_CHECKING:
    from torch import nn

    from trainc.compiler.program.execution import Executor
    from trainc.compiler.program.program import Program
    from trainc.dsl.resolve.spec import Clause

PLAN, SPEC = "plan.json", "spec.json"


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
    """Train the spec's model on its data and return how it went.

    Raises SpecError for a wrong spec, and for a resume under a changed one unless `accept`.
    """
    checked, path = read(spec, overrides)
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
        _check_resume(program, out, accept)
    if program.plan.warnings and not quiet:
        print(render_text(program.plan.warnings).strip("\n"), file=sys.stderr)
    assert program.length is not None
    display = (
        None
        if quiet
        else Display(program.length.amount, program.length.unit, title=str(spec), plain=plain)
    )
    texts = {
        PLAN: json.dumps(program.plan.to_json(), indent=1, sort_keys=True) + "\n",
        SPEC: json.dumps(checked.to_json(), indent=1, sort_keys=True) + "\n",
    }
    if path is not None:
        texts["spec.train"] = path.read_text()
    try:
        return loop(
            program,
            data,
            out=out,
            resume=resume,
            overwrite=overwrite,
            display=display,
            texts=texts,
            keep=program.settings.keep,
            load_compatible=accept,
        )
    except SiteError as error:
        raise SpecError([of_site(error, checked)]) from error
    except IncompatibleState as error:
        message = f"{out} cannot go on under this spec: {error}"
        help_ = (
            f"undo that change, or begin anew in another folder, from these weights alone if you like: "
            f'`run {{ start = "{out}" }}`'
        )
        raise SpecError([Diagnostic("resume-impossible", message, help=help_)]) from error


def load_weights(model: nn.Module, source: Path, run: Clause) -> None:
    """Load weights from a run's newest checkpoint or a .safetensors file; raises SpecError when they do not fit."""
    from safetensors.torch import load_file

    try:
        if source.is_dir():
            found = checkpoint.latest(source / "checkpoints")
            if found.path is None:
                raise ValueError("it holds no intact checkpoint")
            weights = checkpoint.load(found.path)["program"]["model"]
        else:
            weights = load_file(str(source))
        model.load_state_dict(weights)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        span = run.part_span("start")
        labels = (Label(span),) if span else ()
        message = f"{source} gives no weights for this model: {error}"
        raise SpecError([Diagnostic("model-failed", message, labels)]) from error


def _check_resume(program: Program, out: Path, accept: bool) -> None:
    """Compare the spec with the one the run was started with."""
    saved_at = out / PLAN
    if not saved_at.exists():
        return
    saved: dict[str, Any] = json.loads(saved_at.read_text())
    now = program.plan.to_json()
    if saved["model"]["signature"] != now["model"]["signature"]:
        raise SpecError(
            [
                Diagnostic(
                    "resume-impossible",
                    f"{out} was trained with a model of other parameters; its state does not fit",
                )
            ]
        )
    if saved["fingerprint"] == now["fingerprint"] or accept:
        return
    changes = tuple(_changes(saved["clauses"], now["clauses"])) or ("a rule differs",)
    raise SpecError(
        [
            Diagnostic(
                "resume-needs-accept",
                f"the spec is not the one {out} was started with",
                notes=changes,
                help="resume with `--accept` to go on under the new one",
            )
        ]
    )


def _changes(before: list[Any], now: list[Any]) -> Iterable[str]:
    old, new = ({c["label"]: c for c in clauses} for clauses in (before, now))
    for label in sorted(old.keys() | new.keys()):
        if label not in new:
            yield f"`{label}` is gone"
        elif label not in old:
            yield f"`{label}` is new"
        else:
            yield from _differences(label, old[label], new[label])


def _differences(label: str, before: Any, now: Any) -> Iterable[str]:
    for name in sorted(before["fields"].keys() | now["fields"].keys()):
        a, b = before["fields"].get(name), now["fields"].get(name)
        if a != b:
            yield f"`{label}.{name}` was {_written(a)} and is {_written(b)}"
    for name in ("targets", "start", "stop", "every"):
        if before[name] != now[name]:
            yield f"`{label}`: `{name}` differs"


def _written(field: Any) -> str:
    """Return a field of a plan as a spec has it."""
    if isinstance(field, list):
        try:
            return str(from_json(field))
        except ValueError:
            return "[" + ", ".join(map(_written, field)) + "]"
    if field is None:
        return "not given"
    return str(field).lower() if isinstance(field, bool) else str(field)
