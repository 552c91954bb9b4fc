"""The graph of a loss: the operations that its backward pass goes through."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def operations_of(result: Tensor) -> Iterator[Node]:
    """Yield every operation that a result depends on, once; those with a `variable` accumulate its gradient."""
    pending = [result.grad_fn] if result.grad_fn is not None else []
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                pending.append(source)
