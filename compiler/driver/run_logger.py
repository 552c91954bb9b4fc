"""The logger of a run, as its spec, the command line or the caller says it."""

from __future__ import annotations

from typing import Any

from trainc.compiler.bind.report import labels
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.run.loggers import Logger, MissingLibrary, NamedLogger, find_logger


def run_logger(spec: Spec, given: str | Logger | None = None) -> NamedLogger | None:
    """Return the logger of the spec's `run`, or `given` in its place, by name or itself; None where there is none.

    Raises SpecError, at the field, where its library is not installed, and ValueError for a name that is unknown.
    """
    clause = spec.one("run")
    run: Any = None if clause is None else clause.construct
    wanted = given if given is not None else getattr(run, "log", None)
    if wanted is None:
        return None
    config = {"spec": spec.to_json()}
    if not isinstance(wanted, str):
        return NamedLogger(type(wanted).__name__, lambda _: wanted, config)
    try:
        return NamedLogger(wanted, find_logger(wanted), config)
    except MissingLibrary as error:
        at = labels((clause.part_span("log") if clause and given is None else None, ""))
        raise SpecError([Diagnostic("missing-library", str(error), at)]) from error
