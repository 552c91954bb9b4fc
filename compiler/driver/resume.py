"""The errors of a run that is resumed with another spec, model or data than it was started with."""

from __future__ import annotations

from pathlib import Path

from trainc.compiler.bind.report import labels
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.runtime.storage.differences import ChangedRun, OtherReplicas


def changed_run(out: Path, error: ChangedRun, spec: Spec) -> SpecError:
    """Return the error of a run whose checkpoint was made by something else, with every difference."""
    changes = tuple(map(str, error.differences))
    if error.impossible:
        apart = (c.span for c in spec.clauses if c.construct.joins == "apart")
        at = labels((next(apart, None), "")) if isinstance(error, OtherReplicas) else ()
        return cannot_resume(out, "the checkpoint does not fit", changes, at)
    return SpecError(
        [
            Diagnostic(
                "resume-needs-accept",
                f"the spec or the data is not what the run in {out} was started with",
                notes=changes,
                help="resume with `--accept` to continue the run under the new spec",
            )
        ]
    )


def cannot_resume(
    out: Path, why: object, notes: tuple[str, ...] = (), at: tuple[Label, ...] = ()
) -> SpecError:
    """Return the error of a run that cannot be resumed under this spec."""
    instead = (
        "undo the change, or start a new run in another folder; to begin with the weights of this run,"
        f' write `run {{ start = "{out}" }}`'
    )
    message = f"the run in {out} cannot be resumed with this spec: {why}"
    return SpecError([Diagnostic("resume-impossible", message, at, notes, instead)])
