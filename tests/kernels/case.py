"""What the tests in test_operators.py are told of an operator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """How to call one operator: `build(dtype, examples)` makes arguments, some requiring grad."""

    name: str
    operator: str
    build: Callable[[torch.dtype, int], tuple[Any, ...]]
    # The operator's differentiable results by definition, or None for operators without gradients.
    reference: Callable[..., tuple[Tensor, ...]] | None
    probe: int | None = None
    backward: str | None = None

    @property
    def op(self) -> Any:
        """The operator overload."""
        return getattr(torch.ops.trainc, self.operator).default

    def call(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The operator's differentiable results."""
        results = self.op(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r.requires_grad) or results

    def arguments(self, dtype: torch.dtype = torch.float32, examples: int = 3) -> tuple[Any, ...]:
        """Fresh arguments, the same for the same dtype and number of examples."""
        torch.manual_seed(examples)
        return self.build(dtype, examples)


def randn(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def probe(examples: int, columns: int, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(examples, columns, dtype=wide, requires_grad=True)
