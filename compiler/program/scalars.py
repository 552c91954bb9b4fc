"""The numbers of a micro-batch as 0-d tensors, so that a changing rate never recompiles a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from trainc.compiler.method.loss import LOSS_WEIGHT
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.storage.random_streams import derive_seed


def scheduled_scalars(
    method: LoweredMethod,
    where: MicroBatchSlice,
    clock: Clock,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return by name the current scheduled values, the method's tensors, and the micro-batch's weight in the loss.

    The distance between two views is a mean over examples, the loss a mean over counted targets: where the
    micro-batch has unequal parts of the two, the weight of the distance makes up for it.
    """
    scalars = {
        name: torch.tensor(value(clock), dtype=dtype, device=device)
        for name, value in method.scalars.items()
    }
    scalars |= method.tensors
    scalars[LOSS_WEIGHT] = torch.tensor(where.loss_weight, dtype=dtype, device=device)
    pairing = method.rewrite.pairing
    if pairing is not None:
        scalars[pairing.weight] = scalars[pairing.weight] * (
            where.example_fraction / where.loss_weight
        )
    return scalars


def noise_scalars(
    seed: int, step: int, replicas: ReplicaGroup | None, first_example: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the key that a step's noise is drawn with, and the number of the micro-batch's first example.

    Each replica counts its examples from 0, and so has a stream of noise of its own.
    """
    rank = 0 if replicas is None else replicas.rank
    word = derive_seed(seed, f"noise of replica {rank}" if rank else "noise") & 0xFFFFFFFF
    return {
        "key": pack_key(word, step & 0xFFFFFFFF, device=device),
        "first_example": torch.tensor(first_example, dtype=torch.int64, device=device),
    }
