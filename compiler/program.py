"""The program: a bound model, its step, and the state of both. What `trainc.compile` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from trainc.compiler.lowering import Parts, Penalty, Task
from trainc.compiler.settings import RunSettings
from trainc.compiler.sites import Sites, bind
from trainc.kernels.philox import pack_key
from trainc.kernels.task_consistency_loss import task_consistency_loss
from trainc.runtime import batches
from trainc.runtime.batches import Batch
from trainc.runtime.clock import Clock, RunLength
from trainc.runtime.interface import NonFiniteLoss, Report
from trainc.runtime.optimizer import OptimizerStep
from trainc.runtime.replicas import gather, world_size
from trainc.runtime.step import Contribution, Signals, Step, StepMachine
from trainc.runtime.streams import derive

if TYPE_CHECKING:
    from trainc.compiler.plan import Plan
    from trainc.compiler.step_graph import StepGraph

Executor = Literal["auto", "graph", "module"]


@dataclass(slots=True)
class _Micro:
    """A micro-batch between its loss and the update: what `update` reads once its gradients exist."""

    weights: Tensor
    loss: Tensor
    parts: dict[str, Tensor]
    probes: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] | None = None


class Program:
    """A compiled training method bound to one model.

    `loss(batch)` and `update()` serve an existing loop, `step(batch)` does the whole. `module` is the user's model,
    `graph` the same step as one torch.fx graph; both give the same numbers.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        parts: Parts,
        settings: RunSettings,
        length: RunLength | None,
        batch_size: int,
        micro_size: int,
        samples_per_epoch: int | None = None,
        executor: Executor = "auto",
        without: frozenset[str] = frozenset(),
        signals: Signals | None = None,
    ) -> None:
        if parts.task is None:
            raise ValueError("the spec has no `loss` clause: a program cannot be built without one")
        self.plan = plan
        self.module = model
        self.forward: Any = model
        """What `loss` calls; set it to a wrapper of `module` (DDP, torch.compile) to train through that."""
        self.settings = settings
        self.length = length
        self.executor: Executor = executor
        self.without = without
        self.task: Task = parts.task
        self._parts = parts
        for name in parts.frozen:
            model.get_parameter(name).requires_grad_(False)
        self._parameters = dict(model.named_parameters())
        self._optimizers = [a for a in parts.actions if isinstance(a, OptimizerStep)]
        self.sites: Sites = bind(model, parts.rewrite)
        self.clock = Clock(samples_per_epoch=samples_per_epoch)
        self._machine = StepMachine(parts.actions, self.clock, self._parameters)
        if signals is not None:
            self._machine.signals = signals
        self._machine.batch_size, self._machine.micro_size = batch_size, micro_size
        self._micros: list[_Micro] = []
        self._covered = not parts.rewrite
        self._graphs: dict[Any, StepGraph] = {}
        self._graph: StepGraph | None = None
        self._adopted: StepGraph | None = None
        self._last: Step | None = None
        self._terms: dict[str, float] = {}
        """The first measured value of every loss term: what the summary compares the last one with."""
        self.graph_refused: str | None = None
        """Why the step runs module by module although a graph was wanted; None while nothing refused."""

    # the step

    @property
    def batch_size(self) -> int:
        """Samples of the next step, as the rules left it."""
        return self._machine.batch_size

    @property
    def micro_size(self) -> int:
        return self._machine.micro_size

    @property
    def signals(self) -> Mapping[str, float]:
        """What was measured last, by name; NaN where it is undetermined."""
        return self._machine.signals

    def begin(self) -> Step:
        """Open the step: rules choose the batch, policies set the rates. `loss` does it when nobody did."""
        return self._machine.begin()

    def loss(self, batch: Batch, share: float = 1.0, part: float | None = None) -> Tensor:
        """Return the loss of one micro-batch with every term the spec adds, ready for `backward()`.

        `share` is the micro-batch's part of the step's counted targets, `part` of its examples (`share` unless given):
        1 without accumulation; those of a step sum to 1.
        """
        step = self.begin()
        inputs, targets = batches.check(batch)
        scalars = self._scalars(share, targets.device, part)
        if self._parts.rewrite:
            self._arm(targets, scalars)
        if self._covered or not self.module.training:
            total, loss, parts = self._forward((inputs, targets), share, scalars)
        else:
            with self.sites.counted() as counts:
                total, loss, parts = self._forward((inputs, targets), share, scalars)
            self.sites.check_coverage(counts)
            self._covered = True
        self._remember(
            step,
            targets,
            loss,
            parts,
            share,
            self.sites.probes() if self._parts.rewrite.norms else {},
        )
        return total

    def update(self) -> dict[str, float]:
        """Apply what `backward()` left: gradient steps, optimizer, observers. Return the step's metrics.

        Raises StopRun when a rule or a non-finite loss ends the run; then no update was made.
        """
        step = self._machine.current
        if step is None or not self._micros:
            raise RuntimeError(
                "nothing to update: call `program.loss(batch)` and `backward()` first"
            )
        self._collect(step)
        if not math.isfinite(step.loss) and self.settings.on_nan != "continue":
            return self._refuse_update(step)
        self._machine.finish()
        self.sites.disarm()
        self._last = step
        return self._metrics(step)

    def report(self) -> Report:
        """Return what the last step has to say beside its metrics: per-layer series, notes, a wish to save."""
        if self._last is None:
            return Report()
        return Report(self._last.series, tuple(self._last.notes), self._last.save, self._last.stop)

    def step(self, batch: Batch | Sequence[Batch]) -> dict[str, float]:
        """Run one optimizer step on a batch, or on the micro-batches of one, and return its metrics."""
        self.begin()
        micros = self._micro_batches(batch)
        for micro, share, part in self._shares(micros):
            if self._wants_graph():
                self._graph_loss(micro, share, part)
            else:
                self.loss(micro, share, part).backward()
        return self.update()

    def _shares(self, micros: list[Batch]) -> Iterator[tuple[Batch, float, float]]:
        """Yield each micro-batch with its part of the step's targets and of its examples.

        One in which no target counts has no mean; its examples are counted and it is passed over.
        """
        if len(micros) == 1:
            yield micros[0], 1.0, 1.0
            return
        counts = [self.task.count(targets) for _, targets in micros]
        examples = [targets.shape[0] for _, targets in micros]
        for micro, count, number in zip(micros, counts, examples, strict=True):
            if count:
                yield micro, count / sum(counts), number / sum(examples)
            else:
                self._count(self.begin(), micro[1])

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

    # the graph

    @property
    def graph(self) -> StepGraph:
        """The step as one torch.fx GraphModule: call it with a batch, it returns the loss and fills `.grad`."""
        if self._graph is None:
            from trainc.compiler.step_graph import StepGraph

            self._graph = StepGraph(self.module)
            self._graph.on_call = self._graph_loss
        return self._graph

    def capture(self, batch: Batch) -> StepGraph:
        """Return the graph for batches shaped like `batch`, captured on first use; `graph` then shows the latest."""
        from trainc.compiler.capture import capture, signature

        inputs, targets = batches.check(batch)
        key = signature(self.module, batch)
        if self._adopted is not None and self._adopted.accepts((inputs, targets)):
            return self._adopted
        if key not in self._graphs:
            training = self.module.training
            self.module.train()
            try:
                with self.sites.plain():
                    self._graphs[key] = capture(
                        self.module,
                        self.task,
                        (inputs, targets),
                        rewrite=self._parts.rewrite,
                        penalties={
                            label: _one_mapping(p) for label, p in self._parts.penalties.items()
                        },
                        scalars=self._scalars(1.0, targets.device),
                        without=self.without,
                    )
            finally:
                self.module.train(training)
            self.graph.install(self._graphs[key])
        return self._graphs[key]

    def adopt(self, graph: StepGraph) -> None:
        """Use a graph that was captured before, for batches it accepts."""
        self._adopted = graph
        self.graph.install(graph)

    def _wants_graph(self) -> bool:
        if self.executor == "module" or self.graph_refused is not None or not self.module.training:
            return False
        return self.executor == "graph" or (
            bool(self._parts.rewrite) and self.forward is self.module
        )

    def _graph_loss(self, batch: Batch, share: float = 1.0, part: float | None = None) -> Tensor:
        """Run forward and backward of one micro-batch as a graph and add to `.grad`."""
        step = self.begin()
        inputs, targets = batches.check(batch)
        try:
            graph = self.capture((inputs, targets))
        except Exception as error:
            if self.executor == "graph":
                raise
            self.graph_refused = f"{type(error).__name__}: {error}".splitlines()[0]
            step.notes.append(f"no graph, the bound modules run instead: {self.graph_refused}")
            total = self.loss(batch, share, part)
            total.backward()
            return total.detach()
        out = graph.run((inputs, targets), self._scalars(share, targets.device, part))
        self._covered = True
        for name, gradient in out.grads.items():
            if gradient is not None:
                self._take(name, gradient)
        parts = (
            {} if out.consistency is None else {"task": out.task, "consistency": out.consistency}
        )
        squares = self._by_parameter(out.probes)
        self._remember(step, targets, out.loss, parts, share, {}, squares)
        return out.total

    def _take(self, name: str, gradient: Tensor) -> None:
        compact = self._parts.compacts.get(name)
        if compact is not None:
            compact.take(gradient)
            return
        parameter = self._parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    # trials

    @property
    def measures(self) -> bool:
        """Say whether the program takes per-example statistics."""
        return bool(self._parts.rewrite.norms)

    def trial(
        self, batch: Batch, road: Literal["graph", "module"], strength: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the differentiated loss and the gradients by one road, changing nothing.

        With `strength` every scheduled number of the rewrite and of the loss terms has that value.
        """
        scalars = self._scalars(1.0, batch[1].device)
        if strength is not None:
            scalars |= {
                name: torch.full_like(scalars[name], strength) for name in self._parts.scalars
            }
        if road == "graph":
            out = self.capture(batch).run(batch, scalars)
            return out.total, out.grads
        self._arm(batch[1], scalars)
        try:
            total, _, _ = self._forward(batch, 1.0, scalars)
            named = {n: p for n, p in self._parameters.items() if p.requires_grad}
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        finally:
            self.sites.disarm()
        return total.detach(), dict(zip(named, grads, strict=True))

    def trial_squares(self, batch: Batch) -> dict[str, Tensor]:
        """Return per-example squared norms by parameter for one batch, changing nothing."""
        out = self.capture(batch).run(batch, self._scalars(1.0, batch[1].device))
        return self._by_parameter(out.probes)

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
        self._terms = dict(state["terms"])
        for compact in self._parts.compacts.values():
            compact.read()
        self._micros.clear()
        self._machine.abandon()

    def save(self, folder: str | Path) -> Path:
        """Write plan, graph and weights to `folder`; `trainc.load` binds them to a model again."""
        from trainc.compiler.artefact import save

        return save(self, Path(folder))

    def summary(self) -> list[str]:
        """Return what each line of the spec did, as found."""
        lines = [line for action in self._machine.actions if (line := action.summary()) is not None]
        pairing = self._parts.rewrite.pairing
        if pairing is not None and "consistency" in self._terms and self._last is not None:
            first, last = self._terms["consistency"], self._last.metrics["consistency"]
            sites = len(self._parts.rewrite.noises)
            lines.append(
                f"{pairing.label}: distance of the two views {first:.4g} -> {last:.4g}, noise at {sites} layers"
            )
        if self.graph_refused is not None:
            lines.append(f"no graph, the bound modules ran instead: {self.graph_refused}")
        dropped = [c for c in self.plan.clauses if c["dropped"]]
        return lines + [
            f"{c['kind']} {c['construct']}: not in the program, {c['dropped']}" for c in dropped
        ]

    def unbind(self) -> None:
        """Give the user's layers their own classes back; the program cannot train afterwards."""
        self.sites.unbind()
        for compact in self._parts.compacts.values():
            compact.remove()

    # inside

    def _micro_batches(self, batch: Batch | Sequence[Batch]) -> list[Batch]:
        if isinstance(batch, list):
            return [batches.check(one) for one in batch]
        whole = batches.check(batch)
        return batches.split(whole, self.micro_size)

    def _scalars(
        self, share: float, device: torch.device, part: float | None = None
    ) -> dict[str, Tensor]:
        """Return this micro-batch's numbers as 0-d tensors, so that a changing rate never recompiles.

        The distance of two views is a mean over examples, the task one over counted targets: where the two parts of
        the step differ, the distance's weight makes up for it.
        """
        clock = self.clock
        dtype = self._dtype()
        scalars = {
            name: torch.tensor(schedule(clock), dtype=dtype, device=device)
            for name, schedule in self._parts.scalars.items()
        }
        scalars.update(self._parts.tensors)
        if share != 1.0 or self._parts.rewrite or self._parts.penalties or self.executor == "graph":
            scalars["share"] = torch.tensor(share, dtype=dtype, device=device)
        pairing = self._parts.rewrite.pairing
        if pairing is not None and part is not None:
            scalars[pairing.weight] = scalars[pairing.weight] * (part / share)
        if self._parts.rewrite.noises or pairing:
            word = derive(self.settings.seed, "noise") & 0xFFFFFFFF
            scalars["key"] = pack_key(word, clock.steps & 0xFFFFFFFF, device=device)
            step = self._machine.current
            first = 0 if step is None else step.samples
            scalars["first_example"] = torch.tensor(first, dtype=torch.int64, device=device)
        return scalars

    def _forward(
        self, batch: Batch, share: float, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what is differentiated, the loss before `share` and the loss terms by name, module by module."""
        inputs, targets = batch
        logits = batches.call(self.forward, batches.repeated(inputs, self._parts.rewrite.views))
        loss, parts = self._task_loss(logits, targets, scalars)
        total = loss if share == 1.0 else loss * scalars["share"]
        for label, penalty in self._parts.penalties.items():
            value = penalty.value({n: self._parameters[n] for n in penalty.parameters}, scalars)
            parts[label] = value.detach()
            total = total + (value if share == 1.0 else value * scalars["share"])
        return total, loss, parts

    def _dtype(self) -> torch.dtype:
        wide = any(p.dtype == torch.float64 for p in self._parameters.values())
        return torch.float64 if wide else torch.float32

    def _arm(self, targets: Tensor, scalars: Mapping[str, Tensor]) -> None:
        self.sites.arm(targets.shape[0], scalars, self._dtype(), targets.device)

    def _task_loss(
        self, logits: Tensor, targets: Tensor, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairing = self._parts.rewrite.pairing
        if pairing is None:
            return self.task(logits, targets), {}
        weight = scalars[pairing.weight]
        if self.task.name == "cross_entropy":
            loss, task, distance = task_consistency_loss(
                logits,
                targets,
                weight,
                pairing.distance,
                self.task.ignore_index,
                self.task.label_smoothing,
            )
        else:
            one, two = logits.chunk(2)
            task = self.task(one, targets)
            distance = (one - two).square().sum(-1).mean()
            loss = task + weight * distance
        return loss, {"task": task.detach(), "consistency": distance.detach()}

    def _remember(
        self,
        step: Step,
        targets: Tensor,
        loss: Tensor,
        parts: dict[str, Tensor],
        share: float,
        probes: dict[str, Tensor],
        squares: dict[str, Tensor] | None = None,
    ) -> None:
        self._count(step, targets)
        weights = (
            self.task.weights(targets) * share
            if self._parts.rewrite.norms
            else targets.new_empty(0)
        )
        scaled = {name: value * share for name, value in parts.items()}
        self._micros.append(_Micro(weights, loss.detach() * share, scaled, probes, squares))

    def _count(self, step: Step, targets: Tensor) -> None:
        step.samples += targets.shape[0]
        step.tokens += batches.tokens(targets)

    def _collect(self, step: Step) -> None:
        """Read losses and probes of the micro-batches into the step."""
        for micro in self._micros:
            step.loss += float(micro.loss)
            for name, value in micro.parts.items():
                step.metrics[name] = step.metrics.get(name, 0.0) + float(value)
                self._terms.setdefault(name, step.metrics[name])
            if self._parts.rewrite.norms:
                squares = (
                    micro.squares if micro.squares is not None else self._squares(micro.probes)
                )
                step.contributions.append(Contribution(micro.weights, squares))
        if step.contributions and self.forward is not self.module and world_size() > 1:
            step.contributions = gather(step.contributions)
        self._micros.clear()

    def _squares(self, probes: dict[str, Tensor]) -> dict[str, Tensor]:
        silent = [name for name, probe in probes.items() if probe.grad is None]
        if silent or not probes:
            from trainc.compiler.sites import SiteError

            names = ", ".join(f"`{n}`" for n in silent) or "no site"
            raise SiteError(
                f"{names} delivered no statistics: did `backward()` reach it through `program.forward`?"
            )
        return self._by_parameter(
            {name: cast(Tensor, probe.grad) for name, probe in probes.items()}
        )

    def _by_parameter(self, probes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn a site's columns into one row of squared norms per parameter."""
        squares: dict[str, Tensor] = {}
        for site in self._parts.rewrite.norms:
            if site.module not in probes:
                continue
            for column, name in enumerate(site.parameters):
                if name is not None:
                    squares[name] = probes[site.module][:, column]
        return squares

    def _refuse_update(self, step: Step) -> dict[str, float]:
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        for compact in self._parts.compacts.values():
            compact.discard()
        self.sites.disarm()
        if self.settings.on_nan == "stop":
            self._machine.abandon()
            raise NonFiniteLoss(
                f"the loss is {step.loss} at step {self.clock.steps}; the weights are those before it"
            )
        self._machine.abandon()
        self.clock.advance(samples=step.samples, tokens=step.tokens, seconds=0.0)
        step.metrics["skipped"] = 1.0
        self._last = step
        return self._metrics(step)

    def _metrics(self, step: Step) -> dict[str, float]:
        return {"loss": step.loss, "batch": float(step.samples), **step.metrics}


def _one_mapping(penalty: Penalty) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return a loss term that finds parameters and inputs in one mapping, as the graph hands them over."""
    return lambda values: penalty.value({name: values[name] for name in penalty.parameters}, values)
