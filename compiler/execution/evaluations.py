"""Evaluations of a program: a batch in passes that fit into memory."""

from __future__ import annotations

from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.execution import Execution
from trainc.compiler.model.undisturbed import random_states
from trainc.runtime.data.batch import Batch, Evaluated, one_of
from trainc.runtime.memory.fitting import EvaluationSize
from trainc.runtime.step.observer import EvaluationObservers


class Evaluations:
    """Evaluates batches, and repeats those that run out of memory in smaller passes where the spec lets it."""

    def __init__(
        self, execution: Execution, observers: EvaluationObservers, *, goes_on: bool
    ) -> None:
        self.execution, self.observers = execution, observers
        self.size = EvaluationSize(goes_on=goes_on)
        self._news: list[str] = []

    def run(self, batch: Batch, trained: int | None) -> Evaluated:
        """Return sums and counts of a batch; `trained` examples at most are in one pass of training, None for all.

        Raises OutOfMemory, which says what to write, where no pass fits, or a smaller one may not be taken.
        """
        forget, module = self.observers.kept(), self.execution.module
        rewind = random_states(module) if self.size.goes_on else None

        def attempt(size: int | None) -> Evaluated:
            most = min(filter(None, (size, trained)), default=None)
            return self.execution.evaluate(*batch, self.observers, most)

        def undo() -> None:
            forget()
            if rewind is not None:
                rewind()

        samples = min(filter(None, (len(one_of(batch[1])), trained)))
        # Those that shard weights wait for each other in each pass.
        alone = first_shard(dict(module.named_parameters())) is None
        found = self.size.run(attempt, undo, samples, alone=alone)
        if (news := self.size.news(self.execution.clock.steps)) is not None:
            self._news.append(news)
        return found

    def news(self) -> list[str]:
        """Return what to say of the evaluations since this was called last."""
        found, self._news = self._news, []
        return found
