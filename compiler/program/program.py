"""The program that `trainc.compile` returns: a bound model, its training step, and the state of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.evaluations import Evaluations
from trainc.compiler.execution.execution import Execution, Executor
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.plan.identity import identity_of
from trainc.compiler.plan.plan import Plan
from trainc.compiler.program.exchange_replicas import exchange_of, weights_fact
from trainc.compiler.program.load_state import LoadableProgram
from trainc.compiler.program.own_loop import OwnLoopProgram
from trainc.compiler.program.step_runner import StepRunner
from trainc.compiler.program.summary_lines import summary_lines
from trainc.compiler.structure.wrappers import Unwrapped
from trainc.runtime.companion.evaluation import EvaluationWeights
from trainc.runtime.data.batch import Evaluated, GivenBatch
from trainc.runtime.data.sample_ids import SampleIds
from trainc.runtime.memory.fitting import FittingSize
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.processes.sharded import whole
from trainc.runtime.run.interface import Meet, RunSettings, StepReport
from trainc.runtime.run.meetings import MeetAgain
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.observer import EvaluationObservers
from trainc.runtime.step.record import Signals, Step


class Program(LoadableProgram, OwnLoopProgram):
    """A compiled training method bound to one model.

    Call `loss(batch)` and `update()` in a training loop of your own, or `step(batch)` for the whole step. `module` is
    the user's model, `graph` the same step as one torch.fx graph; both give the same numbers.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        method: LoweredMethod,
        settings: RunSettings,
        length: RunLength | None,
        signals: Signals,
        *,
        batch_size: int = 0,
        micro_size: int = 0,
        halves_micro: bool = False,
        clock: Clock | None = None,
        executor: Executor = "auto",
        without: frozenset[str] = frozenset(),
    ) -> None:
        for name in method.frozen:
            model.get_parameter(name).requires_grad_(False)
        self.plan, self.module, self.settings, self.length = plan, model, settings, length
        self.clock = Clock() if clock is None else clock
        self.execution = Execution(model, method, settings.seed, self.clock, executor, without)
        self._method = method
        self._evaluation = EvaluationWeights(model, method.evaluated_with.values(), method.actions)
        self._observers = EvaluationObservers(method.evaluation_observers, self.clock)
        self._evaluations = Evaluations(self.execution, self._observers, goes_on=halves_micro)
        self._machine = StepMachine(method.actions, self.clock, self.execution.parameters, signals)
        self._machine.set_sizes(batch_size, micro_size)
        exchange = exchange_of(self.execution, method, plan.hash, self)
        fitting = FittingSize(goes_on=halves_micro)
        self._runner = StepRunner(
            self.execution, method, self._machine, settings, exchange, fitting
        )

    @property
    def loss_fn(self) -> Loss:
        """The first loss, of logits and targets, without the terms that the spec adds."""
        return self.execution.loss_fn

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each loss of a sum is multiplied by now, by name; nothing for one loss without a weight."""
        return self.execution.losses.weights_now(self.clock)

    @property
    def sites(self) -> Sites:
        """The layers that the method measures or changes."""
        return self.execution.sites

    @property
    def forward(self) -> Any:
        """What `loss` calls for the logits: set it to a wrapper of `module` (DDP, torch.compile) to train with it."""
        return self.execution.forward

    @forward.setter
    def forward(self, wrapper: Any) -> None:
        self.execution.forward = wrapper

    @property
    def graph(self) -> StepGraph:
        """The step as one torch.fx GraphModule: call it with a batch, it returns the loss and fills `.grad`.

        A call raises GraphRefused where no graph can run the step, and says why.
        """
        self._evaluation.check_outside("graph")
        graph = self.execution.graphs.newest
        graph.on_call = partial(self._runner.run, as_graph=True)
        return graph

    @property
    def graph_refused(self) -> str | None:
        """Why the last micro-batch ran by the bound modules although a graph was wanted; None where it did not."""
        return self.execution.refused

    @property
    def batch_size(self) -> int:
        """Samples of the next step."""
        return self._machine.batch_size

    @property
    def micro_size(self) -> int:
        """Samples of one micro-batch; 0 where the spec names no data."""
        return self._machine.micro_size

    @property
    def fitting_size(self) -> int | None:
        """With `micro = auto`, samples of one pass where those of a micro-batch did not fit into memory; else None."""
        return self._runner.fitting.size

    @property
    def signals(self) -> Mapping[str, float]:
        """The last measured value of each signal, by name; NaN if there is none yet."""
        return self._machine.signals

    @property
    def id_readers(self) -> tuple[str, ...]:
        """The clauses that read which samples a step holds."""
        return tuple(self._runner.id_readers)

    @property
    def reads_sample_ids(self) -> bool:
        """Whether a clause reads which samples a batch holds: `loss` and `step` must then be given `sample_ids`."""
        return bool(self._runner.id_readers)

    # the step

    def begin(self) -> Step:
        """Open the step: rules set the batch size, policies the rates. `loss` calls `begin` if you did not.
        Before its first step a replica that joins others takes over their state here, with the clock.
        """
        self._evaluation.check_outside("begin")
        return self._runner.begin()

    def loss(
        self,
        batch: GivenBatch,
        loss_weight: float = 1.0,
        example_fraction: float | None = None,
        *,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of one micro-batch with every term the spec adds, 0-d, ready for `backward()`.

        `loss_weight` is the micro-batch's fraction of the step's counted targets, `example_fraction` its fraction of
        the step's examples (`loss_weight` unless given): both are 1 without accumulation, and sum to 1 over a step.
        `update` is an error unless each loss was differentiated once.
        `sample_ids` are as in `step`.
        """
        self._evaluation.check_outside("loss")
        return self._runner.run(batch, loss_weight, example_fraction, sample_ids, as_graph=False)

    def update(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
        """Apply the gradients: actions on gradients, optimizer, observers. Return the step's metrics.

        `scaler` is the GradScaler that scaled the losses, if one did: gradients are unscaled first, and the update is
        skipped where they overflowed; call `scaler.update()` yourself. Raises ValueError where gradients that are
        compared with measured ones were rescaled otherwise, StopRun where a rule or a non-finite loss ends the run;
        then no weight has changed.
        """
        self._evaluation.check_outside("update")
        return self._runner.update(scaler)

    def step(
        self,
        batch: GivenBatch | Sequence[GivenBatch],
        scaler: torch.amp.GradScaler | None = None,
        *,
        sample_ids: SampleIds | None = None,
    ) -> dict[str, float]:
        """Run one optimizer step on a batch, or on a list of its micro-batches, and return the step's metrics.

        A micro-batch in which no target counts is not run, unless a loss term is a mean over examples; its examples and
        tokens are counted. With a GradScaler the bound modules run, losses are scaled and gradients unscaled; call
        `scaler.update()` yourself, as after `update`. `sample_ids` say which samples the examples are, for clauses
        that read it: an int64 tensor with one number an example, and a list of them for a list of micro-batches.
        """
        self._evaluation.check_outside("step")
        return self._runner.step(batch, scaler, sample_ids)

    def discard_step(self) -> None:
        """Forget the open step: the micro-batches that ran, their gradients, and what rules decided in `begin`.

        The next step begins where this one did: the clock has not moved. Without an open step only gradients are freed.
        Raises RuntimeError inside `step`, while a clause holds the weights at other values.
        """
        self._runner.discard_step()

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Inside `with program.evaluation_weights():` the model has the weights that evaluation uses.

        These are the trained ones unless a clause gives others, such as an average; then `module`, its `state_dict` and
        `save` have those in the block, `state_dict` of the program has the trained ones, and a step is an error. The
        trained weights come back on every way out.
        """
        return self._evaluation.used()

    @property
    def evaluates(self) -> str | None:
        """What evaluation and saving use in place of the trained weights; None where they use these."""
        return self._evaluation.name

    @torch.no_grad()
    def evaluate(self, inputs: Any, targets: Any = None) -> Evaluated:
        """Return the loss summed over the counted targets, their number, and metrics by name as sums and counts.

        Where the model computes its own loss, a dict with the labels in it may be given without `targets`.

        The model runs in eval mode, with `evaluation_weights`, unchanged by the spec, and without the terms that the
        spec adds to the loss. Where a pass runs out of memory, it is repeated in parts as the spec's `micro = auto` has
        it; without that, OutOfMemory says what fits.
        """
        self._runner.refuse_inside_block("evaluate")
        whole = inputs if targets is None else (inputs, targets)
        batch = self.execution.losses.batch(whole)
        with self.evaluation_weights():
            found = self._evaluations.run(batch, self.fitting_size)
        self._runner.notes += self._evaluations.news()
        return found

    @property
    def evaluation_readers(self) -> tuple[str, ...]:
        """The clauses that read the batches of evaluations."""
        return self._observers.names

    def read_evaluation(self, logits: Tensor, targets: Tensor) -> None:
        """Let clauses read a batch that your own code evaluates: logits and targets as `backward` takes them.

        The model is in eval mode, with `evaluation_weights`; `evaluation_metrics` ends the evaluation.
        """
        self._evaluations.read(logits, targets)

    def evaluation_metrics(self) -> dict[str, float]:
        """End an evaluation: return what clauses measured of it since the last step, and set their signals."""
        return self._observers.finish(self._machine.signals)

    def measured(self, means: Mapping[str, float]) -> None:
        """Tell the rules of the spec what an evaluation found, such as `{"eval_loss": 0.3}`, before the next step.

        `trainc run` does so itself. Raises ValueError for other names than those of evaluations, RuntimeError inside a
        step.
        """
        self._machine.signals.take_evaluation(means, inside=self._machine.current is not None)

    def report(self) -> StepReport:
        """Return what the last step gave besides metrics: series by layer, notes, whether to save and to evaluate."""
        if (last := self._runner.last) is None:
            return StepReport()
        asks = last.save, None, last.unsound, last.evaluate
        return StepReport(last.series, tuple(last.notes), *asks, last.decided)

    def recall(self, decided: Mapping[int, Mapping[str, int]]) -> None:
        """Decide as reported before (`StepReport.decided`, by the number of the step) where these steps run again.

        `trainc run` does so itself, with what it recorded: the interval of a `budget` follows from times.
        """
        self._machine.decided |= decided

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, in the whole run."""
        return self._runner.history.skipped.total

    @property
    def unsound_steps(self) -> int:
        """How many of them were not sound; in the others a gradient overflowed at the scale of a GradScaler."""
        return self._runner.history.skipped.unsound

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the state of the optimizer by parameter name, of the other actions, and of the clock.

        `evaluation` has the weights that evaluation uses, where they are not the trained ones. Tensors are whole, also
        where FSDP2 shards parameters: then all processes call this, and any number of them can continue. Raises
        RuntimeError inside a step whose weights are at other values for its passes.
        """
        state = self.own_state_dict()
        return whole(state) if self.is_sharded else state

    @property
    def exchanges(self) -> str | None:
        """The clause by which each of several processes trains a replica of its own; None where there is none."""
        return next(iter(self._method.exchanges), None)

    def meet_with(self, meet: Meet) -> None:
        """Let the other replicas know of each step before its update, as `trainc run` does."""
        self._runner.meet = meet
        self._runner.meet_again = MeetAgain.where_due(self._machine, meet)

    def agree(self, replicas: ReplicaGroup) -> None:
        """Check that all replicas that average gradients have the same weights; raises ValueError where they differ."""
        remedy = "Updates must be the same on all: an optimizer that draws random numbers needs a generator of its own"
        same = weights_fact("their weights", self.execution.parameters, remedy)
        replicas.agree(f"after step {self.clock.steps}", [same])

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the parameters, as with FSDP2."""
        return first_shard(dict(self.module.named_parameters())) is not None

    def own_state_dict(self) -> dict[str, Any]:
        """Return the state with what is sharded over processes as it is, for a checkpoint that all of them write."""
        with self._evaluation.trained() as kept:
            weights, machine = Unwrapped(self.module).state_dict(), kept(self._machine.state_dict())
        others, evaluations = self._evaluation.state(), self._evaluations.size.state_dict()
        return {
            "made_by": identity_of(self.plan),
            "model": weights,
            "history": self._runner.history.state_dict(),
            "execution": self.execution.state_dict(),
            "fitting": self._runner.fitting.state_dict(),
            **({} if evaluations is None else {"fitting_evaluation": evaluations}),
            **({"evaluation": others} if others else {}),
            **machine,
        }

    def summary(self) -> list[str]:
        """Return lines of text: what the loss and each clause of the spec did in this run."""
        reasons, history = self.execution.reasons.values(), self._runner.history
        lines = summary_lines(self._method, self.plan.clauses, history, self._machine, reasons)
        sizes = (self._runner.fitting.summary(), self._evaluations.size.summary())
        return [*lines, *filter(None, sizes)]
