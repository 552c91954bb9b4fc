"""Save a program: plan and graph as JSON, weights and the graph's constants as safetensors, checksums; and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from trainc.compiler.execution.distributed import first_shard
from trainc.compiler.execution.evaluations import estimate_statistics
from trainc.compiler.execution.execution import Execution
from trainc.compiler.graph.serialize import step_to_json
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.adapted_model import merge_adapters, read_adapters, write_adapters
from trainc.compiler.plan.plan import Plan
from trainc.compiler.plan.shown import ShownProgram
from trainc.compiler.structure.wrappers import Unwrapped
from trainc.runtime.companion.evaluation import EvaluationWeights
from trainc.runtime.processes.sharded import full, is_sharded
from trainc.runtime.soundness.sound import first_nan, unsound_tensor
from trainc.runtime.step.action import Action
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.storage.foreign_files import MANIFEST, write_manifest
from trainc.runtime.storage.saved_weights import read_weights
from trainc.runtime.storage.weight_delta import apply_delta, entries_of, read_delta, write_delta

FORMAT = 1
PLAN, GRAPH = "plan.json", "graph.json"
WEIGHTS, CONSTANTS = "weights.safetensors", "constants.safetensors"


class SavableProgram(ShownProgram):
    """Base of `Program`: what is written to disk, and what becomes of adapters."""

    execution: Execution
    _method: LoweredMethod
    _machine: StepMachine
    _evaluation: EvaluationWeights

    def unsound_state(self) -> str | None:
        """Return what of trained weights and optimizer state is not finite, in words; None where all of it is.

        Processes that shard parameters must all call this, and find the same.
        """
        found = unsound_state(self.module, self._machine.actions, self._evaluation.state())
        if first_shard(self.execution.parameters) is None:
            return found
        if (peers := self.execution.replicas) is None:
            return found
        everyone: list[str | None] = [None] * peers.size
        dist.all_gather_object(everyone, found, group=peers.group)
        return next((one for one in everyone if one is not None), None)

    def part_for(
        self, keys: Sequence[str], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Return an empty part of the tensor at some keys of a state, as its parameter is sharded; None for others."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        owner = next((named[key] for key in keys if key in named), None)
        if owner is None or not is_sharded(owner) or tuple(owner.shape) != tuple(shape):
            return None
        return torch.empty_like(owner, dtype=dtype, requires_grad=False)

    def estimate_from(self, batches: Callable[[], Iterable[Any]]) -> None:
        """Say where training batches are, from which clauses that average weights estimate running statistics.

        `batches()` is called before an evaluation or a save that needs them, as `lambda: loader`; each batch is what
        `step` takes. `trainc run` says so itself.
        """
        self._evaluation.estimate = partial(estimate_statistics, self.execution, batches)

    def require_savable(self) -> None:
        """Raise OptimizerProblem, a ValueError, where an optimizer has state that no checkpoint can hold."""
        self._machine.require_savable()

    def save(self, folder: str | Path) -> Path:
        """Write plan, graph and weights to `folder` and return it; `trainc.load` binds them to a model again.

        The weights are those that evaluation uses: see `evaluation_weights`. Where FSDP2 shards parameters all
        processes that they are sharded over call this, and the first of these writes whole weights.
        """
        self._machine.check_outside("save")
        require_sound(self.unsound_state(), folder)
        graph = self.execution.graphs.installed
        with self._evaluation.used():
            state = Unwrapped(self.module).state_dict()
            if first_shard(state) is None:
                return save(Path(folder), self.plan, Unwrapped(self.module), graph)
            gathered = _Gathered(state)
        peers = self.execution.replicas
        if peers is None or peers.rank == 0:
            save(Path(folder), self.plan, gathered, graph)
        if peers is not None:
            dist.barrier(peers.group)
        return Path(folder)

    # adapters

    def _require_whole(self, what: str) -> None:
        """Raise ValueError where FSDP2 shards parameters, of which no process has whole ones."""
        if (shard := first_shard(self.module.state_dict())) is not None:
            raise ValueError(
                f"`{shard}` is sharded over processes (FSDP2), and `{what}` needs whole tensors: in every process call"
                " `program.state_dict()`, load it into a program on a model of one process, and call it there"
            )

    def merge(self) -> nn.Module:
        """Fold the adapters into their layers, remove them, and return the model: it computes what it did.

        The model has the layers and the state-dict keys that it had before `compile`; in float64 its outputs change by
        rounding alone. The weights are those that evaluation uses: see `evaluation_weights`. The program cannot train
        afterwards; compile again. Raises ValueError, and changes nothing, where the model has no adapters or one
        cannot be folded.
        """
        self._machine.check_outside("merge")
        self._evaluation.check_outside("merge")
        self._require_whole("merge")
        with self._evaluation.used():
            merge_adapters(self.module)
            now = self.module.state_dict().items() if self._evaluation.name else ()
            merged = {name: tensor.clone() for name, tensor in now}
        if merged:
            self.module.load_state_dict(merged)
        self.unbind()
        self._machine.ended = "the adapters of this program are merged into the model: compile a spec again to train it"
        return self.module

    def save_adapters(self, folder: str | Path) -> Path:
        """Write the adapters, and what else their clause trains, to `folder`, and return it.

        The construct says in which format. Where several clauses adapt the model, each has a subfolder of its name;
        those of one construct whose format holds them together share one, of the name of the first, or `folder` itself
        if no others are there. The weights are those that evaluation uses: see `evaluation_weights`. Raises ValueError
        where there are no adapters, or the format cannot hold them.
        """
        self._machine.check_outside("save_adapters")
        self._require_whole("save_adapters")
        require_sound(self.unsound_state(), folder)
        with self._evaluation.used():
            write_adapters(self.module, Path(folder))
        return Path(folder)

    def load_adapters(self, folder: str | Path) -> None:
        """Load what `save_adapters` wrote into the adapters of this program.

        Raises ValueError where it does not fit, and FileNotFoundError where there is none.
        """
        self._machine.check_outside("load_adapters")
        self._evaluation.check_outside("load_adapters")
        self._require_whole("load_adapters")
        read_adapters(self.module, Path(folder))

    # what training changed

    def save_delta(self, file: str | Path, base: str | Path | None = None) -> Path:
        """Write the entries that masks let train, and whole what else trains, to a file, and return it.

        `load_delta` puts them into another copy of the weights that this program started from, exactly, as does
        `trainc delta --apply`. The weights are those that evaluation uses: see `evaluation_weights`. With `base`, the
        weights of the start as a .safetensors file or a run's folder, it writes every entry that differs from them.
        Raises ValueError for a `base` that does not fit, and without one where a mask has chosen more than once.
        """
        self._machine.check_outside("save_delta")
        self._require_whole("save_delta")
        require_sound(self.unsound_state(), file)
        before, masks = (
            None if base is None else read_weights(Path(base)),
            self._method.masks.items(),
        )
        left = [n for n, mask in masks if getattr(mask, "left", False)]
        indices = {n: i for n, mask in masks if (i := getattr(mask, "index", None)) is not None}
        with self._evaluation.used():
            tensors = Unwrapped(self.module).state_dict()
            parameters = {p.data_ptr() for p in self.module.parameters()}
            trained = {name for name, t in tensors.items() if t.data_ptr() not in parameters}
            for action in self._machine.actions:
                if isinstance(action, OptimizerStep):
                    trained |= {slot.name for slot in action.slots}
            write_delta(Path(file), entries_of(tensors, trained, indices, before, str(base), left))
        return Path(file)

    def load_delta(self, file: str | Path) -> None:
        """Put what `save_delta` or `trainc delta` wrote into the weights of this program.

        Raises ValueError, and changes nothing, where these are not the weights that were trained.
        """
        self._machine.check_outside("load_delta")
        self._evaluation.check_outside("load_delta")
        self._require_whole("load_delta")
        tensors = Unwrapped(self.module).state_dict()
        apply_delta(tensors, read_delta(Path(file)), "the model")
        for mask in self._method.masks.values():
            mask.read()

    def unbind(self) -> None:
        """Give the model's layers their own classes back; this program cannot train afterwards."""
        self.execution.sites.unbind()
        self.execution.masked.release()
        self._machine.ended = (
            "this program was unbound from its model: compile a spec again to train it"
        )


