"""The cases of the zoo: every construct on an architecture, on each selection, and off."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.zoo.architecture import Architecture
from benchmarks.zoo.clauses import clauses, without_effect
from benchmarks.zoo.examine import Outcome, examine, examine_run, examine_without_effect
from trainc.compiler.catalog import catalog
from trainc.dsl.reading.construct import Construct

WORDS_ONLY = ("model", "data", "run")
"""Kinds that are examined together, in whole runs."""
TOGETHER, OFF = "run", "off"


@dataclass(frozen=True)
class Case:
    """One run of the zoo; `selects` is what the clause is put on, or says that it is off."""

    architecture: Architecture
    construct: str
    selects: str
    clause: str
    run: Callable[[], Outcome]


def constructs() -> dict[str, type[Construct] | None]:
    """Return what is examined, by name; None for the whole run."""
    found = {c.heading(): c for key, c in catalog().items() if key[0] not in WORDS_ONLY}
    return {TOGETHER: None, **dict(sorted(found.items()))}


def run_cases(
    architecture: Architecture, construct: str, *, every: bool = False
) -> Iterator[tuple[Case, Outcome]]:
    """Yield each case with what it did; without `every` no further selection after the first that trains."""
    trained = False
    for case in cases(architecture, construct, every=every):
        if every or not trained or case.selects == OFF:
            outcome = case.run()
            trained |= outcome.status == "works"
            yield case, outcome


def cases(architecture: Architecture, construct: str, *, every: bool = False) -> Iterator[Case]:
    """Yield the cases of a construct on an architecture; with `every` all of them run by the graph as well."""
    one = constructs()[construct]
    if one is None:
        yield Case(architecture, construct, "", "", partial(examine_run, architecture))
        return
    for selects, text in clauses(one):
        yield Case(
            architecture,
            construct,
            selects,
            text,
            partial(examine, architecture, text, graph=every),
        )
    for text in without_effect(one):
        run = partial(examine_without_effect, architecture, text)
        yield Case(architecture, construct, OFF, text, run)
