"""How a program's model is spread over processes: who averages gradients with it, and what its shards rule out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainc.compiler.errors import SiteError
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.step.replicas import Replicas, world_size
from trainc.runtime.step.sharded import is_sharded

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.per_example.micro_batch import Micro
    from trainc.runtime.step.action import Action


def replicas_of(
    forward: Any, module: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Replicas | None:
    """Return the processes that average these gradients; None where this one trains alone.

    They are those of DistributedDataParallel's group or of FSDP2's mesh; another wrapper of the module is taken to
    average over all. The bare module, compiled or not, averages with nobody.
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
    """Return the name of a parameter that FSDP2 shards; None without any."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return next((name for name, p in parameters.items() if is_sharded(p)), None)


def exchanges_now(forward: Any, module: nn.Module) -> bool:
    """Say whether the backward pass of a forward pass begun now averages gradients at once, not under `no_sync()`."""
    if world_size() == 1 or _uncompiled(forward) is module:
        return False
    wrapper = _data_parallel(forward)
    return wrapper is None or wrapper.require_backward_grad_sync


def _uncompiled(forward: Any) -> Any:
    return getattr(forward, "_orig_mod", forward)


def _data_parallel(forward: Any) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel in a wrapper of the module; None where there is none to be seen."""
    bare = _uncompiled(forward)
    if isinstance(bare, DistributedDataParallel):
        return bare
    inside = bare.modules() if isinstance(bare, nn.Module) else ()
    return next((m for m in inside if isinstance(m, DistributedDataParallel)), None)


def _group_of_mesh(name: str, parameter: Any) -> Any:
    """Return the processes over which FSDP2 averages; raises SiteError where a mesh has more than replicas in it."""
    mesh = parameter.device_mesh
    split = [place for place in parameter.placements if not place.is_replicate()]
    if len(split) > 1 or (mesh.ndim > 1 and mesh.size() != world_size()):
        raise SiteError(
            f"`{name}` is spread over {mesh} as {parameter.placements}: a program under a mesh of several axes needs"
            " all processes in it and one sharded axis, as FSDP2 with replicas has; tensor parallel layers cannot train"
        )
    return mesh.get_group() if mesh.ndim == 1 else None


def refuse_shards(
    wanted: str, names: Iterable[str], parameters: Mapping[str, Tensor], instead: str
) -> None:
    """Raise SiteError where something needs a process's own gradient of a parameter that FSDP2 shards."""
    shard = next((name for name in names if is_sharded(parameters[name])), None)
    if shard is not None:
        raise SiteError(
            f"`{shard}` is sharded over processes (FSDP2), so its gradient is averaged inside the backward pass and"
            f" {wanted} cannot be measured: {instead}"
        )


def check_apart(replicas: Replicas | None, micros: Sequence[Micro], names: Sequence[str]) -> None:
    """Raise SiteError where there are no replicas, or where micro-batches were averaged one by one.

    A replica then has no gradient of its own.
    """
    if replicas is None:
        raise SiteError(
            "`method = replica` compares replicas, and this process trains alone: wrap the model in"
            " DistributedDataParallel, `program.forward = ...`, in several processes, or take `method = micro_batch`"
        )
    early = [i for i, micro in enumerate(micros[:-1]) if micro.synchronised]
    if early:
        raise SiteError(
            f"`method = replica` needs this replica's gradient of all the step, and micro-batch {early[0] + 1} of"
            f" {len(micros)} was averaged at once (`{names[0]}`, ...): run all but the last forward and backward inside"
            " `with program.forward.no_sync():`, or use `program.step`, which does"
        )


def follow(
    module: nn.Module, parameters: dict[str, nn.Parameter], actions: Sequence[Action]
) -> None:
    """Take over parameters that `fully_shard` put in the place of those the program was bound to.

    Raises SiteError where something was made of the old ones: hooks, selected entries, optimizer state.
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
                f"`{(lost or moved)[0]}` was replaced after `trainc.compile`, and `{optimizer.name}` keeps something of"
                " the old one: shard the model first, then compile"
            )
        for slot in own:
            slot.tensor = now[slot.name]
        if own:
            vars(optimizer).pop(
                "torch", None
            )  # its groups hold the old ones; made again on first use
