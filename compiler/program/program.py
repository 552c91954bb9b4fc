"""The program that `trainc.compile` returns: a bound model, its training step, and the state of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.plan.plan import Plan
from trainc.compiler.program.exchange_replicas import ExchangeReplicas
from trainc.compiler.program.execution import Execution, Executor
from trainc.compiler.program.save import save
from trainc.compiler.program.step_runner import StepRunner
from trainc.compiler.program.summary_lines import factor_lines, loss_lines
from trainc.runtime.data.batch import Batch, compute_logits
from trainc.runtime.run.interface import RunSettings, StepReport
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Signals, Step


class Program:
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
        samples_per_epoch: int | None = None,
        executor: Executor = "auto",
        without: frozenset[str] = frozenset(),
    ) -> None:
        for name in method.frozen:
            model.get_parameter(name).requires_grad_(False)
        self.plan = plan
        self.module = model
        self.settings = settings
        self.length = length
        self.clock = Clock(samples_per_epoch=samples_per_epoch)
        self.execution = Execution(model, method, settings.seed, self.clock, executor, without)
        self._method = method
        self._machine = StepMachine(method.actions, self.clock, self.execution.parameters, signals)
        self._machine.batch_size, self._machine.micro_size = batch_size, micro_size
        exchange = (
            ExchangeReplicas(self.execution, method.exchanges[0], plan.hash)
            if method.exchanges
            else None
        )
        self._runner = StepRunner(self.execution, method, self._machine, settings, exchange)

    # what it is

    @property
    def loss_fn(self) -> Loss:
        """The loss of logits and targets, without the terms that the spec adds."""
        return self.execution.loss_fn

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
    def signals(self) -> Mapping[str, float]:
        """The last measured value of each signal, by name; NaN if there is none yet."""
        return self._machine.signals

    # the step

    def begin(self) -> Step:
        """Open the step: rules set the batch size, policies the rates. `loss` calls `begin` if you did not."""
        return self._machine.begin()

    def loss(
        self, batch: Batch, loss_weight: float = 1.0, example_fraction: float | None = None
    ) -> Tensor:
        """Return the loss of one micro-batch with every term the spec adds, 0-d, ready for `backward()`.

        `loss_weight` is the micro-batch's fraction of the step's counted targets, `example_fraction` its fraction of
        the step's examples (`loss_weight` unless given): both are 1 without accumulation, and sum to 1 over a step.
        """
        return self._runner.run(batch, loss_weight, example_fraction, as_graph=False)

    def update(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
        """Apply the gradients: actions on gradients, optimizer, observers. Return the step's metrics.

        `scaler` is the GradScaler that scaled the losses, if one did: gradients are unscaled first, and the update is
        skipped where they overflowed; call `scaler.update()` yourself. Raises ValueError where gradients that are
        compared with measured ones were rescaled otherwise, StopRun where a rule or a non-finite loss ends the run;
        then no weight has changed.
        """
        return self._runner.update(scaler)

    def step(
        self, batch: Batch | Sequence[Batch], scaler: torch.amp.GradScaler | None = None
    ) -> dict[str, float]:
        """Run one optimizer step on a batch, or on a list of its micro-batches, and return the step's metrics.

        A micro-batch in which no target counts is not run; its examples and tokens are counted. With a GradScaler the
        bound modules run, losses are scaled and gradients unscaled; call `scaler.update()` yourself, as after `update`.
        """
        return self._runner.step(batch, scaler)

    @torch.no_grad()
    def evaluate(self, inputs: Any, targets: Tensor) -> tuple[float, int, dict[str, float]]:
        """Return the loss summed over the counted targets, their number, and metrics (such as `accuracy`) as sums.

        The model runs in eval mode, unchanged by the spec, and without the terms that the spec adds to the loss.
        """
        training = self.module.training
        self.module.eval()
        try:
            logits = compute_logits(self.module, inputs)
        finally:
            self.module.train(training)
        count, loss = self.loss_fn.count(targets), float(self.loss_fn(logits, targets))
        return loss * count, count, self.loss_fn.metrics(logits, targets)

    def report(self) -> StepReport:
        """Return what the last step gave besides metrics: series by layer, notes, and whether to save a checkpoint."""
        last = self._runner.last
        if last is None:
            return StepReport()
        return StepReport(last.series, tuple(last.notes), last.save)

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the state of the optimizer by parameter name, of the other actions, and of the clock.

        Raises RuntimeError inside a step whose weights are at other values for its passes.
        """
        return {
            "plan": self.plan.hash,
            "model": dict(self.module.state_dict()),
            "terms": dict(self._runner.first_terms),
            **self._machine.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; raises ValueError naming what does not fit this program."""
        self.module.load_state_dict(state["model"])
        self._machine.load_state_dict(state)
        self._restore(state)

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Restore the state of another spec on the same model where it fits; return lines on what restarts."""
        self.module.load_state_dict(state["model"])
        lost = self._machine.load_compatible(state)
        self._restore(state)
        return lost

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._runner.first_terms = dict(state["terms"])
        for mask in self._method.masks.values():
            mask.read()
        self._runner.reset()

    def save(self, folder: str | Path) -> Path:
        """Write plan, graph and weights to `folder` and return it; `trainc.load` binds them to a model again."""
        self._machine.check_outside("save")
        return save(Path(folder), self.plan, self.module, self.execution.graphs.installed)

    def summary(self) -> list[str]:
        """Return lines of text: what the loss and each clause of the spec did in this run."""
        first, last = self._runner.first_terms, self._runner.last
        lines = [*loss_lines(self._method, first, last, self.clock.steps)]
        lines += factor_lines(self._method)
        said = (action.summary() for action in self._machine.actions)
        lines += [line for line in said if line is not None]
        lines += [
            f"the bound modules ran instead of a graph: {reason}"
            for reason in self.execution.reasons
        ]
        dropped = [clause for clause in self.plan.clauses if clause["dropped"]]
        return lines + [
            f"{c['kind']} {c['construct']}: not in the program: {c['dropped']}" for c in dropped
        ]

    def unbind(self) -> None:
        """Give the model's layers their own classes back; this program cannot train afterwards."""
        self.sites.unbind()
        for mask in self._method.masks.values():
            mask.remove()
