"""The numbers of a micro-batch as 0-d tensors, so that a changing rate never recompiles a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from trainc.compiler.method.loss import LOSS_WEIGHT, PARAMETER_WEIGHT
from trainc.compiler.method.losses import LOSS
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.term import SAMPLE_IDS, Term
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.data.batch import Batch, Pick
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

    The loss is a mean over counted targets. Where the micro-batch has another part of the examples than of the targets,
    the weights of terms over examples make up for it; where it has no targets, these terms are all of its loss. So do
    those of the losses of a sum, and of the terms over targets, which are those of the first loss.
    """
    scalars = {
        name: torch.tensor(value(clock), dtype=dtype, device=device)
        for name, value in method.scalars.items()
    }
    scalars |= {
        name: torch.tensor(value, dtype=dtype, device=device)
        for name, value in method.losses.numbers_now(clock).items()
    }
    scalars |= method.tensors
    scalars |= {name: make().to(device) for name, make in method.live_tensors.items()}
    for label, weight in method.losses.weights_now(clock).items():
        if share := where.share_of(label):  # without a number the loss counts no target here
            scalars[LOSS + label] = torch.tensor(weight * share, dtype=dtype, device=device)
    scalars[LOSS_WEIGHT] = torch.tensor(where.loss_weight, dtype=dtype, device=device)
    if where.own_weight is not None:
        scalars[PARAMETER_WEIGHT] = torch.tensor(where.own_weight, dtype=dtype, device=device)
    shares = {"examples": where.example_fraction / (where.loss_weight or 1.0)}
    if method.losses.is_sum:
        shares["targets"] = where.share_of(method.losses.parts[0].label)
    for term in method.rewrite.terms.values():
        share = shares.get(term.over, 1.0)
        if share != 1.0 and term.weight is not None:
            scalars[term.weight] = scalars[term.weight] * share
    return scalars


def read_by_terms(
    terms: Collection[Term],
    batch: Batch,
    where: MicroBatchSlice,
    output: Pick,
    shape: Callable[[], Sequence[int]],
    labels: Callable[[], Mapping[str, Tensor]] = dict,
) -> dict[str, Tensor]:
    """Return by name what terms read of a micro-batch besides its pass: of companions, of histories, and sample ids.

    `output` is the part of a companion's output that is its logits; `shape` gives that of one example's logits.
    `labels` are what the model is given of the targets; a companion that takes them is given them, too.
    """
    asked = [one for term in terms for one in term.companions]
    named = labels() if asked else {}
    found: dict[str, Tensor] = {}
    for one in asked:
        found |= one.read(batch[0], output, named)
    if where.sample_ids is not None:
        if any(term.sample_ids for term in terms):
            found[SAMPLE_IDS] = where.sample_ids
        for history in (one for term in terms for one in term.histories):
            found[history.name] = history.recall(where.sample_ids, shape)
    return found


def noise_scalars(
    seed: int, step: int, where: MicroBatchSlice, device: torch.device
) -> dict[str, Tensor]:
    """Return the key that a step's noise is drawn with, and the number of the micro-batch's first example.

    Replicas that average gradients number the examples of all of them, so that noise is that of one process.
    """
    own = where.stream
    word = derive_seed(seed, f"noise of replica {own}" if own else "noise") & 0xFFFFFFFF
    return {
        "key": pack_key(word, step & 0xFFFFFFFF, device=device),
        "first_example": torch.tensor(where.first_example, dtype=torch.int64, device=device),
    }
