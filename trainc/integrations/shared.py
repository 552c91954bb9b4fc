"""What the integrations share: a spec compiled for a framework, its clip, its length and its rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from trainc.compiler.driver.compile import compile, resolve_spec
from trainc.compiler.model.import_path import searching
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause, Do
from trainc.runtime.step.action import StopRun

Say = Callable[[str], object]
READ = ("logits", "targets", "inputs")
"""What clauses may read of a pass, and a framework has from the user's code."""


@dataclass(frozen=True, slots=True)
class FrameworkClip:
    """A norm to which a framework would clip gradients: `name` is its argument, `owner` what the argument is of.

    `instead` is what to write so that the framework clips nothing.
    """

    limit: float
    name: str
    owner: str
    instead: str

    def __str__(self) -> str:
        return f"`{self.name} = {self.limit:g}` of {self.owner}"


def compile_for(
    model: nn.Module,
    spec: str | Path | Spec,
    overrides: Mapping[str, str] | None,
    clip: FrameworkClip | None,
    say: Say,
    carries: Collection[str] = (),
) -> Program:
    """Return the program of a spec on a framework's model, with the framework's clip where the spec has none.

    Raises ValueError where a rule asks for what only a run does, unless the integration `carries` it; clauses that read
    evaluations have to be shown them, and it says so.
    """
    checked, path = resolve_spec(spec, overrides)
    verbs = {a.verb for rule in checked.rules for a in rule.actions if isinstance(a, Do)}
    for verb in ("save", "evaluate", "rollback"):
        if verb in verbs and verb not in carries:
            raise ValueError(
                f"a rule of the spec says `{verb}`, which `trainc run` does and no rule can ask of this framework:"
                " remove it, or write the loop yourself with `program.step`"
            )
    if clip is not None:
        checked = with_clip(checked, clip, say)
    with searching(path):
        program = compile(checked, model)
    if program.evaluation_readers and "evaluation" not in carries:
        say(
            "a clause reads evaluations, and your own code evaluates: call `program.read_evaluation(logits, targets)`"
            " for each batch, and `program.evaluation_metrics()` at the end, where `program` is `.program` of the"
            " optimizer; or write `of = training` in the clause"
        )
    return program


def with_clip(spec: Spec, clip: FrameworkClip, say: Say) -> Spec:
    """Return a spec with a framework's clip where it has none; raises ValueError where it has another."""
    if own := [*clips(spec)]:
        if [limit for _, limit in own] == [clip.limit]:
            return spec
        clause, limit = own[0]
        raise ValueError(
            f"{clip} and `clip = {limit:g}` of `{clause.title}` both clip gradients: {clip.instead} to leave it to the"
            " spec, or remove `clip`"
        )
    optimizers = spec.of_kind("optimizer")
    target = spec.one("run") or (optimizers[0] if len(optimizers) == 1 else None)
    if target is None:
        raise ValueError(
            f"{clip} clips the gradients of all optimizers together, and the spec has no `run` to say so: add"
            f" `run {{ length = 1000 steps, clip = {clip.limit:g} }}`, or {clip.instead}"
        )
    say(f"{clip} is now `clip = {clip.limit:g}` of `{target.title}`; {clip.instead} for no clip")
    clauses = [_clipped(one, clip.limit) if one is target else one for one in spec.clauses]
    return Spec(tuple(clauses), spec.rules, spec.version)


def clips(spec: Spec) -> Iterator[tuple[Clause, float]]:
    """Yield the clauses of a spec that clip gradients, with the norm."""
    for clause in spec.clauses:
        clip = getattr(clause.construct, "clip", None)
        if clause.kind in ("run", "optimizer") and clip is not None:
            yield clause, clip


def _clipped(clause: Clause, limit: float) -> Clause:
    construct = clause.construct.model_copy(update={"clip": float(limit)})
    when = clause.start, clause.stop, clause.every
    return Clause(construct, clause.on, *when, clause.optional, clause.label, origin=clause.origin)


def tell_length(program: Program, who: str, steps: int, say: Say) -> None:
    """Say where a framework runs another number of steps than the spec's `run`."""
    length = program.length
    if length is not None and length.unit == "steps" and length.amount != steps:
        say(
            f"{who} runs {steps} steps, and the spec's `run` has `length = {length}`, by which its schedules go"
        )


def stop_before_next(program: Program) -> StopRun | None:
    """Return what a rule of the spec raises to end the training before the next step; None where it goes on.

    The next step decides anew, with the same result.
    """
    if not program.plan.spec["rules"]:
        return None
    try:
        program.begin()
    except StopRun as stop:
        return stop
    program.discard_step()
    return None
