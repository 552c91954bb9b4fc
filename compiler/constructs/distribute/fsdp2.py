"""FSDP2: each process has a part of every parameter, its gradient and its optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.distribute._base import Joined

if TYPE_CHECKING:
    import torch
    from torch import nn

_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Precision = Literal["float32", "bf16", "fp16"]


class Fsdp2(Joined):
    """Lets the processes that torchrun started train one model together, each with a part of all weights.

    `torchrun --nproc-per-node N -m trainc run spec.train --out FOLDER` divides every parameter, its gradient and its
    optimizer state over the processes, by torch's `fully_shard`. Each selected module, such as a block, gathers its
    weights when it runs and frees them afterwards; what lies in none of them is gathered for the whole pass. The model
    is built whole on each process before it is divided. Batches, the mean over targets, random numbers, failures and
    checkpoints are as with `distribute ddp`. What needs whole gradients or weights on one process is refused by name.
    The mesh has one axis: replicas of shards (HSDP) and tensor parallel layers are for a loop of your own.

    One process trains as without the clause. In a loop of your own this clause does nothing: call `fully_shard`.
    """

    cite: ClassVar = (
        "Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, VLDB 2023, arXiv:2304.11277;"
        " torch.distributed.fsdp.fully_shard"
    )
    usage: ClassVar = 'distribute fsdp2 on "blocks.*" { reshard_after_forward = true }'
    targets: ClassVar = "modules"
    shards: ClassVar = True

    reshard_after_forward: bool = Field(
        default=True,
        description="whether the weights of a selected module are freed after its forward pass and gathered again in"
        " the backward pass; else they stay, which costs memory and saves messages",
    )
    param_dtype: Precision | None = Field(
        default=None,
        description="dtype in which weights are gathered and modules compute; the parts that are trained keep theirs."
        " Default: that of the weights",
    )
    reduce_dtype: Precision | None = Field(
        default=None,
        description="dtype in which gradients are added up over processes. Default: `param_dtype`",
    )

    def prepare(
        self, model: nn.Module, modules: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        param, reduce = (
            None if name is None else getattr(torch, _DTYPES[name])
            for name in (self.param_dtype, self.reduce_dtype)
        )
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
        # Inner modules first: each takes the parameters that none has taken yet.
        for name in sorted(modules, key=lambda name: name.count("."), reverse=True):
            fully_shard(
                modules[name],
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=self.reshard_after_forward,
            )
        fully_shard(model, mesh=mesh, mp_policy=policy)
