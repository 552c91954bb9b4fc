"""What a step without clauses does beyond a loop written by hand: the norm of the gradient, and nothing else."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import trainc
from examples.models import gpt

SPEC = "loss cross_entropy optimizer adamw { lr = 1e-3, weight_decay = 0.1 }"
Batch = tuple[Tensor, Tensor]


def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=31)


def batch() -> Batch:
    ids = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


class Counted(TorchDispatchMode):
    """Counts the operators that run inside."""

    found: Counter[str]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(step: Callable[[Batch], object]) -> Counter[str]:
    """Return how often a step calls each operator, once it has run before."""
    step(batch())
    counted: Counted = Counted()  # type: ignore[no-untyped-call]
    counted.found = Counter()
    with counted:
        step(batch())
    return counted.found


def test_a_step_calls_no_operator_beyond_a_loop_but_for_the_norm_of_the_gradient() -> None:
    theirs = model()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1)

    def by_hand(one: Batch) -> float:
        loss = cross_entropy(theirs(one[0]).flatten(0, 1), one[1].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    program = trainc.compile(SPEC, model())
    more = operators(program.step) - operators(by_hand)
    matrices = sum(p.dim() != 1 for p in theirs.parameters())
    assert more == {
        "aten.cat.default": 1,  # of all vectors
        "aten.linalg_vector_norm.default": 1,
        "aten._foreach_norm.Scalar": 1,
        "aten._local_scalar_dense.default": matrices + 1,
        "aten.detach.default": 1,  # the loss that the step reports
    }


def test_the_gradients_of_a_step_are_freed_at_its_end() -> None:
    program = trainc.compile(SPEC, model())
    seen: list[weakref.ref[Tensor]] = []
    for parameter in program.module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    program.step(batch())
    assert len(seen) == len(list(program.module.parameters()))
    assert not [ref for ref in seen if ref() is not None]


def test_an_optimizer_with_a_zero_grad_of_its_own_keeps_it() -> None:
    program = trainc.compile(SPEC, model())
    optimizer = next(a for a in program._machine.actions if hasattr(a, "torch")).torch
    calls, plain = [], optimizer.zero_grad

    def zero_grad(**options: bool) -> None:
        calls.append(options)
        plain(**options)

    optimizer.zero_grad = zero_grad
    program.step(batch())
    assert calls == [{"set_to_none": True}]
    assert all(p.grad is None for p in program.module.parameters())
