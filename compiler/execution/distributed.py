"""Distributed training: which processes average gradients, and what sharded parameters do not allow."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.bound_model import replaced_parameter, untrained_parameter
from trainc.compiler.method.lowered_method import NeedsWhole
from trainc.compiler.per_example.micro_batch import MicroBatchResult
from trainc.compiler.structure.wrappers import inner_wrappers, unwrapped, wrapped_in
from trainc.runtime.mask.update_mask import masked_shard
from trainc.runtime.processes.replica_group import ReplicaGroup, world_size
from trainc.runtime.processes.sharded import is_sharded, squared_norms
from trainc.runtime.soundness.gradient_norm import GradientNorms
from trainc.runtime.step.action import Action
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.step.replicas import Replicas


def replicas_of(
    forward: Any,
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    wrappers: Sequence[DistributedDataParallel] = (),
) -> Replicas | None:
    """Return the processes that average these gradients; None if this process trains alone.

    They are the group of DistributedDataParallel or the mesh of FSDP2; any other wrapper of the module is assumed to
    average over all processes. The module itself, compiled or not, averages with none.
    """
    if world_size() == 1:
        return None
    if (shard := first_shard(parameters)) is not None:
        return Replicas(_group_of_mesh(shard, parameters[shard]))
    if wrappers:
        return Replicas(wrappers[0].process_group)
    inside = unwrapped(forward) if isinstance(forward, nn.Module) else forward
    return None if inside is module else Replicas()


class Wrappers:
    """Finds the DistributedDataParallel that averages gradients of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._known: list[weakref.ref[DistributedDataParallel]] | None = None
        """Those that there were when all objects were searched; None before that."""
        _made()  # notices what is made from now on

    def find(self, forward: Any) -> list[DistributedDataParallel]:
        """Return the DistributedDataParallel in `forward`, those of submodules, or else one around the module.

        That one is found wherever the user keeps it; it may wrap a larger module, which the user's code calls. All
        objects are searched for it once, since a copy of one, or one that was read from a file, is not made as others
        are; those that are made later make themselves known.
        """
        own = isinstance(forward, nn.Module) and forward is not self.module
        if found := _data_parallel(forward if own else self.module):
            return found
        if self._known is None:
            self._known = [*map(weakref.ref, _all_wrappers())]
        newest_first = (*reversed(_made().refs), *reversed(self._known))
        every = [one for ref in newest_first if (one := ref()) is not None]
        exact = [one for one in every if unwrapped(one) is self.module]
        return (exact or [one for one in every if self._holds(one)])[:1]

    def _holds(self, wrapper: DistributedDataParallel) -> bool:
        return any(part is self.module for part in wrapper.modules())


def _all_wrappers() -> list[DistributedDataParallel]:
    return [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]


class _Made:
    """Every DistributedDataParallel that was made since this was, as long as it is used, in this order.

    Each puts what it wraps into itself, as one module into another.
    """

    def __init__(self) -> None:
        self.refs: list[weakref.ref[DistributedDataParallel]] = []
        register_module_module_registration_hook(self._noticed)

    def _noticed(self, outer: nn.Module, *_: object) -> None:
        if isinstance(outer, DistributedDataParallel):
            self.refs.append(weakref.ref(outer, self.refs.remove))


_made = cache(_Made)


