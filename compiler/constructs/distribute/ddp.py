"""DistributedDataParallel: each process has the whole model, and gradients are averaged."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.distribute._base import Joined

if TYPE_CHECKING:
    import torch
    from torch import nn


class Ddp(Joined):
    """Lets the processes that torchrun started train one model together, each with a part of every batch.

    `torchrun --nproc-per-node N -m trainc run spec.train --out FOLDER` trains so, with this clause or without any
    `distribute` clause: each process holds the whole model in torch's DistributedDataParallel, which averages gradients
    in the backward pass. `batch` is the number of samples of all processes together, and `micro` that of one pass of
    one process. The loss is the mean over the counted targets of all. The order of the data and all noise of trainc are
    functions of the seed and the clock, so any number of processes gives the same numbers to rounding, except where the
    model draws torch's random numbers, such as dropout, or normalizes over its part of the batch, such as BatchNorm:
    the plan lists these modules.

    Rank 0 shows and writes; the folder of the run must be one that all processes can read, also on several machines. A
    process that fails ends all, and `torchrun --max-restarts` lets them go on from the newest checkpoint. In a loop of
    your own this clause does nothing: wrap the model in DistributedDataParallel yourself.
    """

    cite: ClassVar = (
        "Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020,"
        " arXiv:2006.15704"
    )
    usage: ClassVar = "distribute ddp { find_unused = false }"

    joins: ClassVar[str] = "by default"

    bucket: int = Field(
        default=25, ge=1, description="gradients that are sent in one message, in MiB"
    )
    find_unused: bool = Field(
        default=False,
        description="whether each step looks for parameters that no loss depends on; without it such a one is an error",
    )
    broadcast_buffers: bool = Field(
        default=True,
        description="whether buffers, such as running statistics, are those of rank 0 before each forward pass; else"
        " each process keeps its own",
    )

    def explain(self, error: Exception, model: nn.Module) -> str | None:
        if "finished reduction in the prior iteration" not in str(error):
            return None
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        unused = [trained[int(number)] for number in found[1].split()] if found else []
        named = ", ".join(f"`{name}`" for name in unused[:3]) or "a parameter"
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        return (
            f"no loss of the last step depends on {named}{more}, so that the processes wait for gradients that do not"
            " come: write `find_unused = true`, or freeze what is not used"
        )

    def wrap(self, model: nn.Module, device: torch.device) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        if not any(p.requires_grad for p in model.parameters()):
            return model
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=self.bucket,
            find_unused_parameters=self.find_unused,
            **({} if self.broadcast_buffers else _without_broadcasts(DistributedDataParallel)),
        )


def _without_broadcasts(wrapper: type) -> dict[str, Any]:
    """Return the argument that leaves buffers alone, which newer versions of torch call otherwise."""
    names = inspect.signature(wrapper).parameters
    new = "forward_sync_buffers"
    return {new if new in names else "broadcast_buffers": False}
