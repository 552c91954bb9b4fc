"""What tests of losses share: a loss and its definition on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.conformance import tokens
from trainc.compiler.constructs.loss._base import LossConstruct
from trainc.runtime.data.batch import Batch


def numbers_of_each_token(seed: int) -> Batch:
    """Return six sequences, with 24 numbers of each token as targets."""
    generator = torch.Generator().manual_seed(seed)
    return tokens(seed)[0], torch.randn(6, 8, 24, generator=generator)


def double_and_reference(
    constructs: Sequence[LossConstruct], targets_of: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradient of each construct in float64, by the loss and by definition; output (5, 7)."""
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for i, construct in enumerate(constructs):
        loss, reference = construct.make_loss(), construct.reference
        for found, lowered in zip(results, (True, False), strict=True):
            x = output.clone().requires_grad_()
            value = (loss if lowered else reference)(x, targets_of(target))
            value.backward()
            assert x.grad is not None
            found |= {f"loss {i}": value.detach(), f"gradient {i}": x.grad}
    return results