def _data_parallel(module: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel that a module is, or those that are in it."""
    inside = module
    while (wrapped := wrapped_in(inside)) is not None:
        if isinstance(inside, DistributedDataParallel):
            return [inside]
        inside = wrapped
    found = [one for one in inner_wrappers(inside) if isinstance(one, DistributedDataParallel)]
    return found or [one for one in module.modules() if isinstance(one, DistributedDataParallel)]


def trains_apart(peers: ReplicaGroup | None) -> str | None:
    """Return what to know where this process is one of several, and nothing exchanges what it trains; else None."""
    if peers is not None or (size := world_size()) == 1:
        return None
    return (
        f"this process is one of {size}, and nothing averages the gradients of this program, so that each trains a"
        " model of its own: to train one together, wrap it in DistributedDataParallel or call `fully_shard` before the"
        " first step"
    )


def first_shard(parameters: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first parameter that FSDP2 shards; None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return next((name for name, p in parameters.items() if is_sharded(p)), None)


def require_exchanged(
    gradients: GradientNorms, name_of: Callable[[nn.Parameter], str], replicas: Replicas
) -> None:
    """Raise SiteError that names the first parameter whose gradient differs between processes; all call this."""
    # Replicas free no gradient before it is exchanged.
    held = [one for one in gradients.gradients if isinstance(one, Tensor)]
    norms = squared_norms(held).sqrt().tolist() if held else []
    own = dict(zip(map(name_of, gradients.owners), norms, strict=True))
    everyone: list[dict[str, float]] = [{}] * replicas.size
    dist.all_gather_object(everyone, own, group=replicas.group)
    names = dict.fromkeys(name for one in everyone for name in one)
    apart = ((n, [one.get(n, 0.0) for one in everyone]) for n in names)
    name, found = max(apart, key=lambda pair: max(pair[1]) - min(pair[1]), default=("", [0.0]))
    raise SiteError(
        f"gradients were not exchanged between processes, which would train different models: that of `{name}` has a"
        f" norm from {min(found):.6g} to {max(found):.6g}. Run the model by its wrapper (set `program.forward` to it,"
        " or call it in the `micro_batch` block), run the last micro-batch of a step outside of `no_sync()`, and"
        " wrap or shard all parameters that train: a wrapper from before `compile` has none of those that this adds"
    )


def refuse_join(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Raise ValueError inside of `join()`, which lets a process without examples leave: it would be waited for."""
    if any(one._join_config.enable for one in wrappers):
        raise ValueError(
            "the step runs inside of `join()` of DistributedDataParallel, where a process that has no more batches"
            " leaves the others; but trainc exchanges loss and statistics with it in every step. Remove `join()`, and"
            " run the same number of steps on every process: one that has nothing left takes part with a batch whose"
            " targets are all ignored (`-100`), which counts nothing"
        )


def _group_of_mesh(name: str, parameter: Any) -> Any:
    """Return the processes over which FSDP2 averages; raises SiteError if the mesh is not made of replicas."""
    mesh = parameter.device_mesh
    split = [place for place in parameter.placements if not place.is_replicate()]
    if len(split) > 1 or (mesh.ndim > 1 and mesh.size() != world_size()):
        raise SiteError(
            f"`{name}` is sharded over {mesh} as {parameter.placements}: a mesh with several axes must contain all"
            f" processes and shard along one axis, as FSDP2 with replicas does. {_TENSOR_PARALLEL}"
        )
    return mesh.get_group() if mesh.ndim == 1 else None


_TENSOR_PARALLEL = (
    "Tensor parallel layers are not supported: use `fully_shard` or DistributedDataParallel instead"
)


def refuse_tensor_parallel(module: nn.Module) -> None:
    """Raise SiteError for a parameter that is distributed, but not by FSDP2: its gradient is no mean over examples."""
    sharding = [
        path
        for path, part in module.named_modules()
        if any(base.__name__ == "FSDPModule" for base in type(part).__mro__)
    ]
    for name, parameter in module.named_parameters():
        inside = any(not path or name.startswith(f"{path}.") for path in sharding)
        if is_sharded(parameter) and not inside:
            placed: Any = parameter
            raise SiteError(
                f"`{name}` is distributed over processes as {placed.placements}, but no `fully_shard` did that."
                f" {_TENSOR_PARALLEL}"
            )


def whole_or_refused(parameters: Mapping[str, Tensor], needed: Iterable[NeedsWhole]) -> bool:
    """Return whether no parameter is sharded; raises SiteError for one that a clause needs whole."""
    for need in needed:
        for name in need.parameters:
            if name in parameters and is_sharded(parameters[name]):
                raise SiteError(f"`{need.clause}`: {need.message(name)}", need.clause)
    return first_shard(parameters) is None


def refuse_shards(
    quantity: str, names: Iterable[str], parameters: Mapping[str, Tensor], instead: str
) -> None:
    """Raise SiteError if FSDP2 shards a parameter whose gradient on this process alone is needed."""
    shard = next((name for name in names if is_sharded(parameters[name])), None)
    if shard is not None:
        raise SiteError(
            f"`{shard}` is sharded over processes (FSDP2), so its gradient is averaged inside the backward pass and"
            f" {quantity} cannot be measured: {instead}"
        )


def require_own_gradients(
    replicas: Replicas | None, results: Sequence[MicroBatchResult], names: Sequence[str]
) -> None:
    """Raise SiteError if this process does not have its own gradient of the whole step.

    That is where it trains alone, and where a micro-batch before the last was averaged with other replicas.
    """
    if replicas is None:
        raise SiteError(
            "gradients of replicas are measured, but this process trains alone: wrap the model in"
            " DistributedDataParallel, `program.forward = ...`, in several processes, or measure those of micro-batches"
        )
    early = [i for i, result in enumerate(results[:-1]) if result.synchronised]
    if early:
        raise SiteError(
            "this replica's own gradient of the whole step is measured, but the gradient of micro-batch"
            f" {early[0] + 1} of {len(results)} was averaged over replicas (`{names[0]}`, ...): run the forward and"
            " backward pass of all but the last micro-batch inside `with program.forward.no_sync():`, or use"
            " `program.step`, which does this"
        )


def rebind_parameters(
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    trained: Collection[str],
    actions: Sequence[Action],
) -> bool:
    """Use the parameters that were put in place of those the program was bound to, as `fully_shard` does.

    Returns whether there are any.

    Raises SiteError where an optimizer has state of the old ones, or they are masked, for a trained parameter that is
    gone or has another shape, and for a trainable one that no optimizer trains: it is new, no longer frozen, or no
    longer shared.
    """
    now = dict(module.named_parameters())
    lost = [n for n in trained if n not in now or now[n].shape != parameters[n].shape]
    if lost:
        every = dict(module.named_parameters(remove_duplicate=False))
        raise replaced_parameter(lost[0], parameters[lost[0]], every)
    for name, parameter in now.items():
        if parameter.requires_grad and name not in trained:
            raise untrained_parameter(name, parameters)
    moved = [name for name, p in parameters.items() if now.get(name) is not p]
    parameters.update({name: now[name] for name in moved if name in now})
    for optimizer in (action for action in actions if isinstance(action, OptimizerStep)):
        own = [slot for slot in optimizer.slots if slot.name in moved]
        bound = [s.name for s in own if s.tensor.shape != now[s.name].shape]
        if bound and is_sharded(now[bound[0]]):
            raise SiteError(masked_shard(bound[0]))
        if bound or (own and optimizer.started):
            raise SiteError(
                f"`{(bound or moved)[0]}` was replaced after `trainc.compile`, but `{optimizer.name}` has a mask or"
                " state of the old parameter: replace or shard parameters first, then compile"
            )
        for slot in own:
            slot.tensor = now[slot.name]
        if own:
            optimizer.rebuild()  # its groups hold the old parameters
    return bool(moved)
