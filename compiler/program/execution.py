"""Execution: how one micro-batch runs, by the bound modules or as one graph, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from trainc.compiler.layers.bound_modules import Sites, bind
from trainc.compiler.method.example_index import Division
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.lowered_method import LoweredMethod, PenaltyTerm
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.per_example.brute_force import one_by_one
from trainc.compiler.per_example.micro_batch import Micro, MicroBatchSlice
from trainc.compiler.per_example.preconditions import examine
from trainc.compiler.per_example.statistics import Statistics
from trainc.compiler.program.distributed import (
    exchanges_now,
    first_shard,
    refuse_shards,
    replicas_of,
)
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.data import batch as batches
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.record import Calibrated
from trainc.runtime.step.replicas import Replicas
from trainc.runtime.storage.random_streams import derive

if TYPE_CHECKING:
    from trainc.compiler.graph.step_graph import StepGraph
    from trainc.runtime.schedule.clock import Clock

Executor = Literal["auto", "graph", "module"]

_PER_EXAMPLE = "take `method = per_example`, which needs no such gradient"


class Execution:
    """Runs micro-batches of one program over one model."""

    def __init__(
        self,
        model: nn.Module,
        parts: LoweredMethod,
        seed: int,
        clock: Clock,
        executor: Executor,
        without: frozenset[str],
    ) -> None:
        self.module = model
        self.forward: Any = model
        self.parts = parts
        self.task = cast(Loss, parts.loss)
        self.seed, self.clock = seed, clock
        self.executor, self.without = executor, without
        self.parameters = dict(model.named_parameters())
        self.sites: Sites = bind(model, parts.rewrite)
        self._rewrites, self._views = bool(parts.rewrite), parts.rewrite.views
        self._plain = not (parts.rewrite or parts.penalties or executor == "graph")
        self.refused: str | None = None
        self._covered = not parts.rewrite
        self._examined = not parts.rewrite.measured
        self.statistics = Statistics(parts, self.parameters)
        self._graphs: dict[Any, StepGraph] = {}
        self._graph: StepGraph | None = None
        self._adopted: StepGraph | None = None

    @property
    def replicas(self) -> Replicas | None:
        """The processes that average gradients with this one; None where it trains alone."""
        return replicas_of(self.forward, self.module, self.parameters)

    # module by module

    def run_modules(self, batch: Batch, portion: MicroBatchSlice) -> tuple[Tensor, Micro]:
        """Return what is to be differentiated, and what the micro-batch leaves once it was."""
        refuse_shards(
            "a micro-batch's or replica's own",
            self.parts.batch_gradients,
            self.parameters,
            _PER_EXAMPLE,
        )
        self._examine(batch)
        scalars = self._scalars(portion, batch[1].device)
        if self._rewrites:
            self._arm(batch, scalars)
        if self._covered or not self.module.training:
            total, loss, terms = self._forward(batch, portion.share, scalars)
        else:
            with self.sites.counted() as counts:
                total, loss, terms = self._forward(batch, portion.share, scalars)
            self.sites.check_coverage(counts)
            self._covered = True
        micro = self._micro(batch, portion.share, loss, terms)
        if self.statistics.wanted:
            micro.probes = self.sites.probes()
            micro.training = self.module.training
            micro.synchronised = exchanges_now(self.forward, self.module)
            self.statistics.watch(micro, total)
        return total, micro

    def _examine(self, batch: Batch) -> None:
        """Check, once, that per-example statistics of this model and loss mean what they say."""
        if not self._examined and self.module.training:
            self._examined = examine(self.module, self.sites, batch, self.task)

    def _forward(
        self, batch: Batch, share: float, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what is differentiated, the loss before `share`, and the loss terms by name."""
        inputs, targets = batch
        logits = batches.call(self.forward, batches.repeated(inputs, self._views))
        loss, terms = self._task_loss(logits, targets, scalars)
        total = loss if share == 1.0 else loss * scalars["loss_weight"]
        for label, penalty in self.parts.penalties.items():
            value = penalty.value({n: self.parameters[n] for n in penalty.parameters}, scalars)
            terms[label] = value.detach()
            total = total + (value if share == 1.0 else value * scalars["loss_weight"])
        return total, loss, terms

    def _task_loss(
        self, logits: Tensor, targets: Tensor, scalars: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairing, task = self.parts.rewrite.pairing, self.task
        if pairing is None:
            return task(logits, targets), {}
        weight = scalars[pairing.weight]
        if task.name == "cross_entropy":
            loss, first, distance = cross_entropy_consistency(
                logits, targets, weight, pairing.distance, task.ignore_index, task.label_smoothing
            )
        else:
            one, two = logits.chunk(2)
            first, distance = task(one, targets), (one - two).square().sum(-1).mean()
            loss = first + weight * distance
        return loss, {"data_loss": first.detach(), "consistency": distance.detach()}

    # as a graph

    @property
    def wants_graph(self) -> bool:
        """Say whether the next micro-batch runs as a graph."""
        if self.executor == "module" or self.refused is not None or not self.module.training:
            return False
        if self.executor != "graph" and not (self._rewrites and self.forward is self.module):
            return False
        self.refused = self._modules_only()
        return self.refused is None

    def _modules_only(self) -> str | None:
        """Say why no graph can carry this program; None where one can."""
        if first_shard(self.parameters) is not None:
            return "sharded parameters (FSDP2) are put together module by module"
        return self.parts.rewrite.modules_only

    @property
    def graph(self) -> StepGraph:
        """The graph people hold: it exists before the first batch, and shows the newest capture."""
        if self._graph is None:
            from trainc.compiler.graph.step_graph import StepGraph

            self._graph = StepGraph(self.module)
        return self._graph

    def use_graph(self, graph: StepGraph) -> None:
        """Use a graph that was captured before, for batches it accepts."""
        self._adopted = graph
        self.graph.install(graph)

    def capture(self, batch: Batch) -> StepGraph:
        """Return the graph for batches shaped like `batch`, captured on first use."""
        from trainc.compiler.program.capture import capture, signature

        if self._adopted is not None and self._adopted.accepts(batch):
            return self._adopted
        key = signature(self.module, batch)
        if key not in self._graphs:
            training = self.module.training
            self.module.train()
            try:
                with self.sites.plain():
                    self._graphs[key] = capture(
                        self.module,
                        self.task,
                        batch,
                        rewrite=self.parts.rewrite,
                        penalties={n: _one_mapping(p) for n, p in self.parts.penalties.items()},
                        scalars=self._scalars(MicroBatchSlice(), batch[1].device),
                        without=self.without,
                    )
            finally:
                self.module.train(training)
            self.graph.install(self._graphs[key])
        return self._graphs[key]

    def run_graph(self, batch: Batch, portion: MicroBatchSlice) -> tuple[Tensor, Micro]:
        """Run forward and backward as a graph, add to `.grad`, and return the loss with what is left.

        Where no graph can hold the model the bound modules run instead, and `refused` says why.
        """
        self._examine(batch)
        try:
            graph = self.capture(batch)
        except Exception as error:
            if self.executor == "graph":
                raise
            self.refused = f"{type(error).__name__}: {error}".splitlines()[0]
            total, micro = self.run_modules(batch, portion)
            total.backward()
            return total.detach(), micro
        out = graph.run(batch, self._scalars(portion, batch[1].device))
        self._covered = True
        for name, gradient in out.grads.items():
            if gradient is not None:
                self._take(name, gradient)
        terms = (
            {}
            if out.consistency is None
            else {"data_loss": out.data_loss, "consistency": out.consistency}
        )
        if self.parts.penalties:
            terms[" + ".join(self.parts.penalties)] = out.total / portion.share - out.loss
        micro = self._micro(batch, portion.share, out.loss, terms)
        self.statistics.take(micro, out.probes, out.grads)
        return out.total, micro

    def _take(self, name: str, gradient: Tensor) -> None:
        compact = self.parts.selected_entries.get(name)
        if compact is not None:
            compact.take(gradient)
            return
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    # trials: what `verify` compares

    def trial(
        self, batch: Batch, road: Literal["graph", "module"], strength: float | None = None
    ) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """Return the differentiated loss, the gradients and per-example squares by one road, changing nothing.

        With `strength` every scheduled number of the rewrite and of the loss terms has that value.
        """
        scalars = self._scalars(MicroBatchSlice(), batch[1].device)
        if strength is not None:
            scalars |= {n: torch.full_like(scalars[n], strength) for n in self.parts.scalars}
        self._examine(batch)
        if road == "graph":
            out = self.capture(batch).run(batch, scalars)
            return out.total, out.grads, self.statistics.squares(out.probes)
        self._arm(batch, scalars)
        try:
            total, _, _ = self._forward(batch, 1.0, scalars)
            named = {n: p for n, p in self.parameters.items() if p.requires_grad}
            probes = self.sites.probes()
            wanted = [*named.values(), *probes.values()]
            found = torch.autograd.grad(total, wanted, allow_unused=True)
        finally:
            self.sites.disarm()
        squares = dict(zip(probes, found[len(named) :], strict=True))
        gradients: dict[str, Tensor | None] = dict(zip(named, found, strict=False))
        return total.detach(), gradients, self.statistics.squares(squares)

    def contributions(self, batch: Batch) -> dict[str, Tensor]:
        """Return per-example squared norms by brute force: one backward pass per example, module by module.

        Each example has the noise it has in the whole batch; loss terms over parameters contribute to no example.
        """
        return self._one_by_one(batch, self.statistics.parameters).squares

    def calibrate(self, batch: Batch, examples: int) -> Calibrated:
        """Measure every trainable parameter on the first `examples` of each replica's micro-batch; no state changes."""
        few = batches.split(batch, examples)[0]
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        instead = "leave `calibrate` out, or measure `on all` in every step"
        refuse_shards("an example's own", names, self.parameters, instead)
        with undisturbed(self.module):
            return self._one_by_one(few, names, self.replicas)

    def _one_by_one(
        self, batch: Batch, names: Sequence[str], replicas: Replicas | None = None
    ) -> Calibrated:
        def loss_of(example: int, one: Batch) -> Tensor:
            scalars = self._scalars(MicroBatchSlice(first=example), batch[1].device)
            self._arm(one, scalars)
            inputs = batches.repeated(one[0], self._views)
            return self._task_loss(batches.call(self.module, inputs), one[1], scalars)[0]

        self._examine(batch)
        try:
            parameters = {name: self.parameters[name] for name in names}
            return one_by_one(batch, self.task.weights(batch[1]), loss_of, parameters, replicas)
        finally:
            self.sites.disarm()

    # inside

    def _micro(self, batch: Batch, share: float, loss: Tensor, terms: dict[str, Tensor]) -> Micro:
        if share != 1.0:
            loss, terms = loss * share, {n: t * share for n, t in terms.items()}
        micro = Micro(None, loss.detach(), terms)
        if self.statistics.wanted:
            self.statistics.weigh(micro, self.task, batch, share)
        return micro

    def _scalars(self, portion: MicroBatchSlice, device: torch.device) -> dict[str, Tensor]:
        """Return this micro-batch's numbers as 0-d tensors, so that a changing rate never recompiles.

        The distance of two views is a mean over examples, the task one over counted targets: where the two parts of
        the step differ, the distance's weight makes up for it.
        """
        parts = self.parts
        if self._plain and portion.share == 1.0:
            return {}
        dtype = self._dtype()
        scalars = {
            n: torch.tensor(at(self.clock), dtype=dtype, device=device)
            for n, at in parts.scalars.items()
        }
        scalars |= parts.tensors
        scalars["loss_weight"] = torch.tensor(portion.share, dtype=dtype, device=device)
        pairing = parts.rewrite.pairing
        if pairing is not None:
            scalars[pairing.weight] = scalars[pairing.weight] * (portion.part / portion.share)
        if pairing is not None or parts.rewrite.noises:
            word = derive(self.seed, _noise_stream(self.replicas)) & 0xFFFFFFFF
            scalars["key"] = pack_key(word, self.clock.steps & 0xFFFFFFFF, device=device)
            scalars["first_example"] = torch.tensor(portion.first, dtype=torch.int64, device=device)
        return scalars

    def _dtype(self) -> torch.dtype:
        """Return the dtype of scheduled numbers and statistics: that of float64 models, else float32."""
        wide = any(p.dtype == torch.float64 for p in self.parameters.values())
        return torch.float64 if wide else torch.float32

    def _arm(self, batch: Batch, scalars: Mapping[str, Tensor]) -> None:
        units, targets = self.parts.rewrite.example_units, batch[1]
        self.sites.arm(
            Division(targets.shape[0]) if units is None else units.divide(batch),
            scalars, self._dtype(), targets.device,
        )  # fmt: skip


def _one_mapping(penalty: PenaltyTerm) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return a loss term that finds parameters and inputs in one mapping, as the graph hands them over."""
    return lambda values: penalty.value({name: values[name] for name in penalty.parameters}, values)


def _noise_stream(replicas: Replicas | None) -> str:
    """Return the name of this process's stream of noise: replicas count their examples from 0, each by itself."""
    rank = 0 if replicas is None else replicas.rank
    return f"noise of replica {rank}" if rank else "noise"
