"""The program: a bound model, its step, and the state of both. What `trainc.compile` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainc.compiler.bind.run_settings import RunSettings
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.per_example.micro_batch import Micro, MicroBatchSlice
from trainc.compiler.program.distributed import check_apart, follow
from trainc.compiler.program.execution import Execution, Executor
from trainc.compiler.program.grad_scaler import unscale
from trainc.compiler.program.save import save
from trainc.compiler.program.summary_lines import factor_lines, loss_lines
from trainc.runtime.data import batch as batches
from trainc.runtime.data.batch import Batch
from trainc.runtime.run.interface import NonFiniteLoss, Report
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.step.record import Signals, Step

if TYPE_CHECKING:
    from trainc.compiler.graph.step_graph import StepGraph
    from trainc.compiler.layers.bound_modules import Sites
    from trainc.compiler.plan.plan import Plan
    from trainc.runtime.step.replicas import Replicas


_SHARES = 1e-3
"""How far from 1 the shares of a step may sum: they may come in 16 bits."""


class Program:
    """A compiled training method bound to one model.

    `loss(batch)` and `update()` serve an existing loop, `step(batch)` does the whole. `module` is the user's model,
    `graph` the same step as one torch.fx graph; both give the same numbers.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        parts: LoweredMethod,
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
        for name in parts.frozen:
            model.get_parameter(name).requires_grad_(False)
        self.plan = plan
        self.module = model
        self.settings = settings
        self.length = length
        self.clock = Clock(samples_per_epoch=samples_per_epoch)
        self.execution = Execution(model, parts, settings.seed, self.clock, executor, without)
        self._parts = parts
        self._machine = StepMachine(parts.actions, self.clock, self.execution.parameters, signals)
        self._machine.batch_size, self._machine.micro_size = batch_size, micro_size
        self._micros: list[Micro] = []
        self._last: Step | None = None
        self._terms: dict[str, float] = {}
        """The first measured value of every loss term: what the summary compares the last one with."""

    # what it is

    @property
    def task(self) -> Loss:
        """The loss of a plain run."""
        return self.execution.task

    @property
    def sites(self) -> Sites:
        """The layers that are bound."""
        return self.execution.sites

    @property
    def forward(self) -> Any:
        """What `loss` calls; set it to a wrapper of `module` (DDP, torch.compile) to train through that."""
        return self.execution.forward

    @forward.setter
    def forward(self, wrapper: Any) -> None:
        self.execution.forward = wrapper

    @property
    def graph(self) -> StepGraph:
        """The step as one torch.fx GraphModule: call it with a batch, it returns the loss and fills `.grad`."""
        graph = self.execution.graph
        graph.on_call = self._graph_loss
        return graph

    @property
    def graph_refused(self) -> str | None:
        """Why the bound modules run although a graph was wanted; None while nothing refused."""
        return self.execution.refused

    @property
    def batch_size(self) -> int:
        """Samples of the next step, as the rules left it."""
        return self._machine.batch_size

    @property
    def micro_size(self) -> int:
        """Samples of one micro-batch; 0 where the spec names no data."""
        return self._machine.micro_size

    @property
    def signals(self) -> Mapping[str, float]:
        """What was measured last, by name; NaN where it is undetermined."""
        return self._machine.signals

    # the step

    def begin(self) -> Step:
        """Open the step: rules choose the batch, policies set the rates. `loss` does it when nobody did."""
        return self._machine.begin()

    def loss(self, batch: Batch, share: float = 1.0, part: float | None = None) -> Tensor:
        """Return the loss of one micro-batch with every term the spec adds, ready for `backward()`.

        `share` is the micro-batch's part of the step's counted targets, `part` of its examples (`share` unless given):
        1 without accumulation; those of a step sum to 1.
        """
        checked, part = batches.check(batch), share if part is None else part
        step = self._open([checked], part)
        return self._run_modules(step, checked, MicroBatchSlice(share, part, step.samples))

    def update(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, float]:
        """Apply what `backward()` left: gradient steps, optimizer, observers. Return the step's metrics.

        With the GradScaler that scaled the losses gradients are unscaled first, and a step in which they overflowed is
        passed over; `scaler.update()` is the caller's. Raises ValueError where other hands scaled gradients that
        something measured is compared with, StopRun when a rule or a non-finite loss ends the run; then nothing moved.
        """
        step = self._machine.current
        if step is None or not self._micros:
            raise RuntimeError(
                "nothing to update: call `program.loss(batch)` and `backward()` first"
            )
        named = self.execution.parameters
        overflowed = scaler is not None and unscale(scaler, self._parts, named)
        self._collect(step)
        self._last = step
        refused = not math.isfinite(step.loss) and self.settings.on_nan != "continue"
        if refused or overflowed:
            self._skip_step(step)
        else:
            self._machine.finish()
        self.sites.disarm()
        return {"loss": step.loss, "batch": float(step.samples), **step.metrics}

    def step(self, batch: Batch | Sequence[Batch]) -> dict[str, float]:
        """Run one optimizer step on a batch, or on a list of micro-batches of one, and return its metrics."""
        if isinstance(batch, list):
            micros = [batches.check(one) for one in batch]
        else:
            micros = batches.split(batches.check(batch), self.micro_size)
        step = self._open(micros)
        portions = self._portions(step, micros)
        for i, (micro, portion) in enumerate(portions):
            if self.execution.wants_graph:
                self._run_graph(step, micro, portion)
                continue
            with self._apart(last=i == len(portions) - 1):
                self._run_modules(step, micro, portion).backward()
        return self.update()

    def _apart(self, last: bool) -> AbstractContextManager[Any]:
        """Let replicas exchange gradients once a step, in its last backward pass."""
        no_sync = getattr(self.forward, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    @torch.no_grad()
    def evaluate(self, inputs: Any, targets: Tensor) -> tuple[float, int, dict[str, float]]:
        """Return the summed task loss, the number of targets and summed metrics, in eval mode, without any rewrite."""
        training = self.module.training
        self.module.eval()
        try:
            logits = batches.call(self.module, inputs)
        finally:
            self.module.train(training)
        count = self.task.count(targets)
        return float(self.task(logits, targets)) * count, count, self.task.metrics(logits, targets)

    def report(self) -> Report:
        """Return what the last step has to say beside its metrics: per-layer series, notes, a wish to save."""
        if self._last is None:
            return Report()
        return Report(self._last.series, tuple(self._last.notes), self._last.save)

    def _graph_loss(self, batch: Batch, share: float = 1.0, part: float | None = None) -> Tensor:
        """Run forward and backward of one micro-batch as a graph and return the loss: calling `graph`."""
        checked, part = batches.check(batch), share if part is None else part
        step = self._open([checked], part)
        return self._run_graph(step, checked, MicroBatchSlice(share, part, step.samples))

    def _open(self, micros: Sequence[Batch], part: float = 1.0) -> Step:
        """Open the step with what it is given, `part` of its examples: the batch where the spec names no data."""
        if self._machine.current is None:
            if self._last is None:
                follow(self.module, self.execution.parameters, self._machine.actions)
            if not self.micro_size and part > 0:
                own, replicas = sum(len(t) for _, t in micros) / part, self.execution.replicas
                self._machine.batch_size = round(own if replicas is None else replicas.total(own))
        return self.begin()

    def _calibrate(self, step: Step, batch: Batch) -> None:
        """Measure all layers on the step's first micro-batch when a clause wants it now."""
        if self._micros or not self.module.training:
            return
        for part in self._parts.calibrations:
            if part.gate.fires(self.clock):
                step.calibrations[part.label] = self.execution.calibrate(batch, part.examples)

    def _run_modules(self, step: Step, batch: Batch, portion: MicroBatchSlice) -> Tensor:
        self._calibrate(step, batch)
        total, micro = self.execution.run_modules(batch, portion)
        self._count(step, batch[1])
        self._micros.append(micro)
        return total

    def _run_graph(self, step: Step, batch: Batch, portion: MicroBatchSlice) -> Tensor:
        self._calibrate(step, batch)
        refused = self.graph_refused
        total, micro = self.execution.run_graph(batch, portion)
        if self.graph_refused != refused:
            step.notes.append(f"no graph, the bound modules run instead: {self.graph_refused}")
        self._count(step, batch[1])
        self._micros.append(micro)
        return total

    def _portions(self, step: Step, micros: list[Batch]) -> list[tuple[Batch, MicroBatchSlice]]:
        """Return each micro-batch with its part of the step's targets and of its examples.

        One in which no target counts has no mean; its examples are counted and it is passed over.
        """
        if len(micros) == 1:
            return [(micros[0], MicroBatchSlice())]
        counts = [self.task.count(targets) for _, targets in micros]
        examples = [targets.shape[0] for _, targets in micros]
        found, first = [], step.samples
        for micro, count, number in zip(micros, counts, examples, strict=True):
            if count:
                portion = MicroBatchSlice(count / sum(counts), number / sum(examples), first)
                found.append((micro, portion))
            else:
                self._count(step, micro[1])
            first += number
        return found

    def _count(self, step: Step, targets: Tensor) -> None:
        step.samples += targets.shape[0]
        step.tokens += batches.tokens(targets)

    def _collect(self, step: Step) -> None:
        """Read losses and statistics of the micro-batches into the step."""
        replicas = self.execution.replicas
        if any(self._parts.batch_gradients.values()):
            check_apart(replicas, self._micros, list(self._parts.batch_gradients))
        for micro in self._micros:
            step.loss += float(micro.loss)
            for name, value in micro.terms.items():
                step.metrics[name] = step.metrics.get(name, 0.0) + float(value)
            if micro.weights is not None:
                step.contributions.append(self.execution.statistics.contribution(micro))
        if replicas is not None:
            self._share(step, replicas, list(self._micros[0].terms))
        self._terms.setdefault("loss", step.loss)
        for name in self._micros[0].terms:
            self._terms.setdefault(name, step.metrics[name])
        if step.contributions:
            self._check_shares(step)
            if replicas is None:
                self.execution.statistics.witness.check()
        self._micros.clear()
        self.execution.statistics.close()

    def _check_shares(self, step: Step) -> None:
        """Refuse micro-batches that are not parts of one mean: statistics of them would mean nothing.

        A batch without a target that counts has no mean and no shares; `on_nan` says what is done about its loss.
        """
        if not math.isfinite(step.loss):
            return
        total = float(torch.stack([part.weights.sum() for part in step.contributions]).sum())
        if not abs(total - 1) < _SHARES:
            raise ValueError(
                f"the shares of the step's micro-batches sum to {total:.4g}, not 1: give each its part of the"
                " step's targets, `program.loss(batch, share=...)`, and leave the loss as it is"
            )

    def _share(self, step: Step, replicas: Replicas, terms: Sequence[str]) -> None:
        """Make the step that of all replicas, with the same numbers on each, so that each decides the same.

        Losses are means, as gradients are; samples and tokens are everybody's.
        """
        own = {"loss": step.loss, "samples": float(step.samples), "tokens": float(step.tokens)}
        own |= {f"term {name}": step.metrics[name] for name in terms}
        step.contributions, means = replicas.gather(step.contributions, own)
        step.loss = means["loss"]
        step.samples, step.tokens = (
            round(means[name] * replicas.size) for name in ("samples", "tokens")
        )
        step.metrics.update({name: means[f"term {name}"] for name in terms})

    def _skip_step(self, step: Step) -> None:
        """Drop a step that nothing can be updated by: stop the run for its loss, or count it and go on."""
        for action in self._parts.actions:
            if isinstance(action, OptimizerStep):
                action.zero_grad()
        for compact in self._parts.selected_entries.values():
            compact.discard()
        self._machine.discard_step()
        if not math.isfinite(step.loss) and self.settings.on_nan == "stop":
            steps = self.clock.steps
            raise NonFiniteLoss(
                f"the loss is {step.loss} at step {steps}; the weights are those before it"
            )
        self.clock.advance(samples=step.samples, tokens=step.tokens, seconds=0.0)
        step.metrics["skipped"] = 1.0

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizer state by parameter name, the actions' state and the clock."""
        return {
            "plan": self.plan.hash,
            "model": dict(self.module.state_dict()),
            "terms": dict(self._terms),
            **self._machine.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; raises ValueError naming what does not fit this program."""
        self.module.load_state_dict(state["model"])
        self._machine.load_state_dict(state)
        self._restore(state)

    def load_compatible(self, state: Mapping[str, Any]) -> list[str]:
        """Restore what fits of another spec's state on the same model; return what does not go on, in lines."""
        self.module.load_state_dict(state["model"])
        told = self._machine.load_compatible(state)
        self._restore(state)
        return told

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._terms = dict(state["terms"])
        for compact in self._parts.selected_entries.values():
            compact.read()
        self._micros.clear()
        self.execution.statistics.close()
        self._machine.discard_step()

    def save(self, folder: str | Path) -> Path:
        """Write plan, graph and weights to `folder`; `trainc.load` binds them to a model again."""
        return save(Path(folder), self.plan, self.module, self.graph)

    def summary(self) -> list[str]:
        """Return what each line of the spec did, as found."""
        lines = [line for action in self._machine.actions if (line := action.summary()) is not None]
        lines[:0] = [
            *loss_lines(self._parts, self._terms, self._last, self.clock.steps),
            *factor_lines(self._parts),
        ]
        if self.graph_refused is not None:
            lines.append(f"no graph, the bound modules ran instead: {self.graph_refused}")
        dropped = [clause for clause in self.plan.clauses if clause["dropped"]]
        return lines + [
            f"{c['kind']} {c['construct']}: not in the program, {c['dropped']}" for c in dropped
        ]

    def unbind(self) -> None:
        """Give the user's layers their own classes back; the program cannot train afterwards."""
        self.sites.unbind()
        for compact in self._parts.selected_entries.values():
            compact.remove()
