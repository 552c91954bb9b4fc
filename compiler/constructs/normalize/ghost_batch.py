"""Ghost batch normalization: a BatchNorm whose statistics are those of a few examples, in a large batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class GhostBatch(Construct):
    """Normalizes each ghost batch, `size` consecutive examples of a micro-batch, by its own mean and variance.

    What a large batch is to the optimizer, `size` is to the selected BatchNorm layers. A micro-batch of
    at most `size` examples is one ghost batch, and BatchNorm as it is. The running statistics are those
    after one BatchNorm call per ghost batch, in order: with momentum a, S ghost batches and their
    statistics s_i they become (1 - a)^S r + sum_i a (1 - a)^(S - 1 - i) s_i. Evaluation uses them
    without groups. With `running = mean` they are updated once for a micro-batch, by the mean over its ghost
    batches of their means and biased variances, as some implementations do. Of a method that passes every
    example several times each view has ghost batches of its own. Without `remainder`, a micro-batch that
    `size` does not divide is an error.

    Under DistributedDataParallel a ghost batch has examples of one replica. Running statistics are what
    those of a BatchNorm are there: each replica updates its own, and takes those of rank 0 in their place
    before the first forward pass of a step, so evaluate and save on rank 0. With `broadcast_buffers = False`
    every replica keeps its own.
    """

    cite: ClassVar = (
        "Hoffer, Hubara and Soudry, Train longer, generalize better, NeurIPS 2017, arXiv:1705.08741"
    )
    usage: ClassVar = "normalize ghost_batch { size = 32 }"
    targets: ClassVar = "modules"
    default_on: ClassVar = "type(_BatchNorm)"
    effects: ClassVar = (
        Effect("forward", "normalize ghost batches apart", ("inputs",), ("forward",)),
    )
    division: ClassVar = (
        "ghost batches are taken within a micro-batch, so numbers of samples that are no multiples of `size` put other"
        " samples together"
    )

    size: int = Field(ge=2, description="examples that are normalized together")
    remainder: Literal["error", "merge_last", "smaller", "even"] = Field(
        default="error",
        description="what becomes of examples that are left over: an error; part of the last ghost batch; a smaller one"
        " of their own; or, with `even`, all ghost batches get fewer, as torch.chunk divides into ceil(B / size) parts",
    )
    running: Literal["in_order", "mean"] = Field(
        default="in_order",
        description="how running statistics take those of ghost batches: one after the other, or their mean at once",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that have no ghost batches, and micro-batches that do not divide."""
        for module in bound.modules:
            if "SyncBatchNorm" in module.types:
                yield Problem(
                    "wrong-target-kind",
                    f"`{module.name}` is a SyncBatchNorm, which normalizes the examples of all replicas together",
                    help="exclude it from `on`, or make it a BatchNorm: on each replica, ghost batches are its own",
                )
            elif "_BatchNorm" not in module.types:
                yield Problem(
                    "wrong-target-kind",
                    f"`{module.name}` is a {module.types[0]}; only BatchNorm layers normalize over a batch",
                    help="select BatchNorm layers: `& type(_BatchNorm)`",
                )
        micro = None if bound.sizes is None else bound.sizes.micro
        if micro is not None and micro <= self.size:
            yield Problem(
                "no-effect",
                f"`size = {self.size}` is not less than the {micro} samples of a micro-batch, so each is one ghost"
                " batch and the layers work as they are",
                field="size",
                severity="warning",
            )
        elif micro is not None and micro % self.size and self.remainder == "error":
            yield Problem(
                "bad-value",
                f"a micro-batch of {micro} samples cannot be divided into ghost batches of {self.size}",
                field="size",
                help=f"set `micro` in `data` to a multiple of {self.size}, or write `remainder = merge_last`,"
                " `smaller` or `even`",
            )

    def lower(self, to: Lowering) -> None:
        """Change how each layer normalizes; raises ValueError where one averages over all batches."""
        from trainc.compiler.layers.ghost_batch_norm import GhostBatchNorm, check_momentum

        for module in to.modules():
            check_momentum(module.name, to.model.get_submodule(module.name))
            to.layer(module.name, GhostBatchNorm(self.size, self.remainder, self.running))

    def reference(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return `x` through a BatchNorm, one call per ghost batch, in order, however the rest is divided."""
        import torch

        return torch.cat([layer(part) for part in x.split(self.sizes(len(x)))])

    def sizes(self, examples: int) -> list[int]:
        """Return the sizes of the ghost batches of so many examples."""
        if self.remainder == "even":
            count = -(-examples // self.size)
            return even_sizes(examples, -(-examples // count))
        if self.remainder == "smaller":
            return even_sizes(examples, self.size)
        count = max(examples // self.size, 1)
        sizes = [self.size] * (count - 1)
        return [*sizes, examples - sum(sizes)]


def even_sizes(examples: int, size: int) -> list[int]:
    """Return parts of `size`, the last of which has what is left."""
    return [min(size, examples - start) for start in range(0, examples, size)]