def save(folder: Path, plan: Plan, model: HasState, graph: StepGraph | None) -> Path:
    """Write a program's plan, its graph if one was captured, and the model's weights; return the folder.

    A graph that an earlier program left in the folder is removed. The manifest, which is written last, has the
    checksums of all files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    names = [PLAN, WEIGHTS]
    (folder / PLAN).write_text(json_text(plan.to_json()))
    save_model(cast("nn.Module", model), str(folder / WEIGHTS))
    (folder / GRAPH).unlink(missing_ok=True)
    (folder / CONSTANTS).unlink(missing_ok=True)
    if graph is not None:
        names.append(GRAPH)
        (folder / GRAPH).write_text(json_text(step_to_json(graph)))
        constants = {n: t.contiguous() for n, t in graph.constant_tensors().items()}
        if constants:
            names.append(CONSTANTS)
            save_file(constants, str(folder / CONSTANTS))
    write_manifest(folder, names, {"format": FORMAT})
    return folder


class HasState(Protocol):
    """A model as a file of weights sees it."""

    def state_dict(self) -> dict[str, Any]: ...


class _Gathered:
    """A model as a file of weights sees it: with whole tensors in place of sharded ones, shared ones once."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        tensors = (value for value in state.values() if isinstance(value, Tensor))
        own = {id(one): full(one).clone() if is_sharded(one) else one for one in tensors}
        self._state = {name: own.get(id(value), value) for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._state


def unsound_state(
    module: nn.Module, actions: Iterable[Action], evaluation: Mapping[str, Tensor]
) -> str | None:
    """Return what of weights that train and of optimizer state is not finite; None where all of it is.

    `evaluation` are weights that evaluation uses in their place, by name. Buffers may hold -inf, as masks do.
    """
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    places: list[tuple[str, Any]] = [(f"`{name}`", weight) for name, weight in weights.items()]
    places += [(f"`{n}` of evaluation", w) for n, w in evaluation.items() if n in weights]
    bounds: list[tuple[str, Any]] = []
    for action in actions:
        if isinstance(action, OptimizerStep):
            for key, value, may_be_infinite in action.named.checked():
                place = f"`{key}` in the state of `{action.name}`"
                (bounds if may_be_infinite else places).append((place, value))
    if (found := unsound_tensor(places)) is not None:
        return f"{found} is not finite"
    found = first_nan(bounds)
    return None if found is None else f"{found} is not a number"


def require_sound(unsound: str | None, folder: str | Path) -> None:
    """Raise ValueError where weights or optimizer state are not finite: what is saved is to be of use."""
    if unsound is not None:
        raise ValueError(
            f"{unsound}, so nothing was saved to {folder}: go back to an earlier checkpoint, or save"
            " `program.module.state_dict()` yourself"
        )


def json_text(data: Any) -> str:
    """Return JSON in the form of saved files: keys sorted, one value a line."""
    return json.dumps(data, indent=1, sort_keys=True) + "\n"
