"""Distributed training: which processes average gradients, and what sharded parameters do not allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainc.compiler.errors import SiteError
from trainc.compiler.per_example.micro_batch import MicroBatchResult
from trainc.runtime.processes.replica_group import world_size
from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.step.action import Action
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.step.replicas import Replicas


def replicas_of(
    forward: Any, module: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Replicas | None:
    """Return the processes that average these gradients; None if this process trains alone.

    They are the group of DistributedDataParallel or the mesh of FSDP2; any other wrapper of the module is assumed to
    average over all processes. The module itself, compiled or not, averages with none.
    """
    if world_size() == 1:
        return None
    if (shard := first_shard(parameters)) is not None:
        return Replicas(_group_of_mesh(shard, parameters[shard]))
    if _uncompiled(forward) is module:
        return None
    wrapper = _data_parallel(forward)
    return Replicas(None if wrapper is None else wrapper.process_group)


def first_shard(parameters: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first parameter that FSDP2 shards; None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return next((name for name, p in parameters.items() if is_sharded(p)), None)


def exchanges_now(forward: Any, module: nn.Module) -> bool:
    """Return whether the backward pass of a forward pass that begins now will average gradients (no `no_sync()`)."""
    if world_size() == 1 or _uncompiled(forward) is module:
        return False
    wrapper = _data_parallel(forward)
    return wrapper is None or wrapper.require_backward_grad_sync


def _uncompiled(forward: Any) -> Any:
    return getattr(forward, "_orig_mod", forward)


def _data_parallel(forward: Any) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel in a wrapper of the module; None where none is found."""
    bare = _uncompiled(forward)
    if isinstance(bare, DistributedDataParallel):
        return bare
    inside = bare.modules() if isinstance(bare, nn.Module) else ()
    return next((m for m in inside if isinstance(m, DistributedDataParallel)), None)


def _group_of_mesh(name: str, parameter: Any) -> Any:
    """Return the processes over which FSDP2 averages; raises SiteError if the mesh is not made of replicas."""
    mesh = parameter.device_mesh
    split = [place for place in parameter.placements if not place.is_replicate()]
    if len(split) > 1 or (mesh.ndim > 1 and mesh.size() != world_size()):
        raise SiteError(
            f"`{name}` is sharded over {mesh} as {parameter.placements}: a mesh with several axes must contain all"
            " processes and shard along one axis, as FSDP2 with replicas does. Tensor parallel layers are not"
            " supported"
        )
    return mesh.get_group() if mesh.ndim == 1 else None


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
            "`method = replica` compares replicas, but this process trains alone: wrap the model in"
            " DistributedDataParallel, `program.forward = ...`, in several processes, or write `method = micro_batch`"
        )
    early = [i for i, result in enumerate(results[:-1]) if result.synchronised]
    if early:
        raise SiteError(
            f"`method = replica` needs this replica's own gradient of the whole step, but the gradient of micro-batch"
            f" {early[0] + 1} of {len(results)} was averaged over replicas (`{names[0]}`, ...): run the forward and"
            " backward pass of all but the last micro-batch inside `with program.forward.no_sync():`, or use"
            " `program.step`, which does this"
        )


def rebind_parameters(
    module: nn.Module, parameters: dict[str, nn.Parameter], actions: Sequence[Action]
) -> None:
    """Use the parameters that `fully_shard` put in place of those the program was bound to.

    Raises SiteError where an optimizer has state of the old ones, or they are masked.
    """
    now = dict(module.named_parameters())
    moved = [name for name, p in parameters.items() if now.get(name) is not p]
    if not moved:
        return
    parameters.update({name: now[name] for name in moved if name in now})
    for optimizer in (action for action in actions if isinstance(action, OptimizerStep)):
        own = [slot for slot in optimizer.slots if slot.name in moved]
        lost = [s.name for s in own if s.name not in now or s.tensor.shape != now[s.name].shape]
        if lost or (own and "torch" in vars(optimizer) and optimizer.torch.state):
            raise SiteError(
                f"`{(lost or moved)[0]}` was replaced after `trainc.compile`, but `{optimizer.name}` still has state of"
                " the old parameter: shard the model first, then compile"
            )
        for slot in own:
            slot.tensor = now[slot.name]
        if own:
            # Its groups hold the old parameters; it is made again on first use.
            vars(optimizer).pop("torch", None)
