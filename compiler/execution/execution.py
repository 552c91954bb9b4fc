"""Run one micro-batch by the bound modules or as one graph, whichever can, and return its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainc.compiler.errors import CompilerBug, GraphRefused
from trainc.compiler.execution.compiled import is_compiled, state_of
from trainc.compiler.execution.distributed import first_shard, rebind_parameters, whole_or_refused
from trainc.compiler.execution.graph_cache import LIMIT, GraphCache
from trainc.compiler.execution.module_runner import ModuleRunner
from trainc.compiler.execution.plain_values import PlainValues
from trainc.compiler.execution.silent_adapters import explaining_silence
from trainc.compiler.graph.interface import Outputs
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.graph.trial import TrialResult, difference
from trainc.compiler.layers.bound_model import BoundModel
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.eager import eager_operations
from trainc.compiler.model.undisturbed import own_generators, set_own_generators, undisturbed
from trainc.compiler.model.user_hooks import UserHooks
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.runtime.data.batch import Batch, copy_inputs, one_of
from trainc.runtime.memory.failure import ran_out_of_memory
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.step.action import Action

Executor = Literal["auto", "graph", "module"]
_NOT_COMPARED = "the captured graph was not compared with the modules, which hold all logits and ran out of memory"


class Execution(ModuleRunner):
    """Runs micro-batches of one program over one model, by the modules or as a graph."""

    def __init__(
        self,
        model: nn.Module,
        method: LoweredMethod,
        seed: int,
        clock: Clock,
        executor: Executor,
        without: frozenset[str],
    ) -> None:
        super().__init__(model, method, seed, clock)
        self.executor = executor
        # Compiled code of many sizes would depend on which sizes came first.
        one_size = self.compiler is not None
        self.graphs = GraphCache(model, method, self.sites, clock, without, one_size=one_size)
        self._plain_values = PlainValues(model)
        self._user_hooks = UserHooks(model)
        self._bound = BoundModel(model, self.parameters, self.trained, self.sites.layers)
        self.refused: str | None = None
        """Why the last micro-batch ran by the modules although a graph was wanted."""
        self.reasons: dict[str, str] = {}
        """Every such reason, and the message that it had first."""

    @explaining_silence
    def run(
        self, batch: Batch, where: MicroBatchSlice, scaler: torch.amp.GradScaler | None = None
    ) -> MicroBatchResult:
        """Run forward and backward of a micro-batch, add to `.grad`, and return the results.

        It runs as a graph where the executor is `graph`, or is `auto` and the forward pass is rewritten or passes are
        replayed; by the bound modules otherwise, with a `scaler` of the loss, and where no graph can run it: then the
        results have a note that says why. Raises GraphRefused in the last case if the executor is `graph`.
        """
        whole = scaler is None and where.loss_weight == 1.0
        if whole and self.executor != "graph" and (done := self.run_unchanged(batch)) is not None:
            return done
        notes: tuple[str, ...] = ()
        self.refused = None
        if scaler is None and self._wants_graph and not self.lacks_targets(where):
            try:
                total, result = self.run_graph(batch, where)
                result.total = total
                return result
            except GraphRefused as error:
                if self.executor == "graph":
                    raise
                notes = self._record_reason(error)
        why = "a GradScaler scales the loss" if scaler is not None else self.refused
        total, result = self.run_modules(batch, where, why or self._why_modules())
        with nullcontext() if self.compiler is None else self.compiler.backward():
            (total if scaler is None else scaler.scale(total)).backward()
        result.total, result.notes = total.detach(), (*notes, *result.notes)
        return result

    def follow_model(self, actions: Sequence[Action], *, first_step: bool) -> bool:
        """Take over what the user changed in the model since the last step, and return whether there is something.

        Before the first step that may be trained parameters, too. Raises SiteError for what cannot be taken over.
        """
        moved = first_step and rebind_parameters(
            self.module, self.parameters, self.trained, actions
        )
        if first_step:
            self.whole = whole_or_refused(self.parameters, self.method.needs_whole)
            self.method.model_gradient.bind()
        if self.whole:
            moved |= self._bound.changed()
            if first_step:
                self._bound.remember()
        if moved:
            self.look_again()
        return moved

    def look_again(self) -> None:
        super().look_again()
        self._user_hooks = UserHooks(self.module)
        self._plain_values.forget()
        if self.compiler is not None:
            self.compiler.forget()
        self.replays.forget()
        self.graphs.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return why modules ran and run, and the states of the model's own random generators."""
        generators = [generator.get_state() for generator in own_generators(self.module)]
        refused = None if self.graphs.refused is None else list(self.graphs.refused)
        found = {"reasons": dict(self.reasons), "refused": refused, "generators": generators}
        return {**found, **self.compiled_state()}

    def load_state_dict(self, state: Mapping[str, Any], *, accept: bool = False) -> None:
        """Restore what `state_dict` gave; a graph that was refused is tried again only where changes are accepted."""
        self.reasons = dict(state["reasons"])
        refused = None if accept else state["refused"]
        self.graphs.refused = None if refused is None else (str(refused[0]), str(refused[1]))
        self.load_compiled(state, accept=accept)
        set_own_generators(self.module, state["generators"])

    @property
    def _wants_graph(self) -> bool:
        if self.executor == "auto":
            alone = self.forward is self.module and not (self.wrappers or is_compiled(self.module))
            wanted = bool(self.rewrite) or self.replays.here(self.device)
            return wanted and self.module.training and alone
        return self.executor == "graph"

    def _why_modules(self) -> str:
        """Return why no graph was wanted."""
        if self.executor == "module":
            return 'the program was compiled with `executor = "module"`'
        if is_compiled(self.module):
            return "your own code has compiled the model"
        return self._reason_for_modules() or "a loss counts no target in a micro-batch"

    def _record_reason(self, error: GraphRefused) -> tuple[str, ...]:
        """Keep the reason why modules run, and return the notes that say it: none the second time."""
        self.refused = str(error)
        if error.reason in self.reasons:
            return ()
        self.reasons[error.reason] = str(error)
        return (f"the bound modules run instead of a graph: {error}",)

    def _reason_for_modules(self) -> str | None:
        """Return why a graph cannot run the next micro-batch, whatever its shape; None where it can."""
        if not self.module.training:
            return "the model is in eval mode: call `model.train()` first"
        if self.forward is not self.module:
            wrapper = type(self.forward).__name__
            return f"`program.forward` is a {wrapper}, which a graph does not call"
        if self.wrappers:
            return "parts of the model are in DistributedDataParallel, which a graph does not call"
        if (reason := self.rewrite.modules_only) is not None:
            return reason
        if first_shard(self.parameters) is not None:
            return "sharded parameters (FSDP2) are gathered module by module"
        if (place := self._plain_values.first_changed()) is not None:
            return f"`{place}` of the model was changed since a graph was captured, which keeps the value of then"
        hook = self._user_hooks.find(self.parameters)
        return None if hook is None else f"{hook}, and a graph does not call hooks"

    # as a graph

    def capture(self, batch: Batch) -> StepGraph:
        """Return the graph for batches shaped like `batch`, captured on first use."""
        where = MicroBatchSlice.of_first_samples(batch)
        with self.autocast():
            return self.graphs.get(batch, partial(self._graph_scalars, batch, where))

    def _trusted(self, batch: Batch, where: MicroBatchSlice) -> StepGraph:
        """Return the graph for a batch; raises GraphRefused where only the bound modules can run it."""
        reason = self._reason_for_modules()
        if reason is not None:
            raise GraphRefused(reason)
        self._plain_values.remember()
        self._check_preconditions(batch)
        limit = LIMIT if self.executor == "auto" else None
        whole = MicroBatchSlice(sample_ids=where.sample_ids)
        scalars = partial(self._graph_scalars, batch, whole)
        with self.autocast():
            return self.graphs.trusted(batch, scalars, partial(self._try, batch, whole), limit)

    def run_graph(self, batch: Batch, where: MicroBatchSlice) -> tuple[Tensor, MicroBatchResult]:
        """Run forward and backward as a graph, add to `.grad`, and return the loss with what is left.

        Raises GraphRefused where only the bound modules can run this micro-batch; then nothing has changed.
        """
        if self.lacks_targets(where):
            raise GraphRefused("the modules run micro-batches whose `loss_weight` is 0")
        graph = self._trusted(batch, where)
        scalars = self._graph_scalars(batch, where)
        out = self._run_compiled(graph, batch, scalars, adds=True)
        self.covered = True
        for name, gradient in out.grads.items():
            if gradient is not None:
                self._add_gradient(name, gradient)
        terms = out.losses | out.terms
        if self.rewrite.reads_passes:
            terms["data_loss"] = out.data_loss
        if out.logits is not None:
            views = self.rewrite.views
            self.observe(self.read(out.logits, batch, scalars, views, out.captured), where)
        result = self._result(batch, where, out.loss, terms)
        result.notes = self.graphs.notes() + self.news()
        self.statistics.record_graph(result, out.probes, out.grads)
        return out.total, result

    def _run_compiled(
        self, graph: StepGraph, batch: Batch, scalars: Mapping[str, Tensor], *, adds: bool = False
    ) -> Outputs:
        """Return what a graph computes, by compiled code and by replays where the spec asks.

        With `adds` gradients are added to those there are, and masks may get theirs early.
        """

        def run(forward: Any) -> Outputs:
            replayed = self.replays.around(
                graph, forward, partial(self._dtypes, batch), self._to_add if adds else tuple
            )
            if adds and self.compiler is None and replayed is None:
                return graph.run(batch, scalars, take=self.method.taken_early)
            return graph.run(batch, scalars, replayed or forward)

        if self.compiler is None:
            return run(graph.forward)
        state = state_of("the step graph", self.module, batch, self.rewrite)
        return self.compiler.run(graph.forward, state, self.kept_state, run)

    def _to_add(self) -> set[str]:
        """Return which of a graph's outputs are gradients that are added to others, and kept by nobody."""
        has = (name for name, p in self.parameters.items() if p.grad is not None)
        return {f"grad:{name}" for name in has if name not in self.method.masks}

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        """Accumulate a parameter's gradient where the optimizer reads it."""
        mask = self.method.masks.get(name)
        if mask is not None:
            mask.take(gradient)
            return
        parameter = self.parameters[name]
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def gradients(
        self,
        batch: Batch,
        where: MicroBatchSlice,
        scaler: torch.amp.GradScaler | None = None,
        of: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what one micro-batch adds to the step's loss and, by parameter, to its gradients, without adding it.

        No statistic is kept, and replicas average nothing. With a `scaler` the loss is scaled. With `of` they are those
        of these tensors, by the bound modules.
        """
        if of is None:
            batch = copy_inputs(batch)
        scalars = self._graph_scalars(batch, where)
        found = None
        graph = self._wants_graph and not self.lacks_targets(where)
        if scaler is None and of is None and graph:
            try:
                out = self._run_compiled(self._trusted(batch, where), batch, scalars)
                found = self._found(out)
            except GraphRefused:
                if self.executor == "graph":
                    raise  # for others the passes of the step say why
        if found is None:
            self._check_preconditions(batch)
            weight = where.loss_weight
            found = self._trial_modules(batch, scalars, weight, scaler, of, compiled=True)
        return found.loss, {n: g for n, g in found.gradients.items() if g is not None}

    # what is compared

    def _try(self, batch: Batch, where: MicroBatchSlice, graph: StepGraph) -> None:
        """Run a graph beside the bound modules, changing nothing; raises GraphRefused where it fails or differs."""
        with undisturbed(self.module), eager_operations():
            scalars = self._graph_scalars(batch, where)
            try:
                modules = self._trial_modules(copy_inputs(batch), scalars)
            except Exception as error:
                if self.rewrite.chunks is None or not ran_out_of_memory(error):
                    raise
                graph.warnings += (_NOT_COMPARED,)
                return
        self._plain_values.leave_out_changed()
        try:
            with undisturbed(self.module):
                scalars = self._graph_scalars(batch, where)
                found = self._found(graph.run(copy_inputs(batch), scalars))
        except CompilerBug:
            raise
        except Exception as error:
            if ran_out_of_memory(error):  # no fault of the graph
                raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise GraphRefused("the captured graph fails when it runs", what) from error
        if (gap := difference(found, modules, self._dtypes(batch))) is not None:
            raise GraphRefused("the captured graph computes something else than the modules", gap)

    def _dtypes(self, batch: Batch) -> set[torch.dtype]:
        """Return the dtypes of a pass: of its parameters, and autocast's."""
        device = one_of(batch[1]).device.type
        casts = {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
        return casts | {p.dtype for p in self.parameters.values()}

    def trial(
        self, batch: Batch, executor: Literal["graph", "module"], strength: float | None = None
    ) -> TrialResult:
        """Return the differentiated loss, the gradients and per-example squared norms by one executor.

        No gradient is accumulated. With `strength` every scheduled number of the rewrite and of the loss terms has
        that value.
        """
        scalars = self._graph_scalars(batch, MicroBatchSlice.of_first_samples(batch))
        if strength is not None:
            scalars |= {n: torch.full_like(scalars[n], strength) for n in self.method.scalars}
        self._check_preconditions(batch)
        if executor == "graph":
            return self._found(self.capture(batch).run(batch, scalars))
        return self._trial_modules(batch, scalars)

    def _found(self, out: Outputs) -> TrialResult:
        return TrialResult(out.total, out.grads, self.statistics.squares(out.probes))
