"""The number of samples in one pass that fits into memory, found by halving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from trainc.runtime.memory.failure import OutOfMemory, first_line, ran_out_of_memory, release

Result = TypeVar("Result")
Attempt = Callable[[int | None], Result]
"""Runs the passes of a step with at most so many samples each, or as they are for None."""


class FittingSize:
    """Tries the passes of a step with half of the samples, and half of these, where they run out of memory.

    With `goes_on` the step goes on with the first number that fits, and all later ones begin with it. Without it the
    error names that number.
    """

    a_pass = "a pass"
    """What ran out of memory, as messages have it."""
    tried = "this step was tried with them, and nothing of it is left"
    own_loop = "`program.step` with a list of micro-batches of {count}"
    """What to call in a loop of the user's own."""

    def __init__(self, *, goes_on: bool) -> None:
        self.goes_on = goes_on
        self.size: int | None = None
        """The samples of one pass that fit, where those of a micro-batch do not."""
        self.failed = self.step = 0
        """The samples of the smallest pass that did not, and the step in which that was found."""
        self._found = False

    def run(
        self, attempt: Attempt[Result], undo: Callable[[], None], samples: int, *, alone: bool
    ) -> Result:
        """Return what an attempt gives; `samples` are those of the largest micro-batch.

        `undo` leaves nothing of an attempt, whether it failed or not. Raises OutOfMemory where no number of samples
        fits, or where one does and `goes_on` is false; and unless this process trains `alone`, since others wait for
        the gradients of this very attempt.
        """
        try:
            return attempt(self.size)
        except Exception as error:
            if not ran_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            undo()
            release(error)
            first = error
        self.failed = failed = min(self.size or samples, samples)
        if not alone:
            raise OutOfMemory(f"{self._failure(failed, first)}. {_OTHERS_WAIT}") from first
        while failed > 1:
            size = -(-failed // 2)
            try:
                found = attempt(size)
            except Exception as error:
                undo()
                if not ran_out_of_memory(error):
                    why = f"Passes of {size} cannot be tried: {first_line(error)}"
                    raise OutOfMemory(f"{self._failure(self.failed, first)}. {why}") from error
                release(error)
                failed = size
                continue
            if self.goes_on:
                self.size, self.failed, self._found = size, failed, True
                return found
            undo()
            why = f"{self._failure(self.failed, first)}. {self._advice(size)}"
            raise OutOfMemory(why, size) from first
        raise OutOfMemory(f"{self._failure(self.failed, first)}. {_NOTHING_FITS}") from first

    def news(self, step: int) -> str | None:
        """Return what to say of a step where its passes were found to fit with fewer samples only."""
        if not self._found:
            return None
        self._found, self.step = False, step
        return self._news()

    def _news(self) -> str:
        return (
            f"a pass of {self.failed} samples ran out of memory: this step was repeated with {self.size} in a pass, and"
            " so many have those of the next steps"
        )

    def state_dict(self) -> dict[str, int] | None:
        """Return what a resumed run needs; None where all micro-batches fit."""
        if self.size is None:
            return None
        return {"size": self.size, "failed": self.failed, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` gave, where a number that was found may be used."""
        found = state if state is not None and self.goes_on else {}
        self.size = found.get("size")
        self.failed, self.step = found.get("failed", 0), found.get("step", 0)

    def summary(self) -> str | None:
        """Return a line for the summary of a run; None where all micro-batches fit."""
        if self.size is None:
            return None
        return (
            f"micro = auto: {self.size} samples in {self.a_pass} since step {self.step}, because {self.failed} ran out"
            " of memory"
        )

    def _failure(self, samples: int, error: Exception) -> str:
        return f"{self.a_pass} of {_samples(samples)} ran out of memory. {first_line(error)}"

    def _advice(self, size: int) -> str:
        count = _samples(size, "1 sample")
        return (
            f"Passes of {count} fit: {self.tried}. Write `micro = {count}` in the spec's `data`, or `micro = auto`,"
            " which finds it and goes on; in a loop of your own without `data` call"
            f" {self.own_loop.format(count=count)}"
        )


class EvaluationSize(FittingSize):
    """The same for the passes of evaluations, which may have less memory: other weights, or tensors of observers."""

    a_pass = "a pass of an evaluation"
    tried = "this evaluation was tried with them"
    own_loop = "`program.evaluate` with {count} at a time"

    def _news(self) -> str:
        return (
            f"a pass of {self.failed} samples of an evaluation ran out of memory: it was repeated with {self.size} in a"
            " pass, and so many have those of the next evaluations"
        )


_NOTHING_FITS = (
    "Nor does a pass of one sample fit. Make the model or its samples smaller, or remove clauses that keep tensors of"
    " their own: `trainc plan` lists what they take"
)

_OTHERS_WAIT = (
    "Several processes train together, so no smaller one was tried, and `micro = auto` does not go on: start all of"
    " them again with a smaller `micro` in the spec's `data`"
)


def _samples(count: int, one: str = "one sample") -> str:
    return one if count == 1 else f"{count} samples"
